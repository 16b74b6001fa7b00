"""Scalar clustering as the papers do it: Lloyd's algorithm from a start, and a number of codewords that is found.

`KMeans` is optimal for a given number and the better choice where that is known; these are what it is compared with,
and what finds the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from codeword.errors import PlanError
from codeword.expr import DTYPES, Expr, Raw
from codeword.math.bins import Bins, make_bins
from codeword.math.birch import birch, scan, sweep, threshold_of
from codeword.math.density import MAX_CODEWORDS, density_kmeans, density_start
from codeword.math.row_scaled import row_scaled
from codeword.math.starts import Descent, linear_start, lloyd, one_each, plus_plus_start, random_start
from codeword.methods.base import Granularity, Scales, as_rows, rows_of, scales_by, shared
from codeword.methods.scalar import assigned

_MOST_SEEDS = 4096  # of k-means++, whose time grows with the square: seconds for these
_MOST_DB = 60.0  # a histogram's bins are finer than this, and a codebook of thousands is none
_MARGIN = 1e-6  # for codewords in float32


class Lloyd(msgspec.Struct, frozen=True, tag_field="method", tag="lloyd", forbid_unknown_fields=True):
    """Lloyd's algorithm to at most `n_clusters` codewords (methods A1), until an iteration gains less than 1e-4.

    start: "linear" from the least to the largest weight (Han et al. 2016), "random" weights, "kmeans++" (greedy),
    "density" quantiles of the density to the power 1/3. Codewords that end without members are dropped.
    """

    n_clusters: int
    start: Literal["linear", "random", "kmeans++", "density"] = "linear"
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        _check_count("lloyd", self.n_clusters)
        if self.start == "kmeans++" and self.n_clusters > _MOST_SEEDS:
            raise PlanError(f"lloyd: kmeans++ takes n_clusters up to {_MOST_SEEDS}, got {self.n_clusters}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup, under an Affine of row scales if the granularity is "row"."""
        return _compress(weight, importance, self.granularity, lambda bins: self.cluster(bins, generator))

    def cluster(self, bins: Bins, generator: np.random.Generator) -> Descent:
        """The clusters of bins of scaled weights."""
        k = self.n_clusters
        if k >= len(bins.values):
            return one_each(bins)
        match self.start:
            case "linear":
                codebook = linear_start(bins, k)
            case "random":
                codebook = random_start(bins, k, generator)
            case "kmeans++":
                codebook = plus_plus_start(bins, k, generator)
            case "density":
                codebook = density_start(bins, k)
        return lloyd(bins, codebook)


class DensityKMeans(msgspec.Struct, frozen=True, tag_field="method", tag="density-kmeans", forbid_unknown_fields=True):
    """k-means from the distribution of the weights (Wang, Chen & Wu 2017; methods A2), whose codewords are revised.

    n_clusters: how many codewords; None finds the number for which squared error + lam * coded bits is least. lam: the
    squared error that a bit is worth, in units of the mean square, as in `RateAware`; idle if n_clusters is given.
    """

    n_clusters: int | None = None
    lam: float = 0.01
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        if self.n_clusters is not None:
            _check_count("density-kmeans", self.n_clusters)
        if not (self.lam > 0 and math.isfinite(self.lam)):
            raise PlanError(f"density-kmeans: lam must be a positive number, got {self.lam}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup, under an Affine of row scales if the granularity is "row"."""
        del generator
        return _compress(weight, importance, self.granularity, self.cluster)

    def cluster(self, bins: Bins) -> Descent:
        """The clusters of bins of scaled weights."""
        return density_kmeans(bins, self.n_clusters, self.lam)


class Birch(msgspec.Struct, frozen=True, tag_field="method", tag="birch", forbid_unknown_fields=True):
    """As few codewords as an error target allows, by BIRCH, k-means++ and Lloyd (Jia 2019; methods A3).

    sqnr_db: what the weights' energy must be above that of their errors, each weighted by importance; 20 dB are 1 % of
    the energy. It holds for float32 weights; those of fewer bits are then rounded to their own. scan: "bins" reads a
    histogram by rising value, approximate and fast; "raw" every weight in its place, with the clusters that
    scikit-learn's Birch finds at the same threshold. granularity "row": of rows over their size, for which sqnr_db then
    holds, so that small rows are not rounded away by large ones.
    """

    sqnr_db: float
    scan: Literal["bins", "raw"] = "bins"
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        if not 0 < self.sqnr_db <= _MOST_DB:
            raise PlanError(f"birch: sqnr_db must lie above 0 and up to {_MOST_DB}, got {self.sqnr_db}")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup of as many codewords as were found, under an Affine of row scales if the granularity is "row"."""
        rows, h = as_rows(weight), rows_of(importance)

        def cluster(bins: Bins) -> Descent:
            target = self.target(bins)
            threshold = threshold_of(bins, target)
            leaves = scan(scaled(), threshold, h) if self.scan == "raw" else sweep(bins, threshold)
            return birch(bins, leaves, target, generator)

        def scaled() -> np.ndarray:
            divisor = scales_by(self.granularity, rows).divisor(len(rows))
            return rows if divisor is None else rows / divisor[:, None]

        return _compress(weight, importance, self.granularity, cluster)

    def target(self, bins: Bins) -> float:
        """The largest sum of squared errors that is allowed."""
        return bins.energy * 10 ** (-self.sqnr_db / 10) * (1 - _MARGIN)


class RowScaled(msgspec.Struct, frozen=True, tag_field="method", tag="row-scaled", forbid_unknown_fields=True):
    """Optimal clustering with a scale and sign for each row (Wu et al. 2019; methods A4); one codebook serves all rows.

    scales "coded": those with the least error at equal bytes, codes entropy-coded: fitted, square roots of the rows'
    sizes, with a sign or without, or none. "fitted": the least error for `n_clusters`; codes, codewords and scales take
    turns until nothing is gained, then scales are rounded to scale_dtype and the rest is fitted to those. Rows below
    2**-14 of the largest weight count as that. `math.factored.product` takes n_clusters + 1 multiplications an output.
    """

    n_clusters: int
    scale_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    scales: Literal["coded", "fitted"] = "coded"

    def __post_init__(self) -> None:
        _check_count("row-scaled", self.n_clusters)

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """Lookup under an Affine of row scales, unless none are best."""
        del generator
        rows, h = as_rows(weight), rows_of(importance)
        if not rows.size:
            return Raw(weight)
        dtype = DTYPES[self.scale_dtype]
        found = row_scaled(rows, h, self.n_clusters, dtype, coded=self.scales == "coded")
        none = self.scales == "coded" and np.all(found.scales == 1)
        scales = Scales(None if none else found.scales.astype(dtype), found.unit)
        return shared(found.codes, found.codebook, scales, weight.shape)


def _check_count(method: str, n_clusters: int) -> None:
    if not 1 <= n_clusters <= MAX_CODEWORDS:
        raise PlanError(f"{method}: n_clusters must lie in 1..{MAX_CODEWORDS}, got {n_clusters}")


def _compress(
    weight: np.ndarray, importance: np.ndarray | None, granularity: Granularity, cluster: Callable[[Bins], Descent]
) -> Expr:
    """The expression of weight sharing for whatever clusters the bins of a weight are given."""
    rows, h = as_rows(weight), rows_of(importance)
    if not rows.size:
        return Raw(weight)
    scales = scales_by(granularity, rows)
    divisor = scales.divisor(len(rows))
    bins = make_bins(rows, divisor, h)
    codes, codebook = assigned(bins, rows, divisor, h, cluster(bins).codebook)
    return shared(codes, codebook, scales, weight.shape)
