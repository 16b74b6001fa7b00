"""A model that runs from its compressed weights: `swap(model, artifact)`, and what became of each tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.errors import MismatchError
from codeword.expr import Affine, Expr, Permute, Raw, Reshape, shape
from codeword.nn.modules import CodedModule, coded_form
from codeword.nn.state import Place, as_tensor, fit
from codeword.nn.twin import TorchExpr

_REPORT = "_codeword_swap_report"
_CODED = "coded"


def swap(model: nn.Module, artifact: Artifact) -> nn.Module:
    """A copy of `model` with the artifact's weights: Linear, Conv and Embedding weights run from their expressions.

    Weights that the file holds raw, and tensors of other modules, become dense decoded values; `swap_report` says
    which and why. Tensors tied in the model or the file share one TorchExpr. Dtypes, devices, mode and requires_grad
    are the model's; the model itself is not changed. Raises MismatchError if the two do not fit each other,
    FormatError if the file is corrupted.
    """

    def make(source: str, _: Tensor) -> TorchExpr:
        return TorchExpr(artifact[source], rounded_to=artifact.entries[source].dtype)

    return swap_with(model, artifact, make)[0]


class Swapped(NamedTuple):
    """What became of one tensor."""

    place: Place  # of the model that was given
    why_dense: str | None  # None if it runs from its expression


def swap_with(
    model: nn.Module, artifact: Artifact, make: Callable[[str, Tensor], TorchExpr]
) -> tuple[nn.Module, list[Swapped]]:
    """`swap` with expressions from `make`, called once for each, with its name in the file and the model's tensor."""
    places = fit(model, artifact)
    reasons = [_why_dense(model, artifact, place) for place in places]
    # The weights that run coded are never copied: the copy refers to the model's own until it drops them.
    kept = {id(place.tensor): place.tensor for place, why in zip(places, reasons, strict=True) if why is None}
    swapped = copy.deepcopy(model, dict(kept))
    tensors = swapped.state_dict(keep_vars=True)
    twins: dict[str, TorchExpr] = {}
    for place, why in zip(places, reasons, strict=True):
        if place.source is None:
            continue
        if why is not None:
            # One name sets all: tensors that are tied in the model are tied in its copy.
            with torch.no_grad():
                tensors[place.names[0]].copy_(as_tensor(artifact.decode(place.source)))
            continue
        root = root_of(artifact, place.source)
        twin = twins[root] if root in twins else twins.setdefault(root, make(root, place.tensor))
        if not place.tensor.requires_grad:
            twin.requires_grad_(False)
        for name in place.names:
            layer = swapped.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, CodedModule):  # a layer that stands in two places of the model has two names
                CodedModule.take(layer, twin)
    report = {
        name: _CODED if why is None else f"dense: {why}"
        for place, why in zip(places, reasons, strict=True)
        for name in place.names
    }
    setattr(swapped, _REPORT, report)
    return swapped, [Swapped(*item) for item in zip(places, reasons, strict=True)]


def swap_report(model: nn.Module) -> dict[str, str]:
    """What `swap` made of each tensor, by its name before: "coded", or "dense: " and why.

    Raises MismatchError if the model does not come from `swap`.
    """
    report = getattr(model, _REPORT, None)
    if report is None:
        raise MismatchError(f"this {type(model).__name__} does not come from swap; call swap(model, artifact) first")
    return dict(report)


def _why_dense(model: nn.Module, artifact: Artifact, place: Place) -> str | None:
    """Why a tensor is held dense, None if it runs from its expression."""
    if place.source is None:
        return "not in the file"
    entry = artifact.entries[place.source]
    if entry.tied_to is not None:
        entry = artifact.entries[entry.tied_to]
    if entry.skeleton is None or _is_raw(entry.skeleton):
        return "raw"
    # All names of a tied tensor or none: half of them coded would untie what trains as one.
    for name in place.names:
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        if coded_form(layer) is None:
            return f"module type {type(layer).__name__} has no coded form"
        if leaf != "weight":
            return f"{leaf} of {type(layer).__name__} has no coded form"
    return None


def _is_raw(expr: Expr) -> bool:
    match expr:
        case Raw():
            return True
        case Reshape(inner) | Permute(inner):
            return _is_raw(inner)
        case Affine(Raw() as inner):  # whole numbers of a step; of a matrix they are worth running from
            return len(shape(inner)) < 2
        case _:
            return False


def root_of(artifact: Artifact, source: str) -> str:
    """The tensor of the file whose expression serves this one: one for all that are tied there and have one shape."""
    entry = artifact.entries[source]
    root = entry.tied_to or source
    return root if artifact.entries[root].shape == entry.shape else source
