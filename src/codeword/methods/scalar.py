"""Scalar methods: each weight is kept, rounded, or replaced by one of a few shared values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec
import numpy as np

from codeword.errors import PlanError
from codeword.expr import DTYPES, Affine, Expr, Raw, dtype_name
from codeword.kernels.groups import LARGEST, cluster_groups
from codeword.math.bins import Bins, assign_members, make_bins, weighted_means
from codeword.math.kmeans import kmeans, midpoints
from codeword.methods.base import Granularity, Method, as_rows, root_mean_square, rows_of, scales_by, shared

_AT_ONCE = 1 << 22  # weights of groups that are clustered together
_LEAST_OCTAVE = -126  # of a step: the smallest normal float32
_BFLOAT16 = DTYPES["bfloat16"]  # holds every power of two that float32 does, in half the bytes
_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


class Keep(msgspec.Struct, frozen=True, tag_field="method", tag="keep", forbid_unknown_fields=True):
    """The values themselves, losslessly, or rounded to `mantissa_bits` explicit bits (float32 has 23, bfloat16 7)."""

    mantissa_bits: int | None = None

    def __post_init__(self) -> None:
        if self.mantissa_bits is not None and not 0 <= self.mantissa_bits <= 52:
            raise PlanError(f"keep: mantissa_bits must lie in 0..52, got {self.mantissa_bits}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Raw, whose low zero bits the byte-plane coder gets for nothing."""
        del importance, generator
        if self.mantissa_bits is None or dtype_name(weight.dtype) not in _MANTISSA:
            return Raw(weight)
        return Raw(round_mantissa(weight, self.mantissa_bits))


class FixedPoint(msgspec.Struct, frozen=True, tag_field="method", tag="fixed-point", forbid_unknown_fields=True):
    """Whole multiples of one step: 2**-bits of the values' root mean square, that rounded down to a power of two.

    For biases and the vectors of norms, whose absolute error is what counts: at equal error it takes a bit less a value
    than rounding mantissas. Not for variances, of which small ones may become 0. The step is wider where 16 bits would
    not hold the largest value.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 14:
            raise PlanError(f"fixed-point: bits must lie in 0..14, got {self.bits}")

    def step(self, values: np.ndarray) -> float:
        """The step for values of any shape, not all of them 0."""
        octave = math.frexp(root_mean_square(as_rows(values)))[1] - 1
        top = float(np.abs(values).max())
        return 2.0 ** max(octave - self.bits, math.ceil(math.log2(top / 32767)), _LEAST_OCTAVE)

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Raw whole numbers under an Affine of the step; of 16 bits all, so that vectors of a net share a stream."""
        del importance, generator
        values = weight.astype(np.float64)
        if not values.any():
            return Raw(weight)
        step = self.step(values)
        return Affine(Raw(np.rint(values / step).astype(np.int16)), np.full((1,) * weight.ndim, step, _BFLOAT16))


def is_lossless(methods: Iterable[Method]) -> bool:
    """Whether they keep every bit of a net."""
    return all(method == Keep() for method in methods)


class KMeans(msgspec.Struct, frozen=True, tag_field="method", tag="kmeans", forbid_unknown_fields=True):
    """Optimal scalar clustering to `n_clusters` codewords (Wu 1991; methods A0), one codebook for the tensor or more.

    granularity "row": each output row is divided by its own scale before rows are clustered together. zero: 0 is one of
    the codewords. group_size: rows that share a codebook, None for all; divides the number of rows. A vector is one
    row, with one codebook whatever the group_size. codebook_dtype "float16" makes many codebooks half as large; those
    below 2**-14 of the largest then lose precision.
    """

    n_clusters: int
    granularity: Granularity = "tensor"
    zero: bool = False
    group_size: int | None = None
    codebook_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.n_clusters <= 1 << 16:
            raise PlanError(f"kmeans: n_clusters must lie in 1..65536, got {self.n_clusters}")
        if self.group_size is not None and self.group_size < 1:
            raise PlanError(f"kmeans: group_size must be at least 1, got {self.group_size}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup, under an Affine of the codebooks' unit if they need one and of row scales if asked for."""
        del generator
        rows, h = as_rows(weight), rows_of(importance)
        if not rows.size:
            return Raw(weight)
        scales = scales_by(self.granularity, rows)
        divisor = scales.divisor(len(rows))
        codes, codebooks = self._clustered(rows, divisor, h, self._per_codebook(weight.shape, len(rows)))
        return shared(codes, codebooks, scales, weight.shape, dtype=self.codebook_dtype)

    def _per_codebook(self, shape: tuple[int, ...], rows: int) -> int:
        """Rows that share a codebook."""
        size = self.group_size
        if size is None or len(shape) < 2:
            return rows
        if rows % size:
            divisors = [n for n in range(1, rows + 1) if rows % n == 0]
            near = [max(n for n in divisors if n < size), *[n for n in divisors if n > size][:1]]
            raise PlanError(
                f"kmeans: group_size {size} does not divide the {rows} rows of shape {shape}; "
                f"{' and '.join(map(str, near))} {'does' if len(near) == 1 else 'do'}"
            )
        return size

    def _clustered(
        self, rows: np.ndarray, divisor: np.ndarray | None, h: np.ndarray | None, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes (r, c) and codebooks (g, k) of g groups of `size` rows."""
        if size == len(rows):
            bins = make_bins(rows, divisor, h)
            clusters = kmeans(bins, self.n_clusters, zero=self.zero)
            codes, codebook = assigned(bins, rows, divisor, h, clusters.codebook, zero=self.zero)
            return codes, codebook[None]
        m = size * rows.shape[1]
        at_once = size if m > LARGEST else size * max(1, _AT_ONCE // m)
        found = []
        for at in range(0, len(rows), at_once):
            where = slice(at, at + at_once)
            scale, weights = (None if array is None else array[where] for array in (divisor, h))
            if m > LARGEST:
                found.append(self._clustered(rows[where], scale, weights, size))
            else:
                found.append(self._sorted(rows[where], scale, weights, m))
        k = max(int(codes.max()) for codes, _ in found) + 1
        books = [np.pad(books, ((0, 0), (0, max(0, k - books.shape[1]))), mode="edge")[:, :k] for _, books in found]
        return np.concatenate([codes for codes, _ in found]), np.concatenate(books)

    def _sorted(
        self, rows: np.ndarray, divisor: np.ndarray | None, h: np.ndarray | None, m: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for groups of m <= LARGEST values."""
        values = rows if divisor is None else rows.astype(np.float32) / divisor[:, None]
        importance = None if h is None else h.reshape(-1, m)
        k = min(self.n_clusters, m + 1)  # more would be repeated: a group has m values, and 0
        found = cluster_groups(values.reshape(-1, m), importance, k, zero=self.zero)
        return found.codes.reshape(rows.shape), found.codebooks


def assigned(
    bins: Bins,
    rows: np.ndarray,
    divisor: np.ndarray | None,
    h: np.ndarray | None,
    codebook: np.ndarray,
    *,
    zero: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes (r, c), and codewords (k,) moved to the mean of the members that the codes name.

    bins are those of rows (r, c): what is shipped are exact means of the raw weights. zero: 0 stays where it is.
    """
    codes, mass, first = assign_members(bins, rows, divisor, h, midpoints(codebook))
    return codes, np.where(zero & (codebook == 0), codebook, weighted_means(first, mass, codebook))


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Floats rounded to `bits` explicit bits of mantissa, to nearest, ties to even; zeros keep their sign."""
    drop = _MANTISSA[dtype_name(values.dtype)] - bits
    if drop <= 0:
        return values
    keys = values.view(f"u{values.itemsize}")
    one = keys.dtype.type(1)
    half = keys.dtype.type((1 << (drop - 1)) - 1)
    kept = keys + half + ((keys >> keys.dtype.type(drop)) & one)
    rounded = (kept >> keys.dtype.type(drop) << keys.dtype.type(drop)).view(values.dtype)
    return np.where(
        np.isfinite(values) & np.isfinite(rounded), rounded, values
    )  # rounding up must not make an infinity
