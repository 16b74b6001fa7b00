"""Facts of a file, measured on it: bytes from its streams, errors from decoded tensors, nothing from a formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from codeword.artifact import Artifact, Entry
from codeword.errors import MismatchError
from codeword.expr import Affine, Expr, Lookup, Permute, Raw, Reshape, Scatter, Sum, lookups, shape
from codeword.expr import is_float as has_float_dtype
from codeword.fold import as_stored
from codeword.sources import Source


class TensorReport(msgspec.Struct, frozen=True):
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str  # what the expression is: "shared", "shared, scaled rows; codebook in NAME", "raw", "tied to NAME", ...
    n_clusters: int | None  # codewords of the largest codebook
    sparsity: float  # share of decoded values that are zero, 0..1
    nbytes: int  # streams and checksum in the file
    bits_per_weight: float
    sqnr_db: float | None  # against the original, if it was given; None also stands for an exact copy (see exact)
    exact: bool | None  # whether every bit is the original's; None without an original


class Report(msgspec.Struct, frozen=True):
    """A whole file. Sizes in bytes."""

    nbytes: int
    container_nbytes: int
    dense_nbytes: int
    ratio: float
    bits_per_weight: float
    metadata: dict[str, str]
    tensors: list[TensorReport]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something `verify` found that should not be."""

    tensor: str
    what: str


def inspect(artifact: Artifact, original: Source | None = None) -> Report:
    """Measure a file, tensor by tensor; with an original also the error of each. Reads and decodes everything.

    An original's norms are folded as those of the file are. Raises FormatError for a corrupted tensor, MismatchError if
    the original lacks a tensor or has another shape.
    """
    original = None if original is None else as_stored(original, artifact.metadata)
    return Report(
        nbytes=artifact.nbytes,
        container_nbytes=artifact.container_nbytes,
        dense_nbytes=artifact.dense_nbytes,
        ratio=artifact.ratio,
        bits_per_weight=artifact.bits_per_weight,
        metadata=dict(artifact.metadata),
        tensors=[_tensor(artifact, name, original) for name in artifact],
    )


def _tensor(artifact: Artifact, name: str, original: Source | None) -> TensorReport:
    entry = artifact.entries[name]
    dense = artifact.decode(name)
    sqnr, exact = (None, None) if original is None else _compare(dense, _original(original, name, dense.shape))
    expr = artifact[name]
    codebooks = [lookup.codebook.shape[1] for lookup in lookups(expr)]
    return TensorReport(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        method=_method(artifact, entry, expr),
        n_clusters=max(codebooks, default=None),
        sparsity=float(np.count_nonzero(dense == 0)) / max(dense.size, 1),
        nbytes=entry.nbytes,
        bits_per_weight=8 * entry.nbytes / max(entry.size, 1),
        sqnr_db=sqnr,
        exact=exact,
    )


def _method(artifact: Artifact, entry: Entry, expr: Expr) -> str:
    if entry.tied_to is not None:
        return f"tied to {entry.tied_to}"
    parts: dict[int, list[str]] = {}
    for leaf in entry.leaves:
        if leaf.lender is not None:  # the last word of a path says what a leaf is
            parts.setdefault(leaf.lender.tensor, []).append(leaf.path.rpartition(".")[2])
    names = list(artifact) if parts else []
    borrowed = (f"{', '.join(dict.fromkeys(each))} in {names[lender]}" for lender, each in parts.items())
    return "; ".join([describe(expr), *borrowed])


def describe(expr: Expr) -> str:
    """An expression in the words of the field, from the outside in."""
    match expr:
        case Raw():
            return "raw"
        case Lookup(codes, codebook):
            kind = "shared" if codebook.shape[2] == 1 else f"shared vectors of {codebook.shape[2]}"
            groups, rows = codes.shape[:2]
            return kind if groups == 1 else f"{kind}, a codebook per {'row' if rows == 1 else f'{rows} rows'}"
        case Affine(Raw(values), _, None) if values.dtype.kind == "i":
            return "fixed point"
        case Affine(inner, scale, offset):
            what = describe(inner)
            if offset is not None:
                what += ", offset"
            if scale is None or scale.size == 1:
                return what  # one step for all is part of the codebook
            if scale.dtype.kind in "ub" and scale.shape == shape(inner) and not np.any(scale > 1):
                return f"pruned, {what}"  # a mask
            rows = scale.size == scale.shape[0]
            return f"{what}, scaled {'rows' if rows else 'kernels'}"
        case Sum(terms):
            return " + ".join(describe(term) for term in terms)
        case Scatter(inner=inner):
            return f"pruned, {describe(inner)}"
        case Permute(inner) | Reshape(inner):
            return describe(inner)


def verify(artifact: Artifact, original: Source | None = None) -> Iterator[Difference]:
    """Read, check and decode every tensor, and compare with an original: what must not differ and does.

    Names, shapes and dtypes must be the same; integer tensors must be equal; what was finite must be finite. How close
    the floats are is no matter of right or wrong: `inspect` measures it. Raises FormatError for a corrupted file.
    """
    for name in artifact:
        dense = artifact.decode(name)
        if original is None:
            continue
        info = next((info for info in original.infos if info.name == name), None)
        if info is None:
            yield Difference(name, f"is not in {original.location}")
        elif (info.shape, info.dtype) != (artifact.entries[name].shape, artifact.entries[name].dtype):
            mine = artifact.entries[name]
            yield Difference(name, f"is {mine.dtype} {mine.shape}, the original {info.dtype} {info.shape}")
        elif not has_float_dtype(dense):
            if not np.array_equal(dense, original.load(name)):
                yield Difference(name, f"holds {info.dtype} values that differ from the original's")
        elif _nonfinite(dense) > _nonfinite(original.load(name)):
            yield Difference(name, "holds NaN or infinity that the original does not")
    if original is not None:
        for info in original.infos:
            if info.name not in artifact:
                yield Difference(info.name, "is missing from the file")


def _original(original: Source, name: str, dims: tuple[int, ...]) -> np.ndarray:
    info = next((info for info in original.infos if info.name == name), None)
    if info is None or info.shape != dims:
        found = "no such tensor" if info is None else f"shape {info.shape}"
        raise MismatchError(
            f"tensor {name!r} has shape {dims} in the file, {original.location} has {found}; "
            "compare with the checkpoint the file was made from"
        )
    return original.load(name)


def _compare(dense: np.ndarray, original: np.ndarray) -> tuple[float | None, bool]:
    if dense.dtype == original.dtype and dense.tobytes() == original.tobytes():
        return None, True
    signal = noise = 0.0
    for at in range(0, dense.size, 1 << 20):  # in pieces: float64 copies of a large tensor would be the peak of memory
        a = original.reshape(-1)[at : at + (1 << 20)].astype(np.float64)
        b = dense.reshape(-1)[at : at + (1 << 20)].astype(np.float64)
        signal += float(a @ a)
        noise += float((a - b) @ (a - b))
    if not 0 < noise < math.inf:  # a file may decode to infinity or NaN where the original does not: `verify` tells
        return None, False
    return (10 * math.log10(signal / noise) if signal > 0 else None), False


def _nonfinite(values: np.ndarray) -> int:
    with np.errstate(over="ignore"):
        return int(np.count_nonzero(~np.isfinite(values.reshape(-1).astype(np.float32))))
