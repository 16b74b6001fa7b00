"""An artifact's tensors in torch, and the check that a model and an artifact fit each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.errors import MismatchError
from codeword.expr import DTYPES, FLOATS, dtype_name

_SHOWN = 10  # names a message lists of each kind
# BatchNorm's counter matters to training with momentum=None only, and checkpoints from before torch 0.4.1 lack it.
_OPTIONAL = "num_batches_tracked"


class Place(NamedTuple):
    """One tensor of a model and where its values are found."""

    names: tuple[str, ...]  # every name the model knows it by: more than one if it is tied
    tensor: Tensor
    source: str | None  # name in the artifact; None for a counter that the artifact does without


def state_dict(artifact: Artifact) -> dict[str, Tensor]:
    """Every tensor decoded, on the CPU, in the shape and dtype it was compressed with; tied tensors share memory.

    The tensors are the caller's own. Raises FormatError if the file is corrupted.
    """
    state: dict[str, Tensor] = {}
    for name, entry in artifact.entries.items():
        if entry.tied_to is not None:
            state[name] = state[entry.tied_to].reshape(entry.shape)  # a view: what was decoded is contiguous
        else:
            state[name] = as_tensor(artifact.decode(name))
    return state


@torch.no_grad()
def load_into(model: nn.Module, artifact: Artifact) -> None:
    """Set a model's parameters and buffers to the decoded values; its dtypes and devices are kept.

    Raises MismatchError, with nothing changed, if they do not fit each other; FormatError if a tensor of the file is
    corrupted, those before it being set already (tensors are read one at a time, whatever the net's size).
    """
    for place in fit(model, artifact):
        if place.source is not None:
            place.tensor.copy_(as_tensor(artifact.decode(place.source)))


def fit(model: nn.Module, artifact: Artifact) -> list[Place]:
    """Every tensor of a model's state dict with the artifact's tensor for it. Changes nothing, reads no payload.

    A tied tensor needs one of its names in the file (checkpoints often drop the others). Raises MismatchError that
    names the tensors missing in the file, those the model does not have, and those that differ in shape or kind.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):  # modules may put any other object there, as "_extra_state"
            names.setdefault(id(value), []).append(name)
            tensors[id(value)] = value
    _check_materialized(names, tensors)

    places: list[Place] = []
    missing: list[str] = []
    differing: list[str] = []
    for key, tensor in tensors.items():
        found = [name for name in names[key] if name in artifact.entries]
        places.append(Place(tuple(names[key]), tensor, found[0] if found else None))
        if not found and not names[key][0].endswith(_OPTIONAL):
            missing.append(f"{names[key][0]} {tuple(tensor.shape)}")
        for name in found:
            entry = artifact.entries[name]
            if entry.shape != tuple(tensor.shape):
                differing.append(f"{name} is {tuple(tensor.shape)} in the model, {entry.shape} in the file")
            elif (entry.dtype in FLOATS) != tensor.is_floating_point():
                differing.append(f"{name} is {_torch_name(tensor)} in the model, {entry.dtype} in the file")
    known = {name for group in names.values() for name in group}
    unknown = [f"{name} {entry.shape}" for name, entry in artifact.entries.items() if name not in known]
    _raise_mismatch(model, missing, unknown, differing)
    return places


def as_tensor(array: np.ndarray) -> Tensor:
    """A CPU tensor of an array's values, shape and dtype, in memory of its own. Raises ExprError for other dtypes."""
    name = dtype_name(array.dtype)
    # Bytes by way of uint8: torch takes no bfloat16 or float8 from NumPy. Flat, as a 0-d view cannot change its width.
    flat = np.array(array, DTYPES[name], order="C").reshape(-1)
    return torch.from_numpy(flat.view(np.uint8)).view(torch_dtype(name)).reshape(array.shape)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a name in `expr.DTYPES`."""
    return getattr(torch, "float8_e4m3fn" if name == "float8_e4m3" else name)


def _torch_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_materialized(names: dict[int, list[str]], tensors: dict[int, Tensor]) -> None:
    """Raises MismatchError for tensors that have no memory to set."""
    for key, tensor in tensors.items():
        name = names[key][0]
        if nn.parameter.is_lazy(tensor):
            raise MismatchError(f"the model's {name} has no shape yet; run the model once on an input first")
        if tensor.is_meta:
            raise MismatchError(
                f"the model's {name} is on the meta device, which holds no values; "
                'give it memory first: model.to_empty(device="cpu")'
            )


def _raise_mismatch(model: nn.Module, missing: list[str], unknown: list[str], differing: list[str]) -> None:
    """Raises MismatchError if any of the three lists of tensors has an item."""
    parts = [
        f"{what} ({len(found)}): {', '.join(found[:_SHOWN])}"
        + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        for what, found in (
            ("missing in the file", missing),
            ("not in the model", unknown),
            ("different", differing),
        )
        if found
    ]
    if not parts:
        return
    if missing and unknown and all(name.startswith(("module.", "_orig_mod.")) for name in missing):
        way_out = "the model is wrapped: give the inner one (model.module, or model._orig_mod after torch.compile)"
    else:
        way_out = "build the model with the options it was compressed with, or compress a checkpoint of this model"
    raise MismatchError(f"the {type(model).__name__} and the file do not fit; {'; '.join(parts)}. Way out: {way_out}")
