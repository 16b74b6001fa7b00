"""The scan of BIRCH in one dimension: every value in its turn joins the nearest leaf, or founds one of its own.

A leaf is a clustering feature (N, LS, SS). Where a value goes depends on all that came before, so this is one thread's
work; what it costs is the search, and neighbours in value were often found a moment ago.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from codeword.kernels import native

_CHUNK = 1 << 15  # values that are wide at one time
_HINTS = 1 << 12  # equal parts of the range of values, each of which remembers where its last one was found
_ROOM = 1 << 10  # leaves to begin with


def cluster_features(values: np.ndarray, importance: np.ndarray | None, threshold: float) -> np.ndarray:
    """(3, p) float64: N, LS and SS of the leaves of values (n,), taken in their order; by rising mean.

    A value joins the leaf with the nearest mean, the lower of two, if the radius of that stays within threshold.
    importance (n,): what a value counts for; those of 0 are skipped.
    """
    run = cluster_features_numpy if native.library() is None else _cluster_features_native
    return run(values, importance, threshold)


def cluster_features_numpy(values: np.ndarray, importance: np.ndarray | None, threshold: float) -> np.ndarray:
    """Reference of `cluster_features`: a plain loop, about a microsecond a value."""
    means: list[float] = []
    features: list[tuple[float, float, float]] = []
    limit = threshold * threshold
    for part, weight in _chunks(values, importance):
        for x, h in zip(part.tolist(), np.ones(len(part)).tolist() if weight is None else weight.tolist(), strict=True):
            if not h > 0:
                continue
            at = bisect_left(means, x)
            if means:
                near = at - 1 if at == len(means) or (at and x - means[at - 1] <= means[at] - x) else at
                n, first, second = features[near]
                n, first, second = n + h, first + h * x, second + h * x * x
                mean = first / n
                if second / n - mean * mean <= limit:
                    # Between its old place and x, which rounding must not carry it out of: means stay in order.
                    means[near] = max(min(means[near], x), min(max(means[near], x), mean))
                    features[near] = (n, first, second)
                    continue
            means.insert(at, x)
            features.insert(at, (h, h * x, h * x * x))
    return np.array(features, np.float64).reshape(-1, 3).T


def _cluster_features_native(values: np.ndarray, importance: np.ndarray | None, threshold: float) -> np.ndarray:
    if values.ndim != 1 or (importance is not None and importance.shape != values.shape):
        raise ValueError(f"values must be (n,), got {values.shape}, with an importance for each if any")
    leaves = np.empty((_ROOM, 4))  # mean, N, LS, SS; the first and the last are sentinels
    hints, count, grid = np.zeros(_HINTS, np.int64), np.zeros(1, np.int64), (0.0, 0.0)
    for part, weight in _chunks(values, importance):
        if not hints.any():
            low, high = float(part.min()), float(part.max())
            grid = (low, _HINTS / (high - low) if math.isfinite(high - low) and high > low else 0.0)
        done = 0
        while True:
            done += native.call(
                "cw_cluster_features",
                *(part[done:], None if weight is None else weight[done:], len(part) - done),
                *(np.array([threshold * threshold, *grid]), hints, len(hints), leaves, len(leaves), count),
            )
            if done == len(part):
                break
            leaves = np.concatenate([leaves, np.empty_like(leaves)])
    return leaves[1 : 1 + int(count[0]), 1:].T.copy()


def _chunks(values: np.ndarray, importance: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Values and importance as float64, piece by piece."""
    for start in range(0, len(values), _CHUNK):
        here = slice(start, start + _CHUNK)
        weight = None if importance is None else importance[here].astype(np.float64)
        yield values[here].astype(np.float64), weight
