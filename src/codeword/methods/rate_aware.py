"""Rate-aware clustering: codewords and codes of least error + lambda * coded bits, from nothing or from any method."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from codeword.errors import PlanError
from codeword.expr import Expr, Raw
from codeword.kernels.assign import assign, assign_weighted
from codeword.kernels.compensate import assign_compensated
from codeword.kernels.moments import assign_by_moments
from codeword.math.bins import Bins, make_bins
from codeword.math.ecsq import MAX_CODEWORDS, SPACINGS, Codebook, ecsq, prices_of
from codeword.math.moments import Moments
from codeword.methods.base import Granularity, Scales, as_rows, root_mean_square, row_scales, rows_of, shared
from codeword.methods.constrain import Constraint
from codeword.methods.scalar import KMeans
from codeword.methods.scalar_starts import Birch, DensityKMeans, Lloyd, RowScaled
from codeword.methods.vector import KernelTemplates, ProductQuantization

Start: TypeAlias = KMeans | Lloyd | DensityKMeans | Birch | RowScaled | ProductQuantization | KernelTemplates

# Compensation wants a wider grid: output divergence of LeNet-5 and ResNet-20 on training images is flat from 4 to 5.5,
# and a single spacing makes the size of a file fall without jumps as lambda grows.
_COMPENSATED_SPACING = 4.6
_VECTORS = ProductQuantization, KernelTemplates  # whose errors are not made to cancel by moments
_SAMPLE = 1 << 19  # weights that prices are learned from


class RateAware(msgspec.Struct, frozen=True, tag_field="method", tag="rate-aware", forbid_unknown_fields=True):
    """Rate-aware scalar clustering (methods A5): least squared error + lam * coded bits; the k that is best follows.

    lam: the squared error one bit is worth, in units of the tensor's mean square (of each row's, if the granularity is
    "row"), so that it means the same whatever the weights' scale. An importance multiplies the squared errors of the
    scaled weights. codebook "grid": codewords are multiples of one step, a few bytes in the file; "free": each is the
    mean of its members. compensate: errors cancel within kernels and rows (`kernels.compensate`), which costs a little
    SQNR of the weights and saves far more of the outputs'.

    start: another method, whose expression keeps its form (its codebooks, groups, vectors, scales) while codes and
    codewords move to where error + lam * bits is least (Chou, Lookabaugh & Gray 1989). Without one the codebook is
    found here, which is best for scalars. Vectors are not compensated; gains and offsets of templates stay. By measured
    moments scalars are, and up to 64 codewords are fitted to what is left of the outputs' errors.
    """

    lam: float
    granularity: Granularity = "row"
    codebook: Literal["grid", "free"] = "grid"
    max_clusters: int = MAX_CODEWORDS
    compensate: bool = True
    start: Start | None = None

    def __post_init__(self) -> None:
        if not (self.lam > 0 and math.isfinite(self.lam)):
            raise PlanError(f"rate-aware: lam must be a positive number, got {self.lam}")
        if not 1 <= self.max_clusters <= MAX_CODEWORDS:
            raise PlanError(f"rate-aware: max_clusters must lie in 1..{MAX_CODEWORDS}, got {self.max_clusters}")
        group = getattr(self.start, "shared", None)
        if group is not None:
            raise PlanError(
                f"rate-aware: its start shares codebooks as {group!r}, but codewords move tensor by tensor here; leave "
                "out start.shared, or use that method alone"
            )

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup of grid steps or free codewords, under an Affine of row scales or of the step."""
        if not weight.size:
            return Raw(weight)
        if self.start is not None:
            return self._constrained(weight, importance, self.start.compress(weight, importance, generator=generator))
        return self._scalars(weight, rows_of(importance), None)

    def compress_by_moments(self, weight: np.ndarray, moments: Moments, *, generator: np.random.Generator) -> Expr:
        """The same with errors made to cancel as measured; those of vectors count by the diagonal of the moments."""
        rows = len(as_rows(weight))
        if not (weight.size and self.compensate) or isinstance(self.start, _VECTORS):
            return self.compress(weight, moments.diagonal(rows).reshape(weight.shape), generator=generator)
        if self.start is None:
            return self._scalars(weight, None, moments)
        h = moments.compensated(rows).reshape(weight.shape)
        return self._constrained(weight, h, self.start.compress(weight, h, generator=generator), moments)

    def _scalars(self, weight: np.ndarray, h: np.ndarray | None, moments: Moments | None) -> Expr:
        rows = as_rows(weight)
        scales = self.scales(rows)
        divisor = scales.divisor(len(rows))
        bins = make_bins(rows, divisor, h)
        found = self.design(bins)
        lam = self.lam * bins.mean_energy
        if self.compensate and weight.ndim > 1 and len(found.codewords) > 1:  # a vector's errors meet in no sum
            codes = self._compensated(rows, divisor, h, moments, math.prod(weight.shape[2:]), found, lam)
        elif h is not None:
            codes = assign_weighted(rows, divisor, h, found.codewords, lam * found.prices)
        else:
            codes = assign(rows, divisor, found.thresholds)
        return shared(codes, found.codewords, scales, weight.shape, found.grid)

    def scales(self, rows: np.ndarray) -> Scales:
        """What rows (r, c) are divided by: each its own root mean square, or all the tensor's."""
        return row_scales(rows) if self.granularity == "row" else Scales(None, root_mean_square(rows))

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

    def _constrained(
        self, weight: np.ndarray, importance: np.ndarray | None, expr: Expr, moments: Moments | None = None
    ) -> Expr:
        """The expression of the start, moved. Errors count relative to the mean square, as without a start."""
        target, h = weight.astype(np.float32), np.ones((1,) * weight.ndim)
        if importance is not None and importance.any():
            h = importance / np.mean(importance, dtype=np.float64)
        rows = as_rows(weight)
        scales = self.scales(rows).divisor(len(rows))
        if scales is not None:
            unit = scales.astype(np.float64)[: None if self.granularity == "row" else 1]
            h = h / np.square(unit).reshape(-1, *(1,) * (weight.ndim - 1))
        kernel = math.prod(weight.shape[2:]) if self.compensate and weight.ndim > 1 else None
        return Constraint(self.lam, self.codebook == "grid", kernel, moments).apply(expr, target, h)

    def _compensated(
        self,
        rows: np.ndarray,
        divisor: np.ndarray | None,
        h: np.ndarray | None,
        moments: Moments | None,
        kernel: int,
        found: Codebook,
        lam: float,
    ) -> np.ndarray:
        """Codes (r, c), with prices as compensation makes them: errors passed on use rare codewords more often."""
        factors = [] if moments is None else moments.factors

        def codes(every: int, prices: np.ndarray) -> np.ndarray:
            scale, importance = (None if array is None else array[::every] for array in (divisor, h))
            some, penalty = rows[::every], lam * prices
            if not factors:
                return assign_compensated(some, scale, importance, kernel, found.codewords, penalty)
            ends = -(-np.arange(len(factors) + 1) * (len(rows) // len(factors)) // every)
            parts = [
                assign_by_moments(some[a:b], None if scale is None else scale[a:b], upper, found.codewords, penalty)
                for upper, a, b in zip(factors, ends[:-1], ends[1:], strict=True)
            ]
            return np.concatenate(parts)

        sample = codes(max(1, rows.size // _SAMPLE), found.prices)
        return codes(1, prices_of(sample, len(found.codewords)))
