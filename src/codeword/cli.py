"""The command line: each verb reads its arguments, calls `codeword.api`, and prints. docs/cli.md is made from it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from codeword import __version__, api, console, report, show
from codeword.artifact import Artifact
from codeword.atomic import make_folder
from codeword.cache import Cache
from codeword.candidates import Candidates
from codeword.console import reported
from codeword.data import load_data
from codeword.errors import WriteError
from codeword.finetune import Finetune, History
from codeword.forecast import dry_run
from codeword.front import Front, Row
from codeword.peers import PEERS
from codeword.plan import METHODS, Plan
from codeword.sources import files_of, open_source
from codeword.sweep import RECORD, TARGETS, facts_of
from codeword.sweep import sweep as run_sweep

EXIT_CODES = {
    0: "all went well",
    1: "verify found a difference",
    2: "wrong command line",
    3: "a checkpoint is missing, unreadable, unsafe, or holds NaN or infinity",
    4: "a .cw file is missing, truncated, corrupted, or from a newer version",
    5: "a plan, method option or glob is wrong",
    6: "a target cannot be read, or the written file misses it",
    7: "evaluation data is missing or malformed",
    8: "the output could not be written; what was there before is untouched",
    9: "a model and a file do not fit each other",
    10: "an optional package is needed; the message names the extra",
    11: "a worker process ended before its work did, for want of memory most often",
    12: "training came to a loss that is no number; the state after the last good epoch was kept",
    130: "interrupted (Ctrl-C)",
}


class _Verbs(TyperGroup):
    """The group of verbs, which also tells a wrong command line as JSON when JSON was asked for."""

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # noqa: ANN401
        words = sys.argv[1:] if args is None else list(args)
        if "--json" not in words or not standalone_mode:
            return super().main(args, *rest, standalone_mode=standalone_mode, **extra)
        try:
            code = super().main(args, *rest, standalone_mode=False, **extra)
        except Exception as error:
            explain = getattr(error, "format_message", None)  # what Click's errors have, whoever ships Click
            if explain is None:
                raise
            console.print_json({"error": explain(), "type": "UsageError", "exit_code": 2})
            code = 2
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes:\n\n" + "\n\n".join(f"- {code} {meaning}" for code, meaning in EXIT_CODES.items()),
)

_DEFAULT = Finetune()

# The arguments that more than one verb takes.
File = Annotated[Path, typer.Argument(help="A .cw file.", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Against = Annotated[
    Path | None, typer.Option(metavar="ORIGINAL", help="The checkpoint it was made from, to compare with.")
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither use nor keep what was coded for other targets ($CODEWORD_CACHE)."),
]
FoldNorms = Annotated[
    bool,
    typer.Option(
        "--fold-norms/--no-fold-norms",
        help="Let a target store batch norms as two vectors, not four: the same in eval mode, not to be trained.",
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use the first N examples only.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"codeword {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make trained networks small by weight sharing: one dial in, one small verified file out, and back."""


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(metavar="IN", help="safetensors (also an index), or a torch checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.cw", help="The file to write.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="30x (float32 bytes over file bytes), 120KB, or 2.5bpw; 8x if not given."),
    ] = None,
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
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Approximate these tensors only.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Keep these tensors losslessly.")] = None,
    fold_norms: FoldNorms = True,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of whatever is random in a method.")] = 0,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; the file does not depend on it.")] = 1,
    keep_nonfinite: Annotated[
        bool, typer.Option("--keep-nonfinite", help="Keep tensors with NaN or infinity losslessly, do not refuse them.")
    ] = False,
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
        if (model is None) != (data is None):
            raise typer.BadParameter("--model and --data go together: give both or neither")
        if limit is not None and data is None:
            raise typer.BadParameter("--limit is about --data, which is not given")
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


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(metavar="IN", help="safetensors (also an index), or a torch checkpoint.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="30x (float32 bytes over file bytes), 120KB, or 2.5bpw; 8x if not given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN.toml", help="Write the plan, for compress --plan.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Approximate these tensors only.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Keep these tensors losslessly.")] = None,
    fold_norms: FoldNorms = True,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of whatever is random in a method.")] = 0,
    keep_nonfinite: Annotated[
        bool, typer.Option("--keep-nonfinite", help="Keep tensors with NaN or infinity losslessly, do not refuse them.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="The net of IN, to run --data through; needs --data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Images by which errors cancel, labels unused; needs --model.")
    ] = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Show the plan for a target and what it will come to, without compressing: a dry run.

    Bytes, error, time and memory are predicted from one pass over the weights; docs/results.md says how well.

    Example: `codeword plan model.safetensors --target 30x -o plan.toml`
    """
    with reported(as_json):
        if (model is None) != (data is None):
            raise typer.BadParameter("--model and --data go together: give both or neither")
        if limit is not None and data is None:
            raise typer.BadParameter("--limit is about --data, which is not given")
        original = open_source(source)
        console.check_writable(out, *files_of(original))
        rest: dict[str, Any] = {}
        if model is not None and data is not None:
            from codeword.nets import load_net

            rest = {"data": load_data(data, limit=limit), "net": load_net(model, original)}
        with console.progress(("measuring weights",)) as progress:
            found = dry_run(
                original,
                target,
                include=include or (),
                exclude=exclude or (),
                fold_norms=fold_norms,
                seed=seed,
                keep_nonfinite=keep_nonfinite,
                progress=progress,
                **rest,
            )
        if out is not None:
            Plan.from_dict(found.plan).save(out)
        if as_json:
            console.print_json({"input": source, "output": out} | msgspec.to_builtins(found))
        else:
            show.forecast(found, out)
        if found.missed is not None:
            if not as_json:
                console.warn(found.missed)
            raise typer.Exit(6)


@app.command()
def inspect(file: File, against: Against = None, as_json: Json = False) -> None:
    """Show what each tensor of a file is and takes; with the original, also how close it is.

    Example: `codeword inspect model.cw --against model.safetensors`
    """
    with reported(as_json), console.working("reading"):
        found = api.inspect(file, against)
    if as_json:
        console.print_json({"file": file, "against": against} | msgspec.to_builtins(found))
        return
    show.inspected(found, compared=against is not None)


@app.command()
def verify(file: File, against: Against = None, as_json: Json = False) -> None:
    """Read every byte of a file and check it; with the original, also names, shapes, dtypes and integers.

    Example: `codeword verify model.cw --against model.safetensors`
    """
    with reported(as_json), console.working("verifying"), api.load(file) as artifact:
        differences = api.verify(artifact, against)
        tensors, nbytes = len(artifact), artifact.nbytes
    if as_json:
        facts = {"file": file, "against": against, "ok": not differences, "tensors": tensors, "nbytes": nbytes}
        console.print_json(facts | {"differences": msgspec.to_builtins(differences)})
    elif not differences:
        compared = f", compared with {against}" if against is not None else ""
        console.say(f"{file}: {tensors} tensors in {nbytes:,} bytes, all checksums right{compared}: verified")
    for found in () if as_json else differences:
        console.say(f"{found.tensor} {found.what}")
    if differences:
        raise typer.Exit(1)


@app.command()
def decompress(
    file: File,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.safetensors", help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write the dense net as safetensors, in the dtypes it came with.

    Example: `codeword decompress model.cw -o dense.safetensors`
    """
    with reported(as_json), console.working("decoding"), api.load(file) as artifact:
        console.check_writable(out, file)
        api.decompress(artifact, out)
        facts = {"file": file, "output": out, "nbytes": artifact.nbytes, "output_nbytes": out.stat().st_size}
        facts["tensors"] = len(artifact)
    if as_json:
        console.print_json(facts)
    else:
        console.say(f"{out}: {facts['tensors']} tensors, {facts['output_nbytes']:,} bytes (from {facts['nbytes']:,})")


def _per_channel(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.49,0.48,0.45") from None


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE|CHECKPOINT", help="A .cw file, or a checkpoint.")],
    model: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="The net, such as codeword.zoo:lenet5.")],
    data: Annotated[
        str, typer.Option(metavar="SPEC", help="mnist:test, cifar10:test, digits, npz:PATH ($CODEWORD_DATA).")
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="The uncompressed net, to score on the same images.")
    ] = None,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Examples at a time.")] = 500,
    mean: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per channel, if the net needs it.")] = None,
    std: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per channel, if the net needs it.")] = None,
    as_json: Json = False,
) -> None:
    """Score a net on labelled data, compressed or not; with the original, both on the same images.

    Example: `codeword eval model.cw --model codeword.zoo:lenet5 --data digits --against model.safetensors`
    """
    options: dict[str, Any] = {"batch_size": batch_size, "mean": _per_channel(mean), "std": _per_channel(std)}
    with reported(as_json), console.working("evaluating"):
        dataset = load_data(data, limit=limit)
        from codeword.nets import load_net

        net = load_net(model, file)
        if against is None:
            score = api.evaluate(net, dataset, **options)
            facts = {"top1": score.top1, "top5": score.top5, "n": score.n, "seconds": score.seconds}
        else:
            from codeword.demo import compare

            found = compare(load_net(model, against), net, dataset, **options)
            facts = {key: value for key, value in msgspec.to_builtins(found).items() if key != "data"}
    facts = {"file": file, "against": against, "nbytes": file.stat().st_size, "data": data} | facts
    if as_json:
        console.print_json(facts)
        return
    if against is not None:
        show.compared(facts)
        return
    top5 = "" if facts["top5"] is None else f", top-5 {facts['top5']:.2f} %"
    console.say(f"{file}: top-1 {facts['top1']:.2f} %{top5} on {facts['n']:,} examples of {data}")
    console.say("add --against CHECKPOINT to score another net, such as the uncompressed one, on the same images")


@app.command()
def sweep(
    source: Annotated[Path, typer.Argument(metavar="IN", help="safetensors (also an index), or a torch checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write to.")],
    model: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="The net of IN, such as codeword.zoo:lenet5.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="Labelled test images to score on, as for eval.")],
    limit: Limit = None,
    targets: Annotated[str, typer.Option(metavar="SIZE,...", help="As for compress.")] = ",".join(TARGETS),
    calibrate: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Images by which errors cancel; not those to score on.")
    ] = None,
    calibrate_limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first N examples of --calibrate only.")
    ] = None,
    peers: Annotated[
        str,
        typer.Option(metavar="NAME,...", help=f"all, none, or of {', '.join(PEERS)}; it says which are not installed."),
    ] = "all",
    again: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Make points of codeword, or of a peer, again.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of whatever is random in a method.")] = 0,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; the files do not depend on it.")] = 1,
    as_json: Json = False,
) -> None:
    """Draw the front of a net: bytes of files against accuracy, with other tools on the same axes.

    DIR gets a file for each target, front.json, front.md and front.png. A point that stands in front.json already is
    not made again, so that a run which was stopped goes on, and targets or peers can be added.

    Example: `codeword sweep model.safetensors --model codeword.zoo:resnet20 --data cifar10:test --calibrate
    cifar10:train --calibrate-limit 1024 -o front`
    """
    with reported(as_json):
        if calibrate_limit is not None and calibrate is None:
            raise typer.BadParameter("--calibrate-limit is about --calibrate, which is not given")
        report.need_pictures()
        chosen = {"all": tuple(PEERS), "none": ()}.get(peers, tuple(name.strip() for name in peers.split(",")))
        from codeword.nets import load_net

        original = open_source(source)
        with console.progress(("measuring weights", "coding")) as progress:

            def on_row(front: Front, row: Row) -> None:
                progress.line(show.point(front, row))
                progress.phase("going on")

            found = run_sweep(
                original,
                [text.strip() for text in targets.split(",")],
                data=load_data(data, limit=limit),
                net=load_net(model, original),
                calibrate=None if calibrate is None else load_data(calibrate, limit=calibrate_limit),
                peers=chosen,
                folder=out,
                again=again or (),
                seed=seed,
                workers=workers,
                progress=progress,
                on_row=on_row,
            )
        files = {"json": out / RECORD} | report.write_front(out, found)
    if as_json:
        console.print_json(facts_of(found) | {"files": files})
    else:
        show.front(found, files)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write to.")] = Path("demo"),
    target: Annotated[str, typer.Option(metavar="SIZE", help="As for compress.")] = "30x",
    as_json: Json = False,
) -> None:
    """Compress the bundled LeNet-5 without data or retraining, read it back, score it, write a report.

    Example: `codeword demo`
    """
    with reported(as_json):
        from codeword.demo import run_demo

        with console.progress(("measuring weights", "coding")) as progress:
            found = run_demo(out, target, progress=progress)
    facts = msgspec.to_builtins(found)
    if as_json:
        console.print_json(facts)
    else:
        show.demonstrated(found)
    if found.differences or found.missed is not None:
        raise typer.Exit(1 if found.differences else 6)


def main() -> None:
    """The entry point of `codeword`."""
    app(prog_name="codeword")


if __name__ == "__main__":
    main()
