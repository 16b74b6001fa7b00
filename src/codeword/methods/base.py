"""What the methods share: the protocol, rows of a weight and their scales, the expression of weight sharing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np

from codeword.expr import DTYPES, Affine, Expr, Lookup, Reshape
from codeword.math.moments import Moments

Granularity: TypeAlias = Literal["tensor", "row"]
CodebookDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
LEAST_FLOAT = 2.0**-149  # of float32, denormals included
_LEAST_SCALE = 2.0**-126  # the smallest normal float32: a smaller divisor may round to zero
_MOST_SCALE = 1.75 * 2.0**127  # of two bits of mantissa that float32 holds: a larger one would round to infinity


@runtime_checkable
class Method(Protocol):
    """What a plan assigns to a tensor."""

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """An expression of weight's shape.

        weight: any shape, the tensor's own dtype. importance: same shape, cost of a squared error of each weight, >= 0;
        None for all equal. generator: the tensor's own, the only source of randomness allowed.
        """
        ...


@runtime_checkable
class MomentsMethod(Method, Protocol):
    """A method that can make the errors of a row cancel at the layer's output, as measured moments of its input say."""

    def compress_by_moments(self, weight: np.ndarray, moments: Moments, *, generator: np.random.Generator) -> Expr:
        """An expression of weight's shape, as `compress` makes one; moments: of what the rows (r, c) multiply."""
        ...


class Sample(NamedTuple):
    """Vectors of one tensor, drawn for the codebooks of its group; of mean square 1, so that no tensor outweighs."""

    vectors: np.ndarray  # (n, d) float32
    importance: np.ndarray | None  # (n, d) float32, of mean 1 where a weight has any; None for all equal


@runtime_checkable
class SharedMethod(Method, Protocol):
    """A method whose codebooks tensors of equal options, kind and vector length may share, as a group with a name."""

    @property
    def shared(self) -> str | None:
        """Name of the group; None: each tensor has codebooks of its own."""
        ...

    def vector_length(self, shape: tuple[int, ...]) -> int:
        """Weights of a tensor of this shape that are one vector. Raises PlanError if it does not fit the method."""
        ...

    def gather(
        self, weight: np.ndarray, importance: np.ndarray | None, *, share: float, generator: np.random.Generator
    ) -> Sample:
        """What a tensor of `share` (0..1) of the group's weights gives to its codebooks; nothing if all are zero."""
        ...

    def bind(self, samples: Sequence[Sample], *, generator: np.random.Generator) -> Method:
        """The method with the codebooks of all samples, at least one of them not empty, fixed."""
        ...


class Scales(NamedTuple):
    """What the rows of a weight are divided by before clustering: unit * relative."""

    relative: np.ndarray | None  # (r,) float8, or None for all 1
    unit: float

    def divisor(self, rows: int) -> np.ndarray | None:
        """(r,) float32 divisors, None if there is nothing to divide by."""
        if self.relative is None:
            return None if self.unit == 1.0 else np.full(rows, self.unit, np.float32)
        return self.relative.astype(np.float32) * np.float32(self.unit)


def as_rows(weight: np.ndarray) -> np.ndarray:
    """(r, c) view: a row for each output channel; vectors and scalars are one row."""
    return weight.reshape(weight.shape[0], -1) if weight.ndim > 1 and weight.size else weight.reshape(1, -1)


def row_scales(rows: np.ndarray) -> Scales:
    """Root mean square of each row, to two bits of mantissa: a scale need not be exact where codes adapt to it.

    Relative to the largest they are float8 (e5m2) values, a byte or less in the file; a row below 2**-14 of the largest
    takes that.
    """
    norms = np.sqrt([np.mean(np.square(row, dtype=np.float64)) for row in rows])
    top = float(norms.max())
    if not top > 0:
        return Scales(None, 1.0)
    unit = max(2.0 ** math.floor(math.log2(top)), _LEAST_SCALE * 2.0**14)
    return Scales(np.maximum(np.minimum(norms, _MOST_SCALE) / unit, 2.0**-14).astype(ml_dtypes.float8_e5m2), unit)


def scales_by(granularity: Granularity, rows: np.ndarray) -> Scales:
    """`row_scales` of rows (r, c), or nothing to divide by."""
    return row_scales(rows) if granularity == "row" else Scales(None, 1.0)


def root_mean_square(rows: np.ndarray) -> float:
    """Of all values of rows (r, c), or 1 if all are zero."""
    energy = sum(float(np.sum(np.square(row, dtype=np.float64))) for row in rows)
    return max(math.sqrt(energy / rows.size), _LEAST_SCALE) if energy else 1.0


def rows_of(importance: np.ndarray | None) -> np.ndarray | None:
    """`as_rows` of an importance that may be absent."""
    return None if importance is None else as_rows(importance)


def shared(
    codes: np.ndarray,
    codebook: np.ndarray,
    scales: Scales,
    shape: tuple[int, ...],
    grid: float | None = None,
    dtype: CodebookDtype = "float32",
) -> Expr:
    """The expression of weight sharing from codes (r, c) and a codebook (k,) for scaled weights, stored as dtype.

    Codebooks (g, k) are those of g groups of rows. With a grid the one codebook is stored as whole numbers, which take
    a few bytes however many they are, and a step.
    """
    expr: Expr
    if grid is None:
        books = np.atleast_2d(codebook)
        narrow, unit = narrowed(books * scales.unit, dtype)
        expr = Lookup(codes.reshape(len(books), -1, codes.shape[1]), narrow[..., None])
        if unit != 1:
            expr = Affine(expr, np.full((1, 1, 1), unit, np.float32))
    else:
        whole = whole_steps(codebook / grid)
        expr = Affine(Lookup(codes[None], whole.reshape(1, -1, 1)), np.full((1, 1, 1), grid * scales.unit, np.float32))
    if scales.relative is not None:
        expr = Affine(expr, scales.relative.reshape(-1, 1, 1))
    return Reshape(expr, shape)


def whole_steps(steps: np.ndarray) -> np.ndarray:
    """Steps to the nearest whole numbers, in 8 bits if those hold them and else in 16."""
    whole = np.rint(steps)
    return whole.astype(np.int8 if np.abs(whole).max() < 128 else np.int16)


def narrowed(codebook: np.ndarray, dtype: CodebookDtype) -> tuple[np.ndarray, float]:
    """(codebook, step): values of that dtype that times step, a float32, are the codebook's."""
    top = float(np.abs(codebook).max())
    limits = ml_dtypes.finfo(DTYPES["float32" if dtype == "int8" else dtype])
    low, most = 1024 * float(limits.smallest_normal), float(limits.max)
    if dtype == "int8":
        step = float(np.float32(top / 127)) or LEAST_FLOAT if top > 0 else 1.0
        if step * 127 > most:
            step = float(np.nextafter(np.float32(step), np.float32(0)))
        return np.clip(np.rint(codebook / step), -127, 127).astype(np.int8), step
    if dtype != "float32" and top > 0 and not low <= top <= most:  # too large, or denormal: divide by a power of two
        step = max(2.0 ** math.floor(math.log2(top)), LEAST_FLOAT)
        below_2 = 2 - float(limits.eps)  # 2 * 2**127 is no float
        return np.clip(codebook / step, -below_2, below_2).astype(DTYPES[dtype]), step
    return np.clip(codebook, -most, most).astype(DTYPES[dtype]), 1.0
