"""BIRCH in one dimension, then k-means++ and Lloyd: the number of codewords follows from an error (Jia 2019; A3).

A clustering feature is (N, LS, SS): the weight of its members, their sum and the sum of their squares. On a line the
tree of features is a sorted array of leaves, so the nearest one is found by bisection (Zhang, Ramakrishnan & Livny
1996 need a tree because there is no order in space). A value joins the nearest leaf if the radius stays within the
threshold, or else founds its own. The radius follows from the error that is allowed: leaves that are all so wide make
a sixteenth of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codeword.kernels.birch import cluster_features
from codeword.math.bins import Bins
from codeword.math.starts import Descent, lloyd, one_each, plus_plus

_FINER = 4  # leaves than the target needs: with just enough, k-means++ has little choice (40 dB: k up by a third)
_FIRST_SEEDS = 64  # doubled until they meet the target


class Leaves(NamedTuple):
    """Clustering features by rising mean, each (p,) float64."""

    weight: np.ndarray  # N
    first: np.ndarray  # LS
    second: np.ndarray  # SS

    @property
    def means(self) -> np.ndarray:
        """(p,) centres."""
        return self.first / self.weight


def threshold_of(bins: Bins, target: float) -> float:
    """The radius of leaves for an SSE of target: were every leaf as wide, they would make a 16th of it."""
    mass = float(bins.prefix[0][-1] - bins.prefix[0][0])
    return math.sqrt(target / mass) / _FINER if mass > 0 else 0.0


def scan(values: np.ndarray, threshold: float, importance: np.ndarray | None = None) -> Leaves:
    """Leaves of values of any shape, taken in their order, as scikit-learn's Birch finds them in one large node.

    Values without importance are skipped. About 10 ns a value; a hundred times that without the native core.
    """
    flat = None if importance is None else importance.reshape(-1)
    return Leaves(*cluster_features(values.reshape(-1), flat, threshold))


def sweep(bins: Bins, threshold: float) -> Leaves:
    """Leaves of a histogram, its bins taken by rising value: approximate, because a sorted scan fills leaf by leaf.

    Every leaf has a radius within the threshold, but for single bins. Costs a bisection for each leaf.
    """
    m = len(bins.values)
    edges = [0]
    while (low := edges[-1]) < m:
        # Gallop, then bisect: the radius grows with the right end, but where heavy bins follow light ones.
        fits, step = low + 1, 1
        while low + step < m and _fits(bins, low, low + step + 1, threshold):
            fits = low + step + 1
            step *= 2
        over = min(low + step, m) + 1
        while over - fits > 1:
            middle = (over + fits) // 2
            fits, over = (middle, over) if _fits(bins, low, middle, threshold) else (fits, middle)
        edges.append(fits)
    parts = np.diff(bins.prefix[:, edges], axis=1)
    return Leaves(*parts[:, parts[0] > 0])


def _fits(bins: Bins, low: int, high: int, threshold: float) -> bool:
    s0, s1, s2 = (float(part[high] - part[low]) for part in bins.prefix)
    return s0 <= 0 or s2 / s0 - (s1 / s0) ** 2 <= threshold * threshold


def birch(bins: Bins, leaves: Leaves, target: float, generator: np.random.Generator) -> Descent:
    """The fewest codewords, seeded from the leaves by k-means++ and moved by Lloyd, whose SSE is target at most.

    One order of seeds serves all k, each taking the head of it. k meets the target and k - 1 does not; iterations
    counts those of all k tried. If the leaves themselves miss the target, so does every k: each bin gets a codeword.
    """
    if not len(leaves.weight) or not bins.energy > 0:
        return lloyd(bins, bins.values[len(bins.values) // 2 :][:1])
    means = leaves.means
    most, iterations = min(_FIRST_SEEDS, len(means)), 0
    while True:
        seeds = plus_plus(means, leaves.weight, most, generator)
        best = lloyd(bins, seeds)
        iterations += best.iterations
        if best.sse <= target:
            break
        if most == len(means):
            return one_each(bins)
        most = min(2 * most, len(means))
    misses, meets = 0, len(seeds)
    while meets - misses > 1:
        k = (misses + meets) // 2
        found = lloyd(bins, seeds[:k])
        iterations += found.iterations
        if found.sse <= target:
            best, meets = found, k
        else:
            misses = k
    return best._replace(iterations=iterations)
