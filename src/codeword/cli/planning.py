"""`codeword plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from codeword import console, show
from codeword.cli.options import (
    Checkpoint,
    Exclude,
    FoldNorms,
    Include,
    Json,
    KeepNonfinite,
    Limit,
    Seed,
    Size,
    check_data,
)
from codeword.console import reported
from codeword.data import load_data
from codeword.forecast import dry_run
from codeword.plan import Plan
from codeword.sources import files_of, open_source


def plan(
    source: Checkpoint,
    target: Size = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN.toml", help="Write the plan, for compress --plan.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    fold_norms: FoldNorms = True,
    seed: Seed = 0,
    keep_nonfinite: KeepNonfinite = False,
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
        check_data(model, data, limit)
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
