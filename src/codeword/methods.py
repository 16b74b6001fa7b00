"""The methods: frozen options, and the few lines that call the arithmetic and build an expression.

A method is any object with `compress(weight, importance, *, generator) -> Expr`. The union `BuiltIn` is the whole list
of those a plan file can name; pass an object of your own to `Plan` for anything else, nothing is registered.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import msgspec
import numpy as np

from codeword.errors import PlanError
from codeword.expr import Affine, Expr, Lookup, Raw, Reshape, dtype_name
from codeword.kernels.assign import assign, assign_weighted, cluster_sums
from codeword.kernels.compensate import assign_compensated
from codeword.math.bins import Bins, make_bins
from codeword.math.ecsq import MAX_CODEWORDS, SPACINGS, Codebook, code_prices, ecsq
from codeword.math.kmeans import kmeans

# Compensation wants a wider grid: output divergence of LeNet-5 and ResNet-20 on training images is flat from 4 to 5.5,
# and a single spacing makes the size of a file fall without jumps as lambda grows.
_COMPENSATED_SPACING = 4.6
_SAMPLE = 1 << 19  # weights that prices are learned from
Granularity: TypeAlias = Literal["tensor", "row"]
_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_LEAST_SCALE = 2.0**-126  # the smallest normal float32: a smaller divisor may round to zero


@runtime_checkable
class Method(Protocol):
    """What a plan assigns to a tensor."""

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """An expression of weight's shape.

        weight: any shape, the tensor's own dtype. importance: same shape, cost of a squared error of each weight, >= 0;
        None for all equal. generator: the tensor's own, the only source of randomness allowed.
        """
        ...


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


class KMeans(msgspec.Struct, frozen=True, tag_field="method", tag="kmeans", forbid_unknown_fields=True):
    """Optimal scalar clustering to `n_clusters` codewords (Wu 1991; methods A0), one codebook for the tensor.

    granularity "row": each output row is divided by its own scale before all rows are clustered together.
    zero: 0 is one of the codewords.
    """

    n_clusters: int
    granularity: Granularity = "tensor"
    zero: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_clusters <= 1 << 16:
            raise PlanError(f"kmeans: n_clusters must lie in 1..65536, got {self.n_clusters}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup, under an Affine of row scales if the granularity is "row"."""
        del generator
        rows, h = as_rows(weight), _rows_of(importance)
        if not rows.size:
            return Raw(weight)
        scales = row_scales(rows) if self.granularity == "row" else Scales(None, 1.0)
        divisor = scales.divisor(len(rows))
        clusters = kmeans(make_bins(rows, divisor, h), self.n_clusters, zero=self.zero)
        codes = assign(rows, divisor, midpoints(clusters.codebook))
        # A last pass over the raw weights: what is shipped are exact means of the members that the codes name.
        _, mass, first = cluster_sums(rows, divisor, h, codes, len(clusters.codebook))
        pinned = (mass <= 0) | (self.zero & (clusters.codebook == 0))
        codebook = np.where(pinned, clusters.codebook, first / np.where(mass > 0, mass, 1))
        return _shared(codes, codebook, scales, weight.shape)


class RateAware(msgspec.Struct, frozen=True, tag_field="method", tag="rate-aware", forbid_unknown_fields=True):
    """Rate-aware scalar clustering (methods A5): least squared error + lam * coded bits; the k that is best follows.

    lam: the squared error one bit is worth, in units of the tensor's mean square (of each row's, if the granularity is
    "row"), so that it means the same whatever the weights' scale. An importance multiplies the squared errors of the
    scaled weights. codebook "grid": codewords are multiples of one step, a few bytes in the file; "free": each is the
    mean of its members. compensate: errors cancel within kernels and rows (`kernels.compensate`), which costs a little
    SQNR of the weights and saves far more of the outputs'.
    """

    lam: float
    granularity: Granularity = "row"
    codebook: Literal["grid", "free"] = "grid"
    max_clusters: int = MAX_CODEWORDS
    compensate: bool = True

    def __post_init__(self) -> None:
        if not (self.lam > 0 and math.isfinite(self.lam)):
            raise PlanError(f"rate-aware: lam must be a positive number, got {self.lam}")
        if not 1 <= self.max_clusters <= MAX_CODEWORDS:
            raise PlanError(f"rate-aware: max_clusters must lie in 1..{MAX_CODEWORDS}, got {self.max_clusters}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup of grid steps or free codewords, under an Affine of row scales or of the step."""
        del generator
        rows, h = as_rows(weight), _rows_of(importance)
        if not rows.size:
            return Raw(weight)
        scales = self.scales(rows)
        divisor = scales.divisor(len(rows))
        bins = make_bins(rows, divisor, h)
        found = self.design(bins)
        lam = self.lam * bins.mean_energy
        if self.compensate and len(found.codewords) > 1:
            codes = self._compensated(rows, divisor, h, math.prod(weight.shape[2:]), found, lam)
        elif h is not None:
            codes = assign_weighted(rows, divisor, h, found.codewords, lam * found.prices)
        else:
            codes = assign(rows, divisor, found.thresholds)
        return _shared(codes, found.codewords, scales, weight.shape, found.grid)

    def scales(self, rows: np.ndarray) -> Scales:
        """What rows (r, c) are divided by: each its own root mean square, or all the tensor's."""
        return row_scales(rows) if self.granularity == "row" else Scales(None, _rms(rows))

    def design(self, bins: Bins) -> Codebook:
        """The codebook for bins of scaled weights."""
        spacings = (_COMPENSATED_SPACING,) if self.compensate else SPACINGS
        # Weights that matter more than the mean want a finer grid; those that matter less then skip most of it.
        finer = math.sqrt(bins.unevenness)
        return ecsq(
            bins,
            self.lam * bins.mean_energy,
            free=self.codebook == "free",
            max_codewords=self.max_clusters,
            spacings=tuple(spacing / finer for spacing in spacings),
        )

    def _compensated(
        self,
        rows: np.ndarray,
        divisor: np.ndarray | None,
        h: np.ndarray | None,
        kernel: int,
        found: Codebook,
        lam: float,
    ) -> np.ndarray:
        """Codes (r, c), with prices as compensation makes them: errors passed on use rare codewords more often."""

        def codes(every: int, prices: np.ndarray) -> np.ndarray:
            scale, importance = (None if array is None else array[::every] for array in (divisor, h))
            return assign_compensated(rows[::every], scale, importance, kernel, found.codewords, lam * prices)

        sample = codes(max(1, rows.size // _SAMPLE), found.prices)
        return codes(1, code_prices(np.bincount(sample.reshape(-1), minlength=len(found.codewords))))


BuiltIn: TypeAlias = Keep | KMeans | RateAware


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


def midpoints(codebook: np.ndarray) -> np.ndarray:
    """(k-1,) thresholds of nearest-codeword assignment."""
    wide = codebook.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2


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
    return Scales(np.maximum(norms / unit, 2.0**-14).astype(ml_dtypes.float8_e5m2), unit)


def _rms(rows: np.ndarray) -> float:
    energy = sum(float(np.sum(np.square(row, dtype=np.float64))) for row in rows)
    return max(math.sqrt(energy / rows.size), _LEAST_SCALE) if energy else 1.0


def _rows_of(importance: np.ndarray | None) -> np.ndarray | None:
    return None if importance is None else as_rows(importance)


def _shared(
    codes: np.ndarray, codebook: np.ndarray, scales: Scales, shape: tuple[int, ...], grid: float | None = None
) -> Expr:
    """The expression of weight sharing from codes (r, c) and a codebook (k,) for scaled weights.

    With a grid the codebook is stored as whole numbers, which take a few bytes however many they are, and a step.
    """
    expr: Expr
    if grid is None:
        expr = Lookup(codes[None], (codebook * scales.unit).astype(np.float32).reshape(1, -1, 1))
    else:
        steps = np.rint(codebook / grid)
        whole = steps.astype(np.int8 if np.abs(steps).max() < 128 else np.int16)
        expr = Affine(Lookup(codes[None], whole.reshape(1, -1, 1)), np.full((1, 1, 1), grid * scales.unit, np.float32))
    if scales.relative is not None:
        expr = Affine(expr, scales.relative.reshape(-1, 1, 1))
    return Reshape(expr, shape)
