"""`codeword demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from codeword import console, show
from codeword.cli.options import Json
from codeword.console import reported


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
