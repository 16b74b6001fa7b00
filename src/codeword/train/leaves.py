"""The leaves of an expression as training sees them: what each is, how far weights follow it, how the file holds it.

One path for every method: nothing here asks who made the expression. A leaf trains as a parameter in float32, in units
in which it moves weights about as much as a weight itself would, and what runs is that parameter rounded to what the
file can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from codeword.expr import (
    DTYPES,
    FLOATS,
    Affine,
    Expr,
    Lookup,
    Permute,
    Raw,
    Reshape,
    Scatter,
    Sum,
    decode,
    is_float,
    shape,
)
from codeword.methods.base import whole_steps
from codeword.nn.state import torch_dtype

# codebook: codewords, templates. step: one factor for all. scale: one for each row. gain: one for fewer weights than a
# row. offset: what is added. raw: values that share nothing.
Kind: TypeAlias = Literal["codebook", "step", "scale", "gain", "offset", "raw"]
KINDS: tuple[Kind, ...] = ("codebook", "step", "scale", "gain", "offset", "raw")

_ROOM = 1.25  # codewords may grow so far beyond the largest
_FINE = 4  # steps between neighbouring codewords in 8 bits that are worth them
_FINER = 16  # and in 16 bits, which take more bytes anyway
_TELLING = 4  # distinct mantissas that tell to how many bits values are rounded


class Leaf(NamedTuple):
    """A leaf that may train."""

    path: str
    kind: Kind
    values: np.ndarray
    pull: np.ndarray  # float64, of values' shape: sum over the weights of the squared change that a change of it makes
    reach: int  # weights below its node, which all of it serves together


def trainable(expr: Expr, pull: np.ndarray | None = None, path: str = "") -> Iterator[Leaf]:
    """Every leaf that gradients can move, in the order of `expr.leaves`; masks and codes are none.

    pull: broadcasts to expr's shape, the squared change of the weight that each value of expr makes; None for 1.
    """
    full = shape(expr)
    h = np.ones((1,) * len(full)) if pull is None else pull
    reach = math.prod(full)
    match expr:
        case Raw(values):
            if is_float(values):
                yield Leaf(f"{path}values", "raw", values, np.broadcast_to(h, full), reach)
        case Lookup(codes, codebook):
            if is_float(codebook) or codebook.dtype.kind == "i":
                yield Leaf(f"{path}codebook", "codebook", codebook, _members(codes, codebook, h), reach)
        case Affine(inner, scale, offset):
            s = None if scale is None else scale.astype(np.float64)
            under = h if s is None else h * s * s
            yield from trainable(inner, under, f"{path}inner.")
            if isinstance(inner, Raw) and inner.values.dtype.kind == "i" and s is not None:
                yield Leaf(f"{path}inner.values", "raw", inner.values, np.broadcast_to(under, full), reach)
            if scale is not None and is_float(scale):
                pulled = h * np.square(decode(inner).astype(np.float64))
                yield Leaf(f"{path}scale", _kind(scale, full), scale, _summed_to(pulled, scale.shape), reach)
            if offset is not None and is_float(offset):
                pulled = _summed_to(np.broadcast_to(h, full), offset.shape)
                yield Leaf(f"{path}offset", "offset", offset, pulled, reach)
        case Sum(terms):
            for index, term in enumerate(terms):
                yield from trainable(term, h, f"{path}terms[{index}].")
        case Scatter(_, positions, inner):
            some = h if h.size == 1 else np.broadcast_to(h, full)[positions]
            yield from trainable(inner, _shaped(some, some.shape, shape(inner)), f"{path}inner.")
        case Permute(inner, order):
            yield from trainable(inner, h.transpose(tuple(np.argsort(order))), f"{path}inner.")
        case Reshape(inner):
            yield from trainable(inner, _shaped(h, full, shape(inner)), f"{path}inner.")


def _shaped(pull: np.ndarray, full: tuple[int, ...], dims: tuple[int, ...]) -> np.ndarray:
    """A pull that broadcasts to `full`, for the same values in another shape."""
    if pull.size == 1:  # it stays one number: a pass over the weights is spared
        return pull.reshape((1,) * len(dims))
    return np.broadcast_to(pull, full).reshape(dims)


def _members(codes: np.ndarray, codebook: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """(g, k, d): pull, which broadcasts to (g*r, c, d), summed over the members of each codeword."""
    groups, k, d = codebook.shape
    index = (codes.reshape(groups, -1).astype(np.intp) + k * np.arange(groups)[:, None]).reshape(-1)
    if pull.size == 1:
        counts = np.bincount(index, minlength=groups * k).reshape(groups, k, 1)
        return np.repeat(counts * float(pull.reshape(-1)[0]), d, axis=2)
    full = np.broadcast_to(pull, (groups * codes.shape[1], codes.shape[2], d))
    each = (np.bincount(index, full[..., i].reshape(-1), groups * k) for i in range(d))
    return np.stack(list(each), axis=-1).reshape(codebook.shape)


def _summed_to(pull: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """The sum over what an array of these dims is broadcast to pull's."""
    aligned = (1,) * (pull.ndim - len(dims)) + dims
    axes = tuple(axis for axis, size in enumerate(aligned) if size == 1)
    return pull.sum(axis=axes, keepdims=True).reshape(dims)


def _kind(scale: np.ndarray, dims: tuple[int, ...]) -> Kind:
    if scale.size == 1:
        return "step"
    return "scale" if scale.size == dims[0] and scale.ndim == len(dims) and scale.shape[0] == dims[0] else "gain"


def unit_of(pull: float, reach: int) -> float:
    """A power of two, parameter over leaf, by which a step of the parameter moves `reach` weights as far as a step of
    each would: pull is the sum of a leaf's.
    """
    mean = pull / max(reach, 1)
    return 2.0 ** min(max(round(0.5 * math.log2(mean)), -60), 60) if mean > 0 else 1.0


def size_of(weights: np.ndarray) -> float:
    """Root mean square of those that are not zero; 1 if all are."""
    some = weights[weights != 0].astype(np.float64)
    return float(np.sqrt(np.mean(np.square(some)))) if some.size else 1.0


def finer(expr: Expr) -> Expr:
    """The same values, but whole-number codebooks under one step in a grid fine enough to move codeword by codeword.

    8 bits if those leave a few steps between neighbours, else 16. Steps are divided by a power of two: no bit changes.
    """

    def change(node: Expr) -> Expr:
        match node:
            case Affine(Lookup(codes, book), np.ndarray() as scale, None) if _has_step(book, scale):
                factor, dtype = _factor(book)
                step = (scale / np.float32(factor)).astype(scale.dtype)
                if factor == 1 or not np.array_equal(step * np.float32(factor), scale):
                    return node
                return Affine(Lookup(codes, (book.astype(np.int32) * factor).astype(dtype)), step)
            case _:
                return node

    return rewritten(expr, change)


def coarser(expr: Expr) -> Expr:
    """Undoes `finer` where codewords have a power of two in common: those that did not move cost no byte more."""

    def change(node: Expr) -> Expr:
        match node:
            case Affine(Lookup(codes, book), np.ndarray() as scale, None) if _has_step(book, scale) and book.any():
                whole = book.astype(np.int64)
                bits = int(np.bitwise_or.reduce(whole.reshape(-1)))
                factor = bits & -bits
                step = (scale * np.float32(factor)).astype(scale.dtype)
                if not np.array_equal(step / np.float32(factor), scale):
                    return node
                return Affine(Lookup(codes, whole_steps(whole // factor)), step)
            case _:
                return node

    return rewritten(expr, change)


def rewritten(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The expression with `change` made to each node, from the leaves up."""
    match expr:
        case Affine(inner, scale, offset):
            return change(Affine(rewritten(inner, change), scale, offset))
        case Sum(terms):
            return change(Sum(tuple(rewritten(term, change) for term in terms)))
        case Scatter(size, positions, inner):
            return change(Scatter(size, positions, rewritten(inner, change)))
        case Permute(inner, order):
            return change(Permute(rewritten(inner, change), order))
        case Reshape(inner, new):
            return change(Reshape(rewritten(inner, change), new))
        case Raw() | Lookup():
            return change(expr)


def _has_step(book: np.ndarray, scale: np.ndarray) -> bool:
    """Whether a codebook is whole numbers under one float32."""
    return book.dtype.kind == "i" and scale.size == 1 and scale.dtype == np.float32


def _factor(book: np.ndarray) -> tuple[int, type[np.signedinteger]]:
    """(factor, dtype): how many finer steps each of a codebook's (g, k, d) is worth, and what holds them."""
    top = int(np.abs(book.astype(np.int64)).max(initial=0))
    dtype = np.int8 if book.dtype.itemsize == 1 else np.int16
    if not top:
        return 1, dtype
    in_8 = _power(127 / (_ROOM * top))
    if book.shape[2] > 1:  # coordinates: their grid is fine already
        return in_8, np.int8 if in_8 > 1 else dtype
    gaps = np.concatenate([np.diff(np.unique(group.astype(np.float64))) for group in book])
    gap = float(np.sort(gaps)[len(gaps) // 2]) if len(gaps) else 1.0
    if in_8 * gap >= _FINE:
        return in_8, np.int8 if in_8 > 1 else dtype
    return min(_power(2 * _FINER / gap - 1), _power(32767 / (_ROOM * top))), np.int16


def _power(most: float) -> int:
    """The largest power of two up to this, at least 1."""
    return 1 << max(0, math.floor(math.log2(most))) if most >= 1 else 1


def stays_zero(leaf: Leaf, *, entries: bool) -> np.ndarray:
    """Where a leaf is exactly zero: codewords as a whole or, in pruned tensors, each entry, for it may be a pruned one;
    factors and values each.
    """
    zero = leaf.values == 0
    whole = leaf.kind == "codebook" and not entries
    return np.broadcast_to(zero.all(axis=-1, keepdims=True), zero.shape) if whole else zero


def mantissa_bits(values: np.ndarray) -> int | None:
    """To how many explicit bits of mantissa floats were rounded, read off their low zero bits; None if too few tell."""
    wide = np.abs(values.astype(np.float32)).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFF)
    distinct = np.unique(wide)
    if len(distinct) < _TELLING:
        return None
    used = int(np.bitwise_or.reduce(distinct))
    return 24 - (used & -used).bit_length()


@dataclass(frozen=True, slots=True)
class Form:
    """How the file holds a leaf."""

    dtype: str
    mantissa: int | None  # explicit bits that it is rounded to, if it is; those of float32 or more say nothing
    unit: float  # of the parameter over the leaf

    @property
    def exact(self) -> bool:
        """Whether a float32 parameter is held as it is."""
        return self.dtype in ("float32", "float64") and not self._rounds

    @property
    def _rounds(self) -> bool:
        return self.mantissa is not None and self.mantissa < 23

    def rounded(self, values: Tensor) -> Tensor:
        """Values of the parameter to the nearest that the file can hold."""
        if self.dtype not in FLOATS:
            top = 2 ** (8 * DTYPES[self.dtype].itemsize - 1) - 1
            return (values * (1 / self.unit)).round_().clamp_(-top, top).mul_(self.unit)
        if self.mantissa is not None and self._rounds:
            values = round_mantissa(values, self.mantissa)
        if self.dtype in ("float32", "float64"):
            return values
        most = float(ml_dtypes.finfo(DTYPES[self.dtype]).max)
        narrow = (values * (1 / self.unit)).clamp_(-most, most).to(torch_dtype(self.dtype))
        return narrow.to(values.dtype).mul_(self.unit)


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """float32 values rounded to `bits` explicit bits of mantissa, as `methods.round_mantissa` does."""
    drop = 23 - bits
    keys = values.to(torch.float32).view(torch.int32)
    odd = (keys >> drop) & 1
    rounded = ((keys + odd + ((1 << (drop - 1)) - 1)) >> drop << drop).view(torch.float32)
    return torch.where(rounded.isfinite(), rounded, values).to(values.dtype)


class Held:
    """A parameter or buffer that only takes values the file can hold, while a master copy takes every small step.

    What an optimizer adds goes to the master; the parameter is the master rounded. So training never stalls, and what
    runs is what is shipped.
    """

    def __init__(self, owner: nn.Module, name: str, form: Form, zero: np.ndarray) -> None:
        self._owner, self._name, self._form = owner, name, form
        self._zero = torch.from_numpy(zero.copy()) if zero.any() else None  # where it stays 0
        self.master: Tensor | None = None  # None if the file holds every value
        if not form.exact:
            value = self._value()
            self.master = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            self._shown = self.master.clone()
        self.settle()

    def _value(self) -> Tensor:
        # By name at each call: moving a module to a device replaces its buffers.
        return getattr(self._owner, self._name).detach()

    @torch.no_grad()
    def settle(self) -> None:
        """Take in what an optimizer, or a norm's statistics, did since."""
        value = self._value()
        if self.master is not None:
            if self.master.device != value.device:
                self.master, self._shown = self.master.to(value.device), self._shown.to(value.device)
            self.master += value - self._shown
        self._show(value)

    @torch.no_grad()
    def load(self, master: Tensor) -> None:
        """Go on from another master, whether or not the net's state was loaded before."""
        if self.master is not None:
            value = self._value()
            self.master = master.to(value.device, self.master.dtype, copy=True)
            self._show(value)

    def _show(self, value: Tensor) -> None:
        if self._zero is not None:
            self._zero = self._zero.to(value.device)
            (value if self.master is None else self.master).masked_fill_(self._zero, 0)
        if self.master is not None:
            value.copy_(self._form.rounded(self.master))
            self._shown = value.to(self.master.dtype, copy=True)
