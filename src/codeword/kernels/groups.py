"""Optimal one-dimensional k-means of many groups of values, each with a codebook of its own, in one call.

A group is sorted and equal values become one item. If every codeword costs a price, the cheapest clustering of d items
takes one pass: the best start of the cluster that ends at j never moves left as j moves right, so a queue of starts,
each with the place from which it is the best, finds all of them in O(d log d) (Aggarwal, Schieber & Tokuyama 1994). The
squared error falls ever more slowly with the number of codewords, hence there is a price at which the optimum for k
codewords is the cheapest of all: two to six passes find it. Where k lies on a straight piece of that curve, the two
clusterings at its ends are worth the same, and the start of one goes with the end of the other. So the result is the
optimum, but for rounding: sums are double precision, run outwards from the median, and a codeword is the mean of its
members to that precision. Memory does not depend on k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from codeword.kernels import chunks as walk
from codeword.kernels import native
from codeword.kernels.assign import code_dtype

LARGEST = 1 << 16  # values in a group; beyond this a histogram is faster
_LEAST_SHARE, _MOST_SHARE = 1e-280, 1e280
_COARSE, _COARSE_PER_CLUSTER = 64, 6  # merged items on which the first price is sought
_MODEL_TURNS = 8  # prices from the cube of the number of codewords; then the slope between the clusterings known
_Sums = tuple[list[float], list[float], list[float]]


class Groups(NamedTuple):
    """Clusters of g groups of m values."""

    codebooks: np.ndarray  # (g, k) float64, rising; where there are fewer than k, the last one again
    codes: np.ndarray  # (g, m), the smallest unsigned dtype that holds k - 1; none points at a repeated codeword
    sse: np.ndarray  # (g,) sum of importance * (value - codeword)**2


def cluster_groups(values: np.ndarray, importance: np.ndarray | None, k: int, *, zero: bool = False) -> Groups:
    """The best k codewords for each row of values (g, m), 0 < m <= LARGEST, finite, taken as float32.

    importance (g, m) >= 0 multiplies squared errors; values of none take the codeword that is nearest, and a group of
    none is clustered as if all mattered alike. A group of fewer than k distinct values gets those. zero: 0 is one of
    the codewords: an unused one, or else the one nearest to it, and the others become the means of what is then
    nearest to them.
    """
    if values.ndim != 2 or not 0 < values.shape[1] <= LARGEST or not 0 < k <= LARGEST:
        raise ValueError(f"groups must be (g, m) with m and k in 1..{LARGEST}, got {values.shape} and k = {k}")
    if importance is not None and importance.shape != values.shape:
        raise ValueError(f"values {values.shape} and importance {importance.shape} differ in shape")
    run = cluster_groups_numpy if native.library() is None else _cluster_groups_native
    return run(values, importance, k, zero)


def best_edges(prefix: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """(k+1,) edges of the best clustering of d items into k intervals, 1 < k < d; none of them is empty.

    values (d,) rise; prefix (3, d+1) holds sums of weights, weights * values and weights * values**2.
    """
    if prefix.shape != (3, len(values) + 1) or not 1 < k < len(values):
        raise ValueError(f"{k} clusters of values {values.shape} with prefix sums {prefix.shape}")
    run = best_edges_numpy if native.library() is None else _best_edges_native
    return run(prefix, values, k)


def best_edges_numpy(prefix: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Reference of `best_edges`."""
    s0, s1, s2 = prefix.tolist()
    return np.array(_edges((s0, s1, s2), values.tolist(), k))


def _best_edges_native(prefix: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    sums, places = (np.require(array, np.float64, ["C", "A"]) for array in (prefix, values))
    edges = np.empty(k + 1, np.int64)
    native.call("cw_best_edges", sums, places, len(places), k, edges)
    return edges


def cluster_groups_numpy(values: np.ndarray, importance: np.ndarray | None, k: int, zero: bool) -> Groups:
    """Reference of `cluster_groups`: item by item, hence some 300 times slower."""
    found = _room(values, k)
    for g, row in enumerate(values):
        h = None if importance is None else importance[g].astype(np.float64)
        found.sse[g] = _cluster(_float32(row), h, k, zero, found.codebooks[g], found.codes[g])
    return found


def _cluster_groups_native(values: np.ndarray, importance: np.ndarray | None, k: int, zero: bool) -> Groups:
    found = _room(values, k)
    step = len(values) if values.dtype == np.float32 and importance is None else max(1, walk.CHUNK // values.shape[1])
    for g in range(0, len(values), max(step, 1)):
        at = slice(g, g + step)
        part = np.require(_float32(values[at]), np.float32, ["C", "A"])
        h = None if importance is None else np.require(importance[at], np.float64, ["C", "A"])
        codes = found.codes[at]
        native.call(
            "cw_cluster_groups",
            *(part, h, *part.shape, k, int(zero), native.threads()),
            *(found.codebooks[at], codes, codes.itemsize, found.sse[at]),
        )
    return found


def _room(values: np.ndarray, k: int) -> Groups:
    groups = len(values)
    return Groups(np.empty((groups, k)), np.empty(values.shape, code_dtype(k)), np.empty(groups))


def _float32(values: np.ndarray) -> np.ndarray:
    """Values as float32; float64 beyond its range take its ends."""
    if values.dtype == np.float64:
        most = np.finfo(np.float32).max
        values = np.clip(values, -most, most)
    return values.astype(np.float32, copy=False)


def _cluster(
    values: np.ndarray, importance: np.ndarray | None, k: int, zero: bool, codebook: np.ndarray, codes: np.ndarray
) -> float:
    """Fills codebook (k,) and codes (m,) for values (m,) float32; returns the SSE."""
    distinct, index = np.unique(values + np.float32(0), return_inverse=True)
    distinct, index = distinct.astype(np.float64), index.reshape(-1)
    if importance is None or not np.any(importance > 0):
        weight = np.bincount(index).astype(np.float64)
    else:
        weight = np.bincount(index, np.where(importance > 0, importance, 0))
    matters = weight > 0
    known, mass = distinct[matters], weight[matters]
    offsets, sums = _sums(known, mass)
    edges = _edges(sums, offsets.tolist(), k)
    codewords = [_mean(known, mass, i, j) for i, j in itertools.pairwise(edges)]
    if zero:
        codewords, edges = _pinned(codewords, edges, known, mass, k)
    words = np.array(codewords)
    code = np.searchsorted((words[:-1] + words[1:]) / 2, distinct)
    code[matters] = np.repeat(np.arange(len(words)), np.diff(edges))
    codes[:] = code[index]
    codebook[:] = np.pad(words, (0, k - len(words)), mode="edge")
    error = known - words[code[matters]]
    return float(np.cumsum(mass * (error * error))[-1])  # one after the other: sums of sums would round otherwise


def _sums(known: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, _Sums]:
    """Values less their median, and prefix sums of mass, mass * value, mass * value**2 outwards from it."""
    anchor = len(known) // 2
    offsets = known - known[anchor]
    first = mass * offsets

    def prefix(parts: np.ndarray) -> list[float]:
        left = -np.cumsum(parts[:anchor][::-1])[::-1]
        return np.concatenate([left, [0.0], np.cumsum(parts[anchor:])]).tolist()

    return offsets, (prefix(mass), prefix(first), prefix(first * offsets))


def _edges(sums: _Sums, values: list[float], k: int) -> list[int]:
    """Edges of the best clustering of d items into k intervals, or of d into d."""
    d = len(values)
    if d <= k:
        return list(range(d + 1))
    if k == 1:
        return [0, d]
    share = _spread(sums, values)
    most = max(_COARSE, _COARSE_PER_CLUSTER * k)
    price = _guess(sums, share, k)
    if d >= 2 * most and _LEAST_SHARE < share[-1] < _MOST_SHARE:
        fewer, places = _merged(sums, values, share, most)
        _, price = _search(fewer, k, _guess(fewer, _spread(fewer, places), k), k // 16)
    edges, _ = _search(sums, k, price, 0)
    return edges


def _cost(sums: _Sums, i: int, j: int) -> float:
    """Squared error of items [i, j) about their mean."""
    s0, s1, s2 = sums
    w, first, second = s0[j] - s0[i], s1[j] - s1[i], s2[j] - s2[i]
    cost = second - first * first / w if j - i > 1 and w > 0 else 0.0
    return cost if cost > 0 else 0.0  # of sums that overflow, NaN


def _spread(sums: _Sums, values: list[float]) -> list[float]:
    """(d,) cumulated square roots of gaps, about as the codewords of an optimal codebook lie."""
    share = [0.0]
    for i in range(1, len(values)):
        share.append(share[-1] + math.sqrt((values[i] - values[i - 1]) * math.sqrt(sums[0][i] - sums[0][i - 1])))
    return share


def _guess(sums: _Sums, share: list[float], k: int) -> float:
    """What a codeword is worth if each has an equal share: the derivative of an error that falls with k**2."""
    d = len(share)
    step = share[-1] / k
    if not step > _LEAST_SHARE:
        return _cost(sums, 0, d) / k
    following, error, start = step, 0.0, 0
    for i in range(1, d):
        if share[i] < following:
            continue
        error += _cost(sums, start, i)
        start = i
        following = (math.floor(share[i] / step) + 1) * step
    error += _cost(sums, start, d)
    return 2 * error / k


def _merged(sums: _Sums, values: list[float], share: list[float], most: int) -> tuple[_Sums, list[float]]:
    """At most `most` runs of items as items, half of them by share, half by number."""
    d, half = len(values), most / 2
    by_share, by_index = half / share[-1], half / d
    starts, following = [], 0.0
    for i in range(d):
        here = share[i] * by_share + i * by_index
        if here < following:
            continue
        following = math.floor(here) + 1
        starts.append(i)
    s0, s1, s2 = ([part[i] for i in [*starts, d]] for part in sums)
    return (s0, s1, s2), [values[i] for i in starts]


def _search(sums: _Sums, k: int, price: float, close: int) -> tuple[list[int], float]:
    """(edges of the optimum for k, price of a codeword), from a first price; or for about k, off by up to close."""
    d = len(sums[0]) - 1
    few, few_error = [0, d], _cost(sums, 0, d)  # optima for fewer and for more codewords than k
    many, many_error = list(range(d + 1)), 0.0
    low, high, turn, chord = 0.0, math.inf, 0, False
    while True:
        edges = _solve(sums, price)
        found = len(edges) - 1
        ratio = found / k
        model = price * ratio * ratio * ratio
        if abs(found - k) <= close:
            return edges, model
        if len(few) - 1 < found < len(many) - 1:
            error = 0.0
            for i, j in itertools.pairwise(edges):
                error += _cost(sums, i, j)
            if found < k:
                few, few_error = edges, error
            else:
                many, many_error = edges, error
        elif chord:
            return _spliced(few, many, k), price
        low, high = (low, price) if found < k else (price, high)
        chord = not (turn < _MODEL_TURNS and low < model < high)
        price = (few_error - many_error) / (len(many) - len(few)) if chord else model
        turn += 1


def _solve(sums: _Sums, price: float) -> list[int]:
    """Edges of the cheapest clustering if each cluster costs `price` beside its error."""
    d = len(sums[0]) - 1
    layer, arg = [0.0], [0]  # what the best clustering of the first j items costs, and where its last cluster starts
    starts, since = [0], [1]  # the queue: from items since[q] on, up to since[q+1], starts[q] is the best start
    head = 0

    def better(place: int) -> bool:
        """Whether a cluster that ends at place starts better at j than at `than`."""
        return layer[j] + _cost(sums, j, place) < layer[than] + _cost(sums, than, place)

    for j in range(1, d + 1):
        while head + 1 < len(starts) and since[head + 1] <= j:
            head += 1
        best = starts[head]
        layer.append(layer[best] + _cost(sums, best, j) + price)
        arg.append(best)
        if j == d:
            break
        at = j + 1
        while len(starts) > head:
            than, at = starts[-1], max(since[-1], j + 1)
            if not better(at):
                break
            starts.pop()
            since.pop()
        at = j + 1 if len(starts) == head else _first(better, at, d)
        if at <= d:
            starts.append(j)
            since.append(at)
    edges = [d]
    while edges[-1] > 0:
        edges.append(arg[edges[-1]])
    return edges[::-1]


def _first(better: Callable[[int], bool], low: int, last: int) -> int:
    """The first place after low that is better, last + 1 if none is."""
    high, step = last + 1, 1
    while low + step < high:
        if better(low + step):
            high = low + step
            break
        low += step
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if better(middle) else (middle, high)
    return high


def _spliced(few: list[int], many: list[int], k: int) -> list[int]:
    """Two clusterings that cost the same at one price make one of k clusters: where one cluster holds another."""
    shift = len(many) - 1 - k
    x = 0
    while many[x + shift + 1] > few[x + 1]:
        x += 1
    return [*few[: x + 1], *many[x + shift + 1 :]]


def _mean(known: np.ndarray, mass: np.ndarray, i: int, j: int) -> float:
    if j - i == 1:
        return float(known[i])
    return float(np.cumsum(mass[i:j] * known[i:j])[-1] / np.cumsum(mass[i:j])[-1])


def _pinned(
    codewords: list[float], edges: list[int], known: np.ndarray, mass: np.ndarray, k: int
) -> tuple[list[float], list[int]]:
    """Codewords and edges with 0 among the codewords."""
    pinned = min(range(len(codewords)), key=lambda j: abs(codewords[j]))
    if codewords[pinned] == 0:
        return codewords, edges
    if len(codewords) < k:
        pinned = sum(codeword < 0 for codeword in codewords)
        codewords = [*codewords[:pinned], 0.0, *codewords[pinned:]]
    else:
        codewords = [*codewords[:pinned], 0.0, *codewords[pinned + 1 :]]
    words = np.array(codewords)
    inner = np.searchsorted(known, (words[:-1] + words[1:]) / 2, side="right").tolist()
    edges = [0, *inner, len(known)]
    for j in range(len(codewords)):
        if j != pinned and edges[j] < edges[j + 1]:
            codewords[j] = _mean(known, mass, edges[j], edges[j + 1])
    return codewords, edges
