"""The arguments that more than one verb takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Checkpoint = Annotated[Path, typer.Argument(metavar="IN", help="safetensors (also an index), or a torch checkpoint.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="30x (float32 bytes over file bytes), 120KB, or 2.5bpw; 8x if not given."),
]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Approximate these tensors only.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Keep these tensors losslessly.")]
KeepNonfinite = Annotated[
    bool, typer.Option("--keep-nonfinite", help="Keep tensors with NaN or infinity losslessly, do not refuse them.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of whatever is random in a method.")]


def check_data(model: str | None, data: str | None, limit: int | None) -> None:
    """Raises BadParameter for a net without data to run through it, or the other way round."""
    if (model is None) != (data is None):
        raise typer.BadParameter("--model and --data go together: give both or neither")
    if limit is not None and data is None:
        raise typer.BadParameter("--limit is about --data, which is not given")
