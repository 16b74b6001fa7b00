"""`codeword sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codeword import console, report, show
from codeword.cache import Cache
from codeword.cli.options import Checkpoint, Json, Limit, NoCache, Seed
from codeword.console import reported
from codeword.data import load_data
from codeword.front import Front, Row
from codeword.peers import PEERS
from codeword.sources import open_source
from codeword.sweep import RECORD, TARGETS, facts_of
from codeword.sweep import sweep as run_sweep


def sweep(
    source: Checkpoint,
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
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; the files do not depend on it.")] = 1,
    no_cache: NoCache = False,
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
                cache=Cache.of(not no_cache, console.warn),
                progress=progress,
                on_row=on_row,
            )
        files = {"json": out / RECORD} | report.write_front(out, found)
    if as_json:
        console.print_json(facts_of(found) | {"files": files})
    else:
        show.front(found, files)
