"""A net of the user's own factory with the weights of a file: what the command line runs and calibrates on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from codeword import api
from codeword.artifact import Artifact
from codeword.artifact.layout import MAGIC
from codeword.errors import SourceError
from codeword.evaluate import load_factory
from codeword.sources import Source, open_source

if TYPE_CHECKING:
    from torch import nn


def load_net(factory: str, weights: Path | Source) -> nn.Module:
    """The net that "module:factory" makes, with the weights of a .cw file, which it runs from, or of a checkpoint.

    Raises SourceError, FormatError, MismatchError.
    """
    # The file before the factory: a wrong path is told at once, and a large net may take long to make.
    opened = api.load(weights) if isinstance(weights, Path) and is_coded(weights) else _Dense(open_source(weights))
    model = load_factory(factory)()
    from torch import nn

    from codeword.nn import load_into

    if not isinstance(model, nn.Module):
        raise SourceError(f"{factory!r} made a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(opened, Artifact):
        with opened:
            return api.swap(model, opened)
    load_into(model, cast(Artifact, opened))  # it asks for entries and decode only
    return model


def is_coded(path: Path) -> bool:
    """Whether a path is a .cw file: by its first bytes, or by its name if they cannot tell."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".cw"
    except OSError:
        return path.suffix == ".cw"


class _Dense:
    """A checkpoint as `nn.load_into` reads an artifact: what there is, and the values one at a time."""

    def __init__(self, source: Source) -> None:
        self.entries = {info.name: info for info in source.infos}
        self.decode = source.load
