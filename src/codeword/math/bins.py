"""Sorted bins with prefix sums: all that one-dimensional clustering needs to know of a tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codeword.kernels.assign import assign, assign_parts, cluster_sums, float_edges
from codeword.kernels.histogram import Sums, bin_keys, histogram, is_16_bit, prefixes

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
    if np.all(sums.weight > 0):
        return sums.first / sums.weight
    (known,) = np.nonzero(sums.weight > 0)
    if not len(known):
        return np.zeros(len(sums.weight))
    return np.interp(np.arange(len(sums.weight)), known, sums.first[known] / sums.weight[known])


def assign_members(
    bins: Bins, values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (r, c), and the weight and first moment of each codeword's members (k,), of what bins were made from.

    With one importance for all they come from the bins, of which thresholds cut but a few: the weights are read once.
    """
    if importance is not None or values.size <= _EXACT:
        codes = assign(values, scale, thresholds)
        return codes, *cluster_sums(values, scale, importance, codes, len(thresholds) + 1)[1:]
    counts = np.diff(bins.counts)
    first = bins.values * counts
    if is_16_bit(values) and scale is None:  # a bin is one value, and lies on one side
        codes = assign(values, scale, thresholds)
        ends = np.searchsorted(bins.values, float_edges(thresholds), side="right")
        return codes, _between(counts, ends), _between(first, ends)
    codes, parts = assign_parts(values, scale, thresholds)
    keys = bin_keys(bins.values.astype(np.float32))
    ends = np.searchsorted(keys, parts.keys)
    (cut,) = np.nonzero(parts.counts)
    np.subtract.at(counts, ends[cut], parts.counts[cut])
    np.subtract.at(first, ends[cut], parts.first[cut])
    first[counts == 0] = 0
    mass, moment = _between(counts, ends), _between(first, ends)
    mass[:-1] += parts.counts
    moment[:-1] += parts.first
    return codes, mass, moment


def _between(parts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(k,) sums of parts (m,) up to the first of ends (k-1,), from there to the next, and so on."""
    starts = np.concatenate([[0], ends])
    sums = np.add.reduceat(np.append(parts, 0.0), starts)  # of an empty range it gives the part behind it
    return np.where(np.diff(np.append(starts, len(parts))) > 0, sums, 0.0)


def shares(bins: Bins) -> np.ndarray:
    """(m+1,) rising from 0: (weight * gap**2)**(1/3) cumulated, which an optimal codebook deals out evenly."""
    gap = np.gradient(bins.values) if len(bins.values) > 1 else np.zeros(1)
    part = np.cbrt(np.maximum(np.diff(bins.prefix[0]), 0) * gap * gap)
    return np.concatenate([[0.0], np.cumsum(part)])


def super_bins(bins: Bins, most: int, share: np.ndarray | None = None) -> np.ndarray:
    """(s+1,) starts of at most `most` runs of neighbouring bins, which clustering may treat as one bin each.

    Half of them follow `shares`, each region's share of the error of an optimal codebook, and half the index, so that
    no region is left to one giant run. By counts alone, outliers make a clustering on super-bins up to 17 % worse.
    """
    m = len(bins.values)
    if m <= most:
        return np.arange(m + 1)
    rising = (shares(bins) if share is None else share)[1:]
    by_share = np.searchsorted(rising, np.linspace(0, rising[-1], most // 2))
    by_index = np.linspace(0, m, most // 2).astype(np.int64)
    return np.unique(np.concatenate([[0, m], by_share, by_index]))


def centroids(bins: Bins, low: np.ndarray, high: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Weighted means of bins [low, high), or otherwise where nothing weighs anything; all of one shape."""
    s0, s1 = (part[high] - part[low] for part in bins.prefix[:2])
    return weighted_means(s1, s0, otherwise)


def weighted_means(first: np.ndarray, mass: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """first / mass, or otherwise where nothing weighs anything; shapes broadcast."""
    return np.where(mass > 0, first / np.where(mass > 0, mass, 1), otherwise)


def coarser(bins: Bins, most: int) -> Bins:
    """At most `most` bins: enough for estimates, small enough to keep for every tensor."""
    starts = super_bins(bins, most)
    prefix = bins.prefix[:, starts]
    weight, first = np.diff(prefix[0]), np.diff(prefix[1])
    means = weighted_means(first, weight, bins.values[starts[:-1]])
    return Bins(means, bins.counts[starts], prefix, bins.unevenness)


def _with_prefixes(values: np.ndarray, sums: Sums, unevenness: float) -> Bins:
    counts, *moments = prefixes(np.stack(sums), int(np.searchsorted(values, 0.0)))
    return Bins(values, counts, np.stack(moments), unevenness)
