"""The inner steps of optimal one-dimensional clustering: dynamic programs over sorted bins.

A cluster of an optimal clustering is an interval of the sorted values (Wu 1991), so with prefix sums S0 (weights),
S1 (weights * values), S2 (weights * values**2) the cost of bins [i, j) is
S2 - S1**2 / S0 of that range, and D_k[j] = min_i D_{k-1}[i] + cost(i, j). The best i never moves left as j moves right,
which divide and conquer turns into O(m log m) a layer instead of O(m**2).
"""

from __future__ import annotations

import numpy as np

from codeword.kernels import native


def interval_cost(prefix: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared error of bins [i, j) about their mean; prefix (3, m+1) holds S0, S1, S2. Broadcasts i against j."""
    s0 = prefix[0][j] - prefix[0][i]
    s1 = prefix[1][j] - prefix[1][i]
    s2 = prefix[2][j] - prefix[2][i]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = s2 - s1 * s1 / s0
    return np.where(s0 > 0, np.maximum(cost, 0), 0)  # rounding may leave a little less than nothing


def best_partition(prefix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(curve, edges): the least costs of m bins in 1, 2, ..., k clusters, and where the k are; prefix (3, m+1).

    Edges rise from 0 to m; two that coincide leave a cluster empty.
    """
    if not k >= 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    run = best_partition_numpy if native.library() is None else _best_partition_native
    return run(prefix, k)


def best_path(candidates: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Cheapest boundaries, one from each row of candidates (k-1, w), which rise within a row. Returns (k-1,) positions.

    Positions may repeat, which leaves a cluster empty.
    """
    run = best_path_numpy if native.library() is None else _best_path_native
    return run(candidates, prefix)


def best_partition_numpy(prefix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference of `best_partition`."""
    places = np.arange(prefix.shape[1])
    layer = interval_cost(prefix, np.zeros(1, np.int64), places)
    curve, backs, edges = [layer[-1]], [], [len(places) - 1]
    for _ in range(1, k):
        layer, back = _next_layer(layer, prefix, places, places)
        curve.append(layer[-1])
        backs.append(back)
    for back in reversed(backs):
        edges.append(int(back[edges[-1]]))
    return np.array(curve), np.array([0, *edges[::-1]])


def best_path_numpy(candidates: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Reference of `best_path`."""
    m = prefix.shape[1] - 1
    total = interval_cost(prefix, np.zeros(1, np.int64), candidates[0])
    back = np.zeros(candidates.shape, np.int64)
    for row in range(1, len(candidates)):
        total, back[row] = _next_layer(total, prefix, candidates[row - 1], candidates[row])
    total = total + interval_cost(prefix, candidates[-1], np.full(1, m))
    pick = int(np.argmin(total))
    chosen = np.empty(len(candidates), np.int64)
    for row in range(len(candidates) - 1, -1, -1):
        chosen[row] = candidates[row][pick]
        pick = back[row][pick]
    return chosen


def _next_layer(
    before: np.ndarray, prefix: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(least cost, which start) up to each of ends (b,), of what lies before one of starts (a,) and a cluster from it.

    before (a,); starts and ends rise. All midpoints of one depth are solved in one pass.
    """
    limit = np.searchsorted(starts, ends, side="right") - 1  # the last start that is not behind the end
    best = np.full(len(ends), np.inf)
    arg = np.zeros(len(ends), np.int64)
    lefts, rights = np.array([0]), np.array([len(ends)])  # open intervals of ends still to solve: [left, right)
    low, high = np.array([0]), np.array([len(starts) - 1])  # where their best start may lie
    while len(lefts):
        mid = (lefts + rights) // 2
        upper = np.maximum(np.minimum(high, limit[mid]), 0)
        lower = np.minimum(low, upper)
        length = upper - lower + 1
        first = np.cumsum(length) - length
        i = np.arange(int(length.sum())) - np.repeat(first - lower, length)
        value = before[i] + interval_cost(prefix, starts[i], np.repeat(ends[mid], length))
        value = np.where(np.repeat(limit[mid] < 0, length), np.inf, value)
        least = np.minimum.reduceat(value, first)
        where = np.where(value == np.repeat(least, length), i, len(starts))
        best[mid] = least
        arg[mid] = np.minimum.reduceat(where, first)
        lefts, rights, low, high = (
            np.stack(pair, axis=1).reshape(-1)
            for pair in ((lefts, mid + 1), (mid, rights), (low, arg[mid]), (arg[mid], high))
        )
        alive = lefts < rights
        lefts, rights, low, high = lefts[alive], rights[alive], low[alive], high[alive]
    return best, arg


def _best_partition_native(prefix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    sums = _sums(prefix)
    curve, edges = np.empty(k), np.empty(k + 1, np.int64)
    native.call("cw_best_partition", sums, sums.shape[1], k, curve, edges)
    return curve, edges


def _best_path_native(candidates: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    candidates, sums = np.require(candidates, np.int64, ["C", "A"]), _sums(prefix)
    if candidates.min() < 0 or candidates.max() >= sums.shape[1]:
        raise ValueError(f"candidates must lie in 0..{sums.shape[1] - 1}")
    chosen = np.empty(len(candidates), np.int64)
    native.call("cw_best_path", candidates, *candidates.shape, sums, sums.shape[1], chosen)
    return chosen


def _sums(prefix: np.ndarray) -> np.ndarray:
    if prefix.ndim != 2 or len(prefix) != 3 or not prefix.size:
        raise ValueError(f"prefix sums must be (3, m+1), got {prefix.shape}")
    return np.require(prefix, np.float64, ["C", "A"])
