"""`codeword compress`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from codeword import api, console, report, show
from codeword.artifact import Artifact
from codeword.atomic import make_folder
from codeword.cache import Cache
from codeword.candidates import Candidates
from codeword.cli.options import (
    Checkpoint,
    Exclude,
    FoldNorms,
    Include,
    Json,
    KeepNonfinite,
    Limit,
    NoCache,
    Seed,
    Size,
    check_data,
)
from codeword.console import reported
from codeword.data import load_data
from codeword.errors import WriteError
from codeword.finetune import Finetune, History
from codeword.plan import METHODS
from codeword.sources import files_of, open_source

_DEFAULT = Finetune()


def compress(
    source: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.cw", help="The file to write.")],
    target: Size = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Instead of a size: the smallest file that loses at most so many points of top-1, as measured on "
            "--data; give data that the net was not tested on.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:OPTION=VALUE,...",
            help=f"One method for all matrices and kernels instead of a target: {', '.join(METHODS)}.",
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(metavar="PLAN.toml", help="Run this plan instead of a target.")] = None,
    save_plan: Annotated[Path | None, typer.Option(metavar="PLAN.toml", help="Write the plan that was run.")] = None,
    include: Include = None,
    exclude: Exclude = None,
    fold_norms: FoldNorms = True,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; the file does not depend on it.")] = 1,
    keep_nonfinite: KeepNonfinite = False,
    no_cache: NoCache = False,
    candidates: Annotated[
        Candidates,
        typer.Option(
            metavar="fast|all",
            help="What a target's plan is made of: rate-aware scalars, or the best of all methods (minutes).",
        ),
    ] = "fast",
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="The net of IN, to run --data through or to train; needs --data."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Images by which errors cancel, labels unused; with --max-drop also to measure on, with --finetune to "
            "train on. Needs --model.",
        ),
    ] = None,
    limit: Limit = None,
    finetune: Annotated[
        int | None, typer.Option(metavar="EPOCHS", min=1, help="Train the compressed net so long on --data.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", help="Of training, at its height.")
    ] = _DEFAULT.learning_rate,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples a step.")] = _DEFAULT.batch_size,
    distill: Annotated[
        float, typer.Option(metavar="0..1", help="Share of the loss that is to give the uncompressed net's outputs.")
    ] = _DEFAULT.distill,
    sparsity: Annotated[
        float | None, typer.Option(metavar="0..1", help="Prune to this share of zeros first, for EPOCHS more.")
    ] = None,
    shift: Annotated[int, typer.Option(metavar="PIXELS", help="Move training images by up to so many.")] = 0,
    mirror: Annotated[bool, typer.Option("--mirror", help="Turn half of the training images round.")] = False,
    blend: Annotated[
        bool, typer.Option("--blend", help="Mix training images in pairs; with --distill 1, labels unused.")
    ] = False,
    held_out: Annotated[
        int | None,
        typer.Option(metavar="N", help="Examples to score after each epoch, not to train on; 5,000 or a tenth."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state after each epoch there; else in OUT.training until done."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped, after its last whole epoch.")
    ] = False,
    report_to: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write report.json, .md and .png there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a checkpoint to a target, re-read the file and verify it.

    Example: `codeword compress model.safetensors -o model.cw --target 30x`

    Example: `codeword compress model.safetensors -o model.cw --method kmeans:n_clusters=16`

    Example: `codeword compress model.safetensors -o model.cw --target 30x --model codeword.zoo:lenet5 --data
    mnist:train --finetune 10`

    Example: `codeword compress model.safetensors -o model.cw --max-drop 0.5 --model codeword.zoo:lenet5 --data
    mnist:train`
    """
    with reported(as_json):
        training = {
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "distill": distill,
            "sparsity": sparsity,
            "shift": shift,
            "mirror": mirror,
            "blend": blend,
            "held_out": held_out,
        }
        if finetune is None:
            given = [name.replace("_", "-") for name, value in training.items() if value != getattr(_DEFAULT, name)]
            given += ["checkpoint"] * (checkpoint is not None) + ["resume"] * resume
            if given:
                raise typer.BadParameter(f"--{given[0]} is about training; give --finetune EPOCHS too")
        elif model is None:
            raise typer.BadParameter("--finetune trains a net on data: give --model and --data")
        if max_drop is not None and model is None:
            raise typer.BadParameter("--max-drop measures accuracy: give --model and --data")
        check_data(model, data, limit)
        options = None if finetune is None else Finetune(epochs=finetune, seed=seed, **training)
        start = time.perf_counter()
        original = open_source(source)
        console.check_writable(out, *files_of(original), plan)
        console.check_writable(save_plan, *files_of(original), plan)
        if save_plan is not None and save_plan.resolve() == out.resolve():
            raise WriteError(f"cannot write both the file and its plan to {out}; name another --save-plan")
        if report_to is not None:
            make_folder(report_to)
            report.need_pictures()
        net: Any = original
        rest: dict[str, Any] = {}
        if model is not None and data is not None:
            from codeword.nets import load_net

            dataset = load_data(data, limit=limit)
            if options is None:
                rest = {"data": dataset, "net": load_net(model, original)}
            else:
                net = load_net(model, original)
                rest = {"data": dataset, "finetune": options, "resume": resume}
                rest["checkpoint"] = checkpoint or out.with_name(f"{out.name}.training")
        passes = ("coding",) if plan is not None or method is not None else ("measuring weights", "coding")
        with console.progress(passes) as progress:
            if max_drop is not None and not as_json:
                rest["on_trial"] = lambda trial: progress.line(show.trial(trial))
            if options is not None:
                rest["on_epoch"] = _epochs(progress, as_json=as_json)
                progress.phase("preparing")
            made = api.fit(
                net,
                target,
                max_drop=max_drop,
                plan=plan,
                method=method,
                include=include or (),
                exclude=exclude or (),
                fold_norms=fold_norms,
                seed=seed,
                workers=workers,
                keep_nonfinite=keep_nonfinite,
                cache=Cache.of(not no_cache, console.warn),
                candidates=candidates,
                progress=progress,
                **rest,
            )
            if options is not None:
                if int(os.environ.get("RANK", "0")):
                    return  # of the processes that torchrun starts the first one writes
                original = open_source(net)  # names and dtypes are those of the net that was trained
            made.artifact.save(out)
            if save_plan is not None:
                made.plan.save(save_plan)
            progress.phase("verifying the written file")
            with api.load(out) as artifact:
                differences = api.verify(artifact, original)
                facts = _compressed(source, out, artifact, made)
                if report_to is not None:
                    facts["report"] = report.write_report(
                        report_to,
                        api.inspect(artifact, original),
                        artifact,
                        file=out.name,
                        original=original,
                        kept=made.kept,
                        plan=made.plan.to_dict(),
                        training=made.histories,
                    )
            if options is not None and checkpoint is None:
                _remove_states(rest["checkpoint"])
        facts |= {
            "verified": not differences,
            "differences": msgspec.to_builtins(differences),
            "seconds": round(time.perf_counter() - start, 3),
        }
        console.print_json(facts) if as_json else show.compressed(facts)
        if differences:
            raise typer.Exit(1)
        if made.missed is not None:
            if not as_json:
                console.warn(f"{made.missed}; it was written")
            raise typer.Exit(6)


def _compressed(source: Path, out: Path, artifact: Artifact, made: api.Compressed) -> dict[str, Any]:
    """What there is to say of a file just written; sizes are those of the file, opened again."""
    tied = [name for name, entry in artifact.entries.items() if entry.tied_to is not None]
    return {
        "input": source,
        "output": out,
        "dense_nbytes": artifact.dense_nbytes,
        "nbytes": artifact.nbytes,
        "container_nbytes": artifact.container_nbytes,
        "ratio": artifact.ratio,
        "bits_per_weight": artifact.bits_per_weight,
        "tensors": len(artifact),
        "compressed": len(artifact) - len(made.kept) - len(tied),
        "tied": len(tied),
        "kept": made.kept,
        "target": made.plan.target,
        "target_nbytes": made.target_nbytes,
        "missed": made.missed,
        "measured": msgspec.to_builtins(made.measured),
    } | ({"training": msgspec.to_builtins(made.histories)} if made.histories else {})


def _epochs(progress: console.Watch, *, as_json: bool) -> Callable[[History], None]:
    """Tells of each epoch in a line, and of the stages by what the bar says."""
    stages: set[str] = set()

    def on_epoch(history: History) -> None:
        if not as_json:
            progress.line(show.epoch(history))
        if history.stage not in stages:
            progress.phase("pruning" if history.stage == "pruner" else "training")
            stages.add(history.stage)
        if history.last.epoch == history.epochs:
            progress.phase("coding")

    return on_epoch


def _remove_states(folder: Path) -> None:
    """Takes away the states of a run that is done, and their folder if nothing else is in it."""
    for state in folder.glob("*.safetensors"):
        state.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
