"""Lloyd's algorithm on sorted bins, and the starts it is compared from (methods A1).

One iteration needs no pass over the bins: with prefix sums the means of k intervals cost k look-ups and the borders k
binary searches. What remains different between starts is where they lead, and how soon.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels.partition import interval_cost
from codeword.math.bins import Bins, centroids, coarser
from codeword.math.kmeans import midpoints

TOLERANCE = 1e-4  # the one stopping rule: an iteration that gains less than this part of the SSE was the last
MAX_ITERATIONS = 1000
_SEEDING_BINS = 4096  # k-means++ looks at no more points than this (or 8 a codeword)


class Descent(NamedTuple):
    """A clustering of bins into intervals, and how long it took to find."""

    codebook: np.ndarray  # (k,) rising codewords, the weighted means of their members
    edges: np.ndarray  # (k+1,) bin indices, cluster j is bins [edges[j], edges[j+1])
    sse: float  # sum of importance * (value - codeword)**2
    iterations: int


def lloyd(bins: Bins, start: np.ndarray, tolerance: float = TOLERANCE) -> Descent:
    """Lloyd's algorithm from codewords start (k,), until an iteration gains less than tolerance * SSE.

    Codewords that lose their last member are dropped at the end, so the result may hold fewer than k.
    """
    codebook = np.sort(np.asarray(start, np.float64))
    before, edges, sse, iterations = np.inf, np.array([0, len(bins.values)]), np.inf, 0
    while iterations < MAX_ITERATIONS:
        codebook, edges, sse = step(bins, codebook)
        iterations += 1
        if not before - sse > tolerance * sse:
            break
        before = sse
    return without_empty(codebook, edges, sse, iterations)


def step(bins: Bins, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """One iteration of Lloyd's algorithm from codewords (k,): the means (k,) of their members, edges (k+1,), SSE."""
    edges = borders(bins, codebook)
    s0, s1, s2 = np.diff(bins.prefix[:, edges])
    full = s0 > 0
    means = s1 / np.where(full, s0, 1)
    cost = np.where(full, np.maximum(s2 - s1 * means, 0), 0)
    return np.sort(np.where(full, means, codebook)), edges, float(cost.sum())


def without_empty(codebook: np.ndarray, edges: np.ndarray, sse: float, iterations: int) -> Descent:
    """A clustering less the codewords (k,) that hold no bins between edges (k+1,)."""
    kept = np.diff(edges) > 0
    return Descent(codebook[kept], np.append(edges[:-1][kept], edges[-1]), sse, iterations)


def one_each(bins: Bins) -> Descent:
    """A codeword for every bin: what there is to do where no fewer are asked for."""
    edges = np.arange(len(bins.values) + 1)
    codebook = centroids(bins, edges[:-1], edges[1:], bins.values)
    return Descent(codebook, edges, float(costs(bins, edges).sum()), 0)


def borders(bins: Bins, codebook: np.ndarray) -> np.ndarray:
    """(k+1,) edges of nearest-codeword assignment; a value half way goes down, as in `kernels.assign`."""
    inner = np.searchsorted(bins.values, midpoints(codebook), side="right")
    return np.concatenate([[0], inner, [len(bins.values)]])


def costs(bins: Bins, edges: np.ndarray) -> np.ndarray:
    """(k,) squared error of each interval about its mean."""
    return interval_cost(bins.prefix, edges[:-1], edges[1:])


# -- starts: bins and k to at most k codewords --------------------------------------------------------------------


def linear_start(bins: Bins, k: int) -> np.ndarray:
    """Evenly from the smallest value to the largest (Han et al. 2016)."""
    return np.linspace(bins.values[0], bins.values[-1], k)


def random_start(bins: Bins, k: int, generator: np.random.Generator) -> np.ndarray:
    """k values drawn without repetition, in proportion to their weight."""
    weight = np.diff(bins.prefix[0])
    with np.errstate(divide="ignore"):
        clocks = generator.exponential(size=len(weight)) / weight  # the k alarms that ring first
    k = min(k, len(weight))
    return bins.values[np.argpartition(clocks, k - 1)[:k]]


def plus_plus_start(bins: Bins, k: int, generator: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007) over at most 4096 super-bins, or 8 a codeword."""
    points = coarser(bins, max(_SEEDING_BINS, 8 * k))
    return plus_plus(points.values, np.diff(points.prefix[0]), k, generator)


def plus_plus(points: np.ndarray, weight: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """At most k of points (p,), in the order in which greedy k-means++ picks them: any head of it is a start, too.

    Each is the best of 2 + log k draws in proportion to weight * squared distance to the nearest point picked.
    """
    weight = weight if weight.sum() > 0 else np.ones(len(weight))
    first = int(np.searchsorted(np.cumsum(weight), generator.random() * weight.sum()))
    picked = [min(first, len(points) - 1)]
    error = weight * np.square(points - points[picked[0]])
    trials = 2 + int(np.log(k))
    while len(picked) < k and error.sum() > 0:
        cumulated = np.cumsum(error)
        draws = np.searchsorted(cumulated, generator.random(trials) * cumulated[-1], side="right")
        draws = np.minimum(draws, np.nonzero(error)[0][-1])
        trial = np.minimum(error, weight * np.square(points - points[draws][:, None]))
        best = int(np.argmin(trial.sum(axis=1)))
        picked.append(int(draws[best]))
        error = trial[best]
    return points[picked]
