"""Exact one-dimensional k-means on a histogram: the best codebook there is, not the best that some start finds.

Dynamic programming over sorted values (Wu 1991; Wang & Song 2011; Gronlund et al. 2017), whose cost does not depend on
the number of weights: solve on super-bins, then let every boundary move over the bins around its place, all boundaries
together, at ever finer spacing. Beyond 256 codewords their price is sought instead, as for groups (`kernels.groups`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels.groups import best_edges
from codeword.kernels.partition import best_partition, best_path
from codeword.math.bins import Bins, centroids, shares, super_bins

_CURVE = 2048  # super-bins that a curve is solved on, at least
_CURVE_PER_CLUSTER = 16
_COARSE = 1024  # super-bins of the first solution, at least
_COARSE_PER_CLUSTER = 8
_NEAR = np.linspace(-2, 2, 129)  # how many clusters away a boundary is tried in a pass of the first refinement
_MOST_LAYERS = 256  # time and memory of layers grow with the square of their number
_PASSES = 64  # of a refinement at most; it ends by itself, unless equal costs make it wander
_WINDOW = 33  # places tried for each boundary in one pass of the last refinement


class Clusters(NamedTuple):
    """A clustering of bins into intervals."""

    codebook: np.ndarray  # (k,) rising codewords, the weighted means of their members
    edges: np.ndarray  # (k+1,) bin indices, cluster j is bins [edges[j], edges[j+1])
    sse: float  # sum of importance * (value - codeword)**2


def sse_curve(bins: Bins, k: int) -> np.ndarray:
    """(k,) smallest SSE for 1, 2, ..., k codewords from one run, on super-bins: within a fraction of a percent."""
    prefix = bins.prefix[:, super_bins(bins, max(_CURVE, _CURVE_PER_CLUSTER * k))]
    return best_partition(prefix, min(k, prefix.shape[1] - 1))[0]


def kmeans(bins: Bins, k: int, *, zero: bool = False) -> Clusters:
    """The optimal clustering of bins into at most k intervals (fewer if there are fewer distinct values).

    zero: 0 is one of the codewords (pruned weights stay exactly zero); the cluster it belongs to is then the one whose
    mean is nearest, and the others are as without. If the values are fewer than k, it is one more.
    """
    m = len(bins.values)
    spare = k > m
    k = min(k, m)
    if k == m:
        edges = np.arange(m + 1)
    elif k > _MOST_LAYERS:
        edges = best_edges(bins.prefix, bins.values, k)
    else:
        edges = _refine(bins, _start(bins, k))
    middle = (bins.values[edges[:-1]] + bins.values[edges[1:] - 1]) / 2
    codebook = centroids(bins, edges[:-1], edges[1:], middle)
    if zero and spare and not (codebook == 0).any():
        at = int(np.searchsorted(codebook, 0.0))
        codebook, edges = np.insert(codebook, at, 0.0), np.insert(edges, at, edges[at])
    elif zero and len(codebook):
        codebook[np.argmin(np.abs(codebook))] = 0.0
        codebook.sort()
    s0, s1, s2 = (part[edges[1:]] - part[edges[:-1]] for part in bins.prefix)
    sse = float(np.sum(np.maximum(s2 - 2 * codebook * s1 + codebook * codebook * s0, 0)))
    return Clusters(codebook, edges, sse)


def midpoints(codebook: np.ndarray) -> np.ndarray:
    """(k-1,) thresholds of nearest-codeword assignment."""
    wide = codebook.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2


def _start(bins: Bins, k: int) -> np.ndarray:
    """(k+1,) bin edges near the best: the best on super-bins, then moved as far as clusterings of like cost may lie.

    On so few super-bins clusterings that are 0.4 % apart look alike: one cluster more on one side of a distribution and
    one less on the other. To get from one to the other each boundary between has to move by a cluster.
    """
    share = shares(bins)
    starts = super_bins(bins, max(_COARSE, _COARSE_PER_CLUSTER * k), share)
    edges = starts[best_partition(bins.prefix[:, starts], min(k, len(starts) - 1))[1]]
    k = len(edges) - 1
    for _ in range(_PASSES if k > 1 else 0):
        near = np.interp(np.arange(1, k)[:, None] + _NEAR, np.arange(k + 1), share[edges])
        inner = best_path(np.searchsorted(share[:-1], near), bins.prefix)
        if np.array_equal(inner, edges[1:-1]):
            break
        edges = np.concatenate([edges[:1], inner, edges[-1:]])
    return edges


def _refine(bins: Bins, edges: np.ndarray) -> np.ndarray:
    """Move all inner edges together to their best place on the bins, window by window, until none moves."""
    m = len(bins.values)
    inner = edges[1:-1]
    if not len(inner):
        return edges
    half = _WINDOW // 2
    # A boundary starts with a window that reaches half way into the clusters on either side of it.
    step = np.maximum(1, (edges[2:] - edges[:-2]) // (4 * half))
    for _ in range(_PASSES):
        moved = best_path(np.clip(inner[:, None] + step[:, None] * (np.arange(_WINDOW) - half), 0, m), bins.prefix)
        distance = np.abs(moved - inner)
        inner = moved
        if not distance.any() and np.all(step == 1):
            break
        step = np.where(distance < step * half, np.maximum(1, step // 4), step)  # not at the rim: look closer
    # Empty clusters (edges that coincide) go: their codewords would stand for nothing.
    return np.unique(np.concatenate([[0], inner, [m]]))
