"""Distribution-based k-means (Wang, Chen & Wu 2017; methods A2): codewords from the density, then revised.

At high resolution the best density of codewords is the density of the weights to the power 1/3 (Panter & Dite 1951),
and then every cluster has the same share of the error. The first gives the start; the second repairs it, because the
clusters themselves are a density estimate that is fine where codewords are. Lloyd's algorithm then has little to do,
and what it cannot do, to carry a codeword from where it is idle to where it is missed, is done by
merging and splitting.
"""

from __future__ import annotations

import math

import numpy as np

from codeword.kernels.partition import interval_cost
from codeword.math.bins import Bins, centroids
from codeword.math.starts import MAX_ITERATIONS, TOLERANCE, Descent, borders, costs, one_each, step, without_empty

MAX_CODEWORDS = 1 << 16
_CELLS = 128  # of the density estimate at least, half by value and half by weight
_ROUNDS = 32  # of revision at most
_WORTH = 5e-3  # of the SSE must have been gained by a round of exchanges for another one: each takes as long as 6 steps
_HOPE = 2  # a merge may cost this many times the gain of a split: the neighbours then share its loss, or it is undone


def density_start(bins: Bins, k: int) -> np.ndarray:
    """(k,) codewords at the quantiles of density**(1/3), estimated on cells and then on the clusters themselves."""
    cells, share = _shares(bins, max(_CELLS, k))
    codebook = _spread(bins.values[cells[:-1]], bins.values[cells[1:] - 1], share, k)
    edges = _distinct(borders(bins, codebook))
    error = np.pad(costs(bins, edges), 1, mode="edge")
    # Neighbours lend each other their errors: that of one cluster in a tail says little of the density there.
    share = np.cbrt((error[:-2] + 2 * error[1:-1] + error[2:]) / 4)
    return _spread(bins.values[edges[:-1]], bins.values[edges[1:] - 1], share, k) if share.any() else codebook


def _distinct(rising: np.ndarray) -> np.ndarray:
    """The distinct ones of rising numbers, not empty."""
    return rising[np.append(True, rising[1:] > rising[:-1])]


def _shares(bins: Bins, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (c+1,) of at most `most` cells and each one's share (c,) of the codewords, (weight * width**2)**(1/3).

    A cell is as wide as the values in it reach, so a gap takes no codewords.
    """
    grid = np.linspace(bins.values[0], bins.values[-1], most // 2)[1:-1]
    by_value = np.searchsorted(bins.values, grid)
    weight = bins.prefix[0]
    by_weight = np.searchsorted(weight, np.linspace(weight[0], weight[-1], most // 2)[1:-1])
    cells = np.unique(np.concatenate([[0], by_value, by_weight, [len(bins.values)]]))
    width = bins.values[cells[1:] - 1] - bins.values[cells[:-1]]
    share = np.cbrt(np.diff(weight[cells]) * np.square(width))
    return cells, share


def _spread(low: np.ndarray, high: np.ndarray, share: np.ndarray, k: int) -> np.ndarray:
    """(k,) places that halve k equal parts of all shares, each share spread evenly from low to high."""
    total = np.cumsum(share)
    if not total[-1] > 0:
        return np.linspace(low[0], high[-1], k)
    at = np.stack([total - share, total], axis=1).reshape(-1)
    return np.interp((np.arange(k) + 0.5) / k * total[-1], at, np.stack([low, high], axis=1).reshape(-1))


def density_kmeans(bins: Bins, k: int | None = None, lam: float = 0.01) -> Descent:
    """Clusters from the density start, Lloyd's algorithm and revision; iterations counts every pass of assignment.

    k: the number of codewords, which revision then keeps: a merge pays for a split. None: the number for which the
    squared error plus lam * (the mean square of a weight) * coded bits is least; revision splits and merges wherever
    that falls, up to 65,536. Codes are priced at their entropy. Fewer than k come back where a codeword that lost its
    members found no better place.
    """
    if k is not None and k >= len(bins.values):
        return one_each(bins)
    price = 0.0 if k is not None else lam * bins.mean_energy
    best = _descend(bins, density_start(bins, _likely_k(bins, price) if k is None else k))
    iterations = best.iterations
    for _ in range(_ROUNDS):
        revised = _exchange(bins, best, k) if k is not None else _revise(bins, best, price)
        if revised is None or len(revised) > MAX_CODEWORDS:
            break
        found = _descend(bins, revised)
        iterations += found.iterations
        before, after = (it.sse + price * _bits(bins, it.edges) for it in (best, found))
        if after < before:
            best = found
        if not before - after > (TOLERANCE if k is None else _WORTH) * before:
            break
    return best._replace(iterations=iterations)


def _descend(bins: Bins, start: np.ndarray) -> Descent:
    """Lloyd's algorithm that leaps: after two steps, go to where a geometric series of such steps would end.

    (The vector form of Aitken's extrapolation; Varadhan & Roland 2008.) A leap that loses is taken back. The step from
    where a leap ends is the first of the next two. Stops as Lloyd's algorithm does, by what the second step gains.
    """
    codebook = start
    first, _, before = step(bins, codebook)
    iterations = 1
    while True:
        second, edges, sse = step(bins, first)
        move, then = first - codebook, second - first
        rate = min(max(float(move @ then) / max(float(move @ move), 1e-300), 0), 0.95)
        codebook = np.sort(second + then * (rate / (1 - rate)))
        third, after, leapt = step(bins, codebook)
        iterations += 2
        if not max(before - sse, sse - leapt) > TOLERANCE * sse or iterations >= MAX_ITERATIONS:
            found = (third, after, leapt) if leapt < sse else (second, edges, sse)
            return without_empty(*found, iterations)
        if leapt > sse:
            codebook = second
            third, _, leapt = step(bins, codebook)
            iterations += 1
        first, before = third, leapt


def _exchange(bins: Bins, found: Descent, k: int) -> np.ndarray | None:
    """Codewords after the cheapest merges have paid for the dearest splits, or None if no exchange pays."""
    loss, merged = _merges(bins, found)
    spare = k - len(found.codebook)  # codewords that lost all their members are free
    if not spare and not loss.min(initial=np.inf) < _HOPE * costs(bins, found.edges).max():
        return None  # no split saves more than the whole error of a cluster
    left, right, gain = _splits(bins, found)
    kept = np.ones(len(found.codebook), bool)
    added = list(found.codebook[:0])
    cheapest = iter(np.argsort(loss))
    for worst in np.argsort(-gain):
        if not kept[worst] or gain[worst] <= 0:
            continue
        if spare > 0:
            spare -= 1
        else:
            pair = next((j for j in cheapest if kept[j] and kept[j + 1] and worst not in (j, j + 1)), None)
            if pair is None or loss[pair] >= _HOPE * gain[worst]:
                break
            kept[pair : pair + 2] = False
            added.append(merged[pair])
        kept[worst] = False
        added += [left[worst], right[worst]]
    return np.sort(np.concatenate([found.codebook[kept], added])) if added else None


def _revise(bins: Bins, found: Descent, price: float) -> np.ndarray | None:
    """Codewords after all splits and merges of neighbours that pay at this price of a bit, or None if none does."""
    left, right, gain = _splits(bins, found)
    loss, merged = _merges(bins, found)
    count = np.diff(bins.counts[found.edges])
    inner = np.searchsorted(bins.values, (left + right) / 2, side="right")
    inner = np.clip(inner, found.edges[:-1], found.edges[1:])
    part = bins.counts[inner] - bins.counts[found.edges[:-1]]
    gain = gain - price * _entropy_bits(part, count - part)
    saved = price * _entropy_bits(count[:-1], count[1:]) - loss
    kept, added = np.ones(len(count), bool), []
    for j in np.argsort(-saved):
        if saved[j] > 0 and kept[j] and kept[j + 1]:
            kept[j : j + 2] = False
            added.append(merged[j])
    for j in np.nonzero((gain > 0) & kept)[0]:
        kept[j] = False
        added += [left[j], right[j]]
    return np.sort(np.concatenate([found.codebook[kept], added])) if added else None


def _splits(bins: Bins, found: Descent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each cluster the two codewords it would split into and the error that would save, all (k,)."""
    low, high = found.edges[:-1], found.edges[1:]
    at, left, right = found.codebook, found.codebook, found.codebook
    middle = low
    for _ in range(2):
        middle = np.clip(np.searchsorted(bins.values, at, side="right"), np.minimum(low + 1, high), high)
        left, right = (centroids(bins, low, middle, found.codebook), centroids(bins, middle, high, found.codebook))
        at = (left + right) / 2
    split = interval_cost(bins.prefix, low, middle) + interval_cost(bins.prefix, middle, high)
    return left, right, np.where(left < right, costs(bins, found.edges) - split, 0)


def _merges(bins: Bins, found: Descent) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of neighbours the error that merging would add, and the codeword of both, all (k-1,)."""
    low, high = found.edges[:-2], found.edges[2:]
    apart = costs(bins, found.edges)
    together = centroids(bins, low, high, (found.codebook[:-1] + found.codebook[1:]) / 2)
    return interval_cost(bins.prefix, low, high) - apart[:-1] - apart[1:], together


def _likely_k(bins: Bins, price: float) -> int:
    """Where an error of share**3 / (12 k**2) per price falls by a bit for each doubling of k, as at high resolution."""
    share = float(_shares(bins, _CELLS)[1].sum())
    wanted = price * bins.n / (2 * math.log(2))
    k = math.sqrt(share**3 / (12 * wanted)) if wanted > 0 else 1
    return int(np.clip(round(k), 1, min(len(bins.values), 1 << 12)))


def _bits(bins: Bins, edges: np.ndarray) -> float:
    """Bits that the codes of a clustering take at their entropy."""
    count = np.diff(bins.counts[edges])
    count = count[count > 0]
    return float(count @ np.log2(bins.n / count))


def _entropy_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits to tell a members from b others, elementwise."""
    both = np.maximum(a + b, 1)
    return a * np.log2(both / np.maximum(a, 1)) + b * np.log2(both / np.maximum(b, 1))
