"""Entropy-constrained clustering of vectors from any codebook: least error + lam * coded bits.

Codes given codewords and prices, codewords as the mean of their members, prices from how often a code is used, in turn
(Chou, Lookabaugh & Gray 1989); each step lowers the same cost. `math.ecsq` finds scalar codebooks by itself; this one
starts from those that another method has made, be they scalars or vectors, one codebook or one a group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codeword.kernels.assign import assign, assign_weighted, cluster_sums, code_dtype
from codeword.math.bins import weighted_means
from codeword.math.ecsq import envelope, prices_of
from codeword.math.vectors import assign_vectors

_ROUNDS = 30
_SETTLED = 1e-4  # relative gain of a round that is not worth another


class Constrained(NamedTuple):
    """Groups of vectors under their codebooks."""

    codes: np.ndarray  # (g, m) smallest unsigned dtype
    codebook: np.ndarray  # (g, k, d) float64


def ecvq(
    vectors: np.ndarray, importance: np.ndarray | None, codes: np.ndarray, codebook: np.ndarray, lam: float
) -> Constrained:
    """Least sum of importance * squared error + lam * bits, downhill from codes (g, m) into codebook (g, k, d).

    vectors (g, m, d), finite; importance (g, m, d), >= 0, None for all 1. One adaptive table serves all groups, so a
    code has one price. A codeword without members stays where it is: `compact` takes it out.
    """
    book = codebook.astype(np.float64)
    prices = prices_of(codes, book.shape[1])
    before = math.inf
    for _ in range(_ROUNDS):
        codes = constrained_codes(vectors, importance, book, lam * prices)
        for group, z in enumerate(codes):
            h = None if importance is None else importance[group]
            book[group] = _means(vectors[group], h, z, book[group])
        bits = float(prices @ np.bincount(codes.reshape(-1), minlength=len(prices)))
        cost = squared_error(vectors, importance, codes, book) + lam * bits
        prices = prices_of(codes, book.shape[1])
        if before - cost <= _SETTLED * cost:
            break
        before = cost
    return Constrained(codes, book)


def constrained_codes(
    vectors: np.ndarray, importance: np.ndarray | None, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Codes (g, m) of least importance * squared error + penalty (k,), for vectors (g, m, d), codebook (g, k, d)."""
    codes = np.empty(vectors.shape[:2], code_dtype(codebook.shape[1]))
    for group, (x, book) in enumerate(zip(vectors, codebook, strict=True)):
        h = None if importance is None else importance[group]
        if x.shape[1] > 1:
            codes[group] = assign_vectors(x, book, h, penalty=penalty).codes
        elif h is not None:
            codes[group] = assign_weighted(x, None, h, book[:, 0], penalty)[:, 0]
        else:  # thresholds that all weights have in common
            order = np.lexsort((penalty, book[:, 0]))  # of equal codewords the cheapest first
            words, first = np.unique(book[order, 0], return_index=True)
            kept, thresholds = envelope(words, penalty[order[first]], keep_zero=False)
            codes[group] = order[first][kept][assign(x.reshape(1, -1), None, thresholds)[0]]
    return codes


def compact(codes: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, codebook) without the codewords that no group uses."""
    used = np.bincount(codes.reshape(-1), minlength=codebook.shape[1]) > 0
    place = np.cumsum(used) - 1
    return place[codes].astype(code_dtype(max(int(used.sum()), 1))), codebook[:, used]


def squared_error(vectors: np.ndarray, importance: np.ndarray | None, codes: np.ndarray, codebook: np.ndarray) -> float:
    """Sum of importance * (vector - codeword)**2."""
    total = 0.0
    for group, (x, z) in enumerate(zip(vectors, codes, strict=True)):
        error = np.square(x - codebook[group][z])
        total += float(np.sum(error if importance is None else error * importance[group], dtype=np.float64))
    return total


def _means(x: np.ndarray, h: np.ndarray | None, codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """(k, d) weighted means of members (m, d); an entry to which no member gives importance stays."""
    means = codebook.copy()
    for i in range(x.shape[1]):
        weights = None if h is None else np.ascontiguousarray(h[None, :, i])
        _, mass, first = cluster_sums(np.ascontiguousarray(x[None, :, i]), None, weights, codes[None], len(codebook))
        means[:, i] = weighted_means(first, mass, codebook[:, i])
    return means
