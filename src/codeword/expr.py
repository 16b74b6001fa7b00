"""A compressed tensor is an expression: seven frozen nodes over NumPy arrays, and one `decode`.

    Expr = Raw | Lookup | Affine | Sum | Scatter | Permute | Reshape

Methods build expressions, the coder writes their arrays ("leaves"), runtimes match on their shape. Nothing else in
the package knows what a tensor looks like when it is compressed. Needs NumPy (and ml_dtypes for bfloat16 and
float8), never torch.

`decode` is the specification (docs/design/format.md repeats it in words): Raw, Lookup, Scatter, Permute and Reshape
move values and never change them; Affine and Sum compute in float32, one rounding per operation, no fused
multiply-add. So every machine decodes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import ml_dtypes
import numpy as np

from codeword.errors import ExprError

Array: TypeAlias = np.ndarray

# The dtypes a tensor or leaf may have, by the name used everywhere (messages, plans, the file).
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
FLOATS = frozenset(name for name in DTYPES if "float" in name)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype) -> str:
    """Name of a NumPy dtype as Codeword writes it; `ExprError` if the file format has none."""
    try:
        return _NAMES[np.dtype(dtype).newbyteorder("=")]
    except KeyError:
        raise ExprError(f"dtype {dtype} cannot be stored; the format knows {', '.join(DTYPES)}") from None


def dense_nbytes(dtype: str, size: int) -> int:
    """Bytes of `size` values uncompressed, what ratios refer to: 4 a floating value, else the dtype's own width."""
    return size * (4 if dtype in FLOATS else DTYPES[dtype].itemsize)


def is_float(array: Array) -> bool:
    """True for any floating dtype, bfloat16 and float8 included (NumPy's own test does not know those)."""
    return dtype_name(array.dtype) in FLOATS


@dataclass(frozen=True, eq=False, slots=True)
class Raw:
    """The values themselves, any shape and dtype."""

    values: Array


@dataclass(frozen=True, eq=False, slots=True)
class Lookup:
    """Codewords picked by codes: the node of all weight sharing.

    codes (g, r, c) unsigned: g groups of r rows of c codes. codebook (g, k, d): k codewords of d values a group.
    Decodes to (g*r, c, d).
    """

    codes: Array
    codebook: Array

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.codebook.ndim != 3:
            raise ExprError(
                f"Lookup: codes must be (g, r, c) and codebook (g, k, d), "
                f"got {self.codes.shape} and {self.codebook.shape}"
            )
        if self.codes.dtype.kind != "u":
            raise ExprError(
                f"Lookup: codes must be unsigned (a -1 would pick the last codeword), got {self.codes.dtype}"
            )
        if self.codes.shape[0] != self.codebook.shape[0]:
            raise ExprError(f"Lookup: {self.codes.shape[0]} groups of codes but {self.codebook.shape[0]} codebooks")


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """scale * inner + offset in float32; either may be None; both broadcast against inner's shape."""

    inner: Expr
    scale: Array | None = None
    offset: Array | None = None

    def __post_init__(self) -> None:
        inner = shape(self.inner)
        for name, array in (("scale", self.scale), ("offset", self.offset)):
            if array is not None and _broadcast(array.shape, inner) != inner:
                raise ExprError(f"Affine: {name} of shape {array.shape} does not broadcast to {inner}")


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """The float32 sum of terms of one shape, added from left to right: residual codebooks, outliers."""

    terms: tuple[Expr, ...]

    def __post_init__(self) -> None:
        shapes = [shape(term) for term in self.terms]
        if not shapes or any(s != shapes[0] for s in shapes):
            raise ExprError(f"Sum: terms must have one shape, got {shapes}")


@dataclass(frozen=True, eq=False, slots=True)
class Scatter:
    """A flat array of `size` zeros but for `positions` (rising, unsigned), which take inner's values in order."""

    size: int
    positions: Array
    inner: Expr

    def __post_init__(self) -> None:
        if self.positions.ndim != 1 or self.positions.dtype.kind != "u":
            raise ExprError(
                f"Scatter: positions must be 1-D and unsigned, got {self.positions.shape} {self.positions.dtype}"
            )
        kept = math.prod(shape(self.inner))
        if kept != len(self.positions) or self.size < kept:
            raise ExprError(f"Scatter: {len(self.positions)} positions for {kept} values in {self.size} places")


@dataclass(frozen=True, eq=False, slots=True)
class Permute:
    """Axes in another order, as numpy.transpose: axis i of the result is axis order[i] of inner."""

    inner: Expr
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(shape(self.inner)))):
            raise ExprError(f"Permute: order {self.order} is no permutation of the axes of {shape(self.inner)}")


@dataclass(frozen=True, eq=False, slots=True)
class Reshape:
    """The same values, C order, in another shape."""

    inner: Expr
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(self.shape) != math.prod(shape(self.inner)) or min(self.shape, default=0) < 0:
            raise ExprError(f"Reshape: {shape(self.inner)} does not fit {self.shape}")


Expr: TypeAlias = Raw | Lookup | Affine | Sum | Scatter | Permute | Reshape


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


def shape(expr: Expr) -> tuple[int, ...]:
    """Shape that `decode` returns, without decoding."""
    match expr:
        case Raw(values):
            return values.shape
        case Lookup(codes, codebook):
            return (codes.shape[0] * codes.shape[1], codes.shape[2], codebook.shape[2])
        case Affine(inner):
            return shape(inner)
        case Sum(terms):
            return shape(terms[0])
        case Scatter(size):
            return (size,)
        case Permute(inner, order):
            inner_shape = shape(inner)
            return tuple(inner_shape[axis] for axis in order)
        case Reshape(_, new):
            return new


def result_dtype(expr: Expr) -> np.dtype:
    """Dtype that `decode` returns, without decoding."""
    match expr:
        case Raw(values):
            return values.dtype
        case Lookup(_, codebook):
            return codebook.dtype
        case Affine() | Sum():
            return DTYPES["float32"]
        case Scatter(inner=inner) | Permute(inner) | Reshape(inner):
            return result_dtype(inner)


def fits_dtype(expr: Expr, dtype: np.dtype) -> bool:
    """Whether a tensor of this dtype may be this expression: the same, or floats that float32 holds on the way.

    Anything else would be cast in ways that differ from machine to machine (floats to integers) or round twice.
    """
    result = result_dtype(expr)
    return result == dtype or (dtype_name(dtype) in FLOATS and np.can_cast(result, np.float32))


def decode(expr: Expr) -> Array:
    """The dense array an expression stands for.

    Returns the leaf's own dtype through Raw, Lookup, Scatter, Permute and Reshape, float32 from Affine and Sum.
    Raises ExprError if a code has no codeword or positions do not rise within the size.
    """
    match expr:
        case Raw(values):
            return values
        case Lookup(codes, codebook):
            groups, rows, columns = codes.shape
            k, d = codebook.shape[1:]
            if codes.size and int(codes.max()) >= k:
                raise ExprError(f"Lookup: code {int(codes.max())} in a codebook of {k} codewords")
            if groups == 1:
                return codebook[0].take(codes[0], axis=0)
            picked = np.empty((groups, rows, columns, d), codebook.dtype)
            for group in range(groups):
                codebook[group].take(codes[group], axis=0, out=picked[group])
            return picked.reshape(groups * rows, columns, d)
        case Affine(inner, scale, offset):
            # The first operation makes the float32 copy, the second works in place: layers may be very large.
            values, owned = decode(inner), False
            for array, operation in ((scale, np.multiply), (offset, np.add)):
                if array is not None:
                    out = values if owned else np.empty(values.shape, np.float32)
                    values = operation(values, array.astype(np.float32), out=out, dtype=np.float32, casting="unsafe")
                    owned = True
            return values if owned else values.astype(np.float32)
        case Sum(terms):
            total = np.array(decode(terms[0]), np.float32)
            for term in terms[1:]:
                np.add(total, decode(term).astype(np.float32, copy=False), out=total)
            return total
        case Scatter(size, positions, inner):
            if len(positions) and (int(positions[-1]) >= size or np.any(positions[1:] <= positions[:-1])):
                raise ExprError(f"Scatter: positions must rise and stay below {size}")
            values = decode(inner).reshape(-1)
            dense = np.zeros(size, values.dtype)
            dense[positions] = values
            return dense
        case Permute(inner, order):
            return decode(inner).transpose(order)
        case Reshape(inner, new):
            return decode(inner).reshape(new)


def leaves(expr: Expr, path: str = "") -> Iterator[tuple[str, Array]]:
    """(path, array) of every leaf, in the order the file writes them."""
    match expr:
        case Raw(values):
            yield f"{path}values", values
        case Lookup(codes, codebook):
            yield f"{path}codes", codes
            yield f"{path}codebook", codebook
        case Affine(inner, scale, offset):
            yield from leaves(inner, f"{path}inner.")
            if scale is not None:
                yield f"{path}scale", scale
            if offset is not None:
                yield f"{path}offset", offset
        case Sum(terms):
            for index, term in enumerate(terms):
                yield from leaves(term, f"{path}terms[{index}].")
        case Scatter(_, positions, inner):
            yield f"{path}positions", positions
            yield from leaves(inner, f"{path}inner.")
        case Permute(inner) | Reshape(inner):
            yield from leaves(inner, f"{path}inner.")


def nbytes(expr: Expr) -> int:
    """Bytes of the leaves in memory (not of the file: that is `Artifact.nbytes`)."""
    return sum(array.nbytes for _, array in leaves(expr))


def lookups(expr: Expr) -> Iterator[Lookup]:
    """Every Lookup in an expression, outermost first."""
    match expr:
        case Lookup():
            yield expr
        case Sum(terms):
            for term in terms:
                yield from lookups(term)
        case Affine(inner) | Permute(inner) | Reshape(inner):
            yield from lookups(inner)
        case Scatter(inner=inner):
            yield from lookups(inner)
        case Raw():
            return


def with_leaves(expr: Expr, arrays: Iterator[Array]) -> Expr:
    """The same expression over other arrays, taken in the order of `leaves`."""
    match expr:
        case Raw():
            return Raw(next(arrays))
        case Lookup():
            return Lookup(next(arrays), next(arrays))
        case Affine(inner, scale, offset):
            new_inner = with_leaves(inner, arrays)
            new_scale = next(arrays) if scale is not None else None
            return Affine(new_inner, new_scale, next(arrays) if offset is not None else None)
        case Sum(terms):
            return Sum(tuple(with_leaves(term, arrays) for term in terms))
        case Scatter(size, _, inner):
            positions = next(arrays)
            return Scatter(size, positions, with_leaves(inner, arrays))
        case Permute(inner, order):
            return Permute(with_leaves(inner, arrays), order)
        case Reshape(inner, new):
            return Reshape(with_leaves(inner, arrays), new)
