"""Batch norms folded: of the four vectors of a norm two become constants, and what the net computes stays.

In eval mode a batch norm gives weight * (x - mean) / sqrt(var + eps) + bias. With mean 0 and var 1 it gives the same
for weight * sqrt((1 + eps) / (var + eps)) and bias - weight * mean / sqrt(var + eps): two vectors to store, not four.
In training mode it does not, for there the statistics of the batch stand for mean and var.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from codeword.expr import FLOATS
from codeword.sources import Source, TensorInfo

METADATA = "folded_norms"  # where a file says which norms are folded and with what eps
_EPS = 1e-5  # what frameworks take, and what is assumed where no module tells
_MOST_EPS = 1e-3  # what some nets have
_HARMLESS = 2.0**-8  # of a norm's output, root of mean square: an error by a wrong eps that nobody will notice


class Norm(NamedTuple):
    """The names of the tensors of a batch norm."""

    weight: str
    bias: str
    running_mean: str
    running_var: str


def norms_of(infos: tuple[TensorInfo, ...]) -> dict[str, Norm]:
    """Batch norms by their place in the net: those of four vectors of one shape and dtype that nothing is tied to."""
    tied = {info.tied_to for info in infos}
    known = {
        info.name: (info.shape, info.dtype)
        for info in infos
        if info.dtype in FLOATS
        and len(info.shape) == 1
        and info.size
        and info.tied_to is None
        and info.name not in tied
    }
    found: dict[str, Norm] = {}
    for name, kind in known.items():
        place, _, part = name.rpartition(".")
        norm = _norm(place)
        if part == "running_var" and all(known.get(each) == kind for each in norm):
            found[place] = norm
    return found


def eps_of(model: Any) -> dict[str, float] | None:  # noqa: ANN401
    """What the batch norms of a module add to their variance, by place; None of what is no module."""
    if not hasattr(model, "named_modules"):
        return None
    from torch.nn.modules.batchnorm import _BatchNorm

    return {name: float(module.eps) for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def foldable(source: Source, lossy: set[str], eps: Mapping[str, float] | None) -> dict[str, float]:
    """Place and eps of the norms that can be folded, all four of whose tensors may change.

    eps: of norms, as their modules say. Without it 1e-5 is assumed, and norms are left alone where an eps of up to
    1e-3 would make a difference that counts.
    """
    found: dict[str, float] = {}
    for place, norm in norms_of(source.infos).items():
        if not lossy.issuperset(norm) or (eps is not None and place not in eps):
            continue
        weight, bias, mean, var = (source.load(name).astype(np.float64) for name in norm)
        chosen = _EPS if eps is None else eps[place]
        if not all(np.isfinite(values).all() for values in (weight, bias, mean, var)) or (var + chosen <= 0).any():
            continue
        if eps is None:
            right = np.sqrt((var + chosen) / (1 + chosen))
            wrong = np.sqrt((var + _MOST_EPS) / (1 + _MOST_EPS))
            off = weight * (1 + np.abs(mean) / np.sqrt(var + chosen)) * (wrong / right - 1)
            if np.sqrt(np.mean(off**2)) > _HARMLESS * np.sqrt(np.mean(weight**2)):
                continue
        if all(np.isfinite(values).all() for values in _folded(source, norm, chosen)):
            found[place] = chosen
    return found


@dataclass(frozen=True, slots=True)
class Folded:
    """A source with some of its norms folded."""

    source: Source
    eps: Mapping[str, float]  # of the folded norms, by place

    @property
    def location(self) -> str:
        """That of the source."""
        return self.source.location

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Those of the source."""
        return self.source.infos

    @property
    def norms(self) -> Iterator[Norm]:
        """The folded norms."""
        return map(_norm, self.eps)

    def load(self, name: str) -> np.ndarray:
        """A tensor of the source, or what folding makes of it."""
        place, _, part = name.rpartition(".")
        if place not in self.eps or part not in Norm._fields:
            return self.source.load(name)
        return _folded(self.source, _norm(place), self.eps[place])[Norm._fields.index(part)]

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of them: one eps if it is that of all norms there are, else the places of each."""
        if not self.eps:
            return {}
        if len(set(self.eps.values())) == 1 and self.eps.keys() == norms_of(self.infos).keys():
            return {METADATA: repr(next(iter(self.eps.values())))}
        places: dict[str, list[str]] = {}
        for place, eps in self.eps.items():
            places.setdefault(repr(eps), []).append(place)
        return {METADATA: json.dumps(places, separators=(",", ":"))}


def as_stored(original: Source, metadata: Mapping[str, str]) -> Source:
    """The net that a file was made from, folded as the file's metadata say that it is."""
    text = metadata.get(METADATA)
    if text is None:
        return original
    norms = norms_of(original.infos)
    try:
        told = json.loads(text)
        pairs = told.items() if isinstance(told, dict) else [(told, list(norms))]
        eps = {place: float(value) for value, places in pairs for place in places if place in norms}
    except (TypeError, ValueError):
        return original  # somebody else's metadata under this name
    return Folded(original, eps)


def _norm(place: str) -> Norm:
    return Norm(*(f"{place}.{field}" if place else field for field in Norm._fields))


def _folded(source: Source, norm: Norm, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four vectors of a folded norm, in their dtype."""
    weight, bias, mean, var = (source.load(name) for name in norm)
    dtype, scale = weight.dtype, weight.astype(np.float64) / np.sqrt(var.astype(np.float64) + eps)
    shift = bias.astype(np.float64) - scale * mean.astype(np.float64)
    with np.errstate(over="ignore"):
        new = (scale * np.sqrt(1 + eps)).astype(dtype), shift.astype(dtype)
    return *new, np.zeros_like(mean), np.ones_like(var)
