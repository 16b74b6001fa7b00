"""Sorted bins with prefix sums: all that one-dimensional clustering needs to know of a tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codeword.kernels.histogram import Sums, histogram

_EXACT = 1 << 18  # up to this many values each distinct one has a bin of its own


class Bins(NamedTuple):
    """m bins by rising value.

    Prefix sums start at the bin nearest to zero and run outwards, so that a sum over an interval is as precise as its
    own largest member and an outlier at the far end spoils nothing.
    """

    values: np.ndarray  # (m,) weighted mean of each bin
    counts: np.ndarray  # (m+1,) prefix of the number of weights
    prefix: np.ndarray  # (3, m+1) prefixes of importance, importance * value, importance * value**2
    unevenness: float = 1.0  # root mean square of the importance over its mean: 1 where all weights matter alike

    @property
    def n(self) -> float:
        """Number of weights."""
        return float(self.counts[-1] - self.counts[0])

    @property
    def energy(self) -> float:
        """Sum of importance * value**2: the error of a tensor of zeros."""
        return float(self.prefix[2][-1] - self.prefix[2][0])

    @property
    def mean_energy(self) -> float:
        """Energy of one weight on average."""
        return self.energy / self.n


def make_bins(values: np.ndarray, scale: np.ndarray | None = None, importance: np.ndarray | None = None) -> Bins:
    """Bins of values (r, c), finite, each row divided by scale (r,), weighted by importance (r, c) >= 0."""
    unevenness = 1.0 if importance is None else _unevenness(importance)
    if values.size > _EXACT:
        sums = histogram(values, scale, importance)
        return _with_prefixes(_means(sums), sums, unevenness)
    scaled = values.astype(np.float64)
    if scale is not None:
        scaled /= scale[:, None].astype(np.float64)
    h = np.ones(scaled.size) if importance is None else importance.reshape(-1).astype(np.float64)
    distinct, index = np.unique(scaled, return_inverse=True)
    index = index.reshape(-1)
    weight = np.bincount(index, h, len(distinct))
    count = np.bincount(index, minlength=len(distinct)).astype(np.float64)
    return _with_prefixes(distinct, Sums(count, weight, weight * distinct, weight * distinct * distinct), unevenness)


def _unevenness(importance: np.ndarray) -> float:
    mean = float(np.mean(importance, dtype=np.float64))
    square = float(np.mean([np.mean(np.square(row, dtype=np.float64)) for row in importance]))
    return math.sqrt(square) / mean if mean > 0 else 1.0


def _means(sums: Sums) -> np.ndarray:
    """Weighted mean of each bin; one without importance still needs a place in the order, between its neighbours."""
    (known,) = np.nonzero(sums.weight > 0)
    if not len(known):
        return np.zeros(len(sums.weight))
    return np.interp(np.arange(len(sums.weight)), known, sums.first[known] / sums.weight[known])


def super_bins(bins: Bins, most: int) -> np.ndarray:
    """(s+1,) starts of at most `most` runs of neighbouring bins, which clustering may treat as one bin each.

    Half of them follow the cumulated (count * gap**2)**(1/3), each region's share of the error of an optimal codebook,
    and half the index, so that no region is left to one giant run. By counts alone, outliers make a clustering on
    super-bins up to 17 % worse.
    """
    m = len(bins.values)
    if m <= most:
        return np.arange(m + 1)
    gap = np.gradient(bins.values)
    share = np.cumsum(np.cbrt(np.maximum(np.diff(bins.prefix[0]), 0) * gap * gap))
    by_share = np.searchsorted(share, np.linspace(0, share[-1], most // 2))
    by_index = np.linspace(0, m, most // 2).astype(np.int64)
    return np.unique(np.concatenate([[0, m], by_share, by_index]))


def coarser(bins: Bins, most: int) -> Bins:
    """At most `most` bins: enough for estimates, small enough to keep for every tensor."""
    starts = super_bins(bins, most)
    prefix = bins.prefix[:, starts]
    weight, first = np.diff(prefix[0]), np.diff(prefix[1])
    means = np.where(weight > 0, first / np.where(weight > 0, weight, 1), bins.values[starts[:-1]])
    return Bins(means, bins.counts[starts], prefix, bins.unevenness)


def _with_prefixes(values: np.ndarray, sums: Sums, unevenness: float) -> Bins:
    anchor = int(np.searchsorted(values, 0.0))
    return Bins(
        values,
        _prefix(sums.counts, anchor),
        np.stack([_prefix(part, anchor) for part in (sums.weight, sums.first, sums.second)]),
        unevenness,
    )


def _prefix(parts: np.ndarray, anchor: int) -> np.ndarray:
    """(m+1,) P with P[j] - P[i] = sum of parts[i:j] and P[anchor] = 0."""
    right = np.cumsum(parts[anchor:])
    left = -np.cumsum(parts[:anchor][::-1])[::-1]
    return np.concatenate([left, [0.0], right])
