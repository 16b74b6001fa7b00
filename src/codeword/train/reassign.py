"""Codes anew from where weights would be, against the codewords as they are now, for as many bits as before.

The nodes around a Lookup are undone as `methods.constrain` does, so scalars, vectors, scaled rows, residual stages and
pruned weights are one case. What a bit costs is bisected until the codes take no more than they may. Where many weights
would change their code at one price (shadows that are all equal), only as many do as must.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from codeword.expr import Expr, Lookup, decode, leaves, lookups, with_leaves
from codeword.math.ecsq import prices_of
from codeword.math.ecvq import constrained_codes
from codeword.methods.constrain import Problem, solved

_TURNS = 2  # of codes and prices
_ROUNDS = 6  # of the bisection, once the bits lie between two prices
_WIDER = 4.0
_MOST_WIDER = 40
_CLOSE = 0.002  # below the budget: what ends the bisection


def reassigned(expr: Expr, target: np.ndarray, importance: np.ndarray, lam: float) -> Expr:
    """The expression with codes of least importance * squared error about target + lam * bits.

    target: float32 of expr's shape; importance broadcasts to that. lam 0: the nearest codewords.
    """

    def solve(lookup: Lookup, target: np.ndarray, importance: np.ndarray, together: bool) -> Expr:
        del together
        vectors, h, price, unit = Problem.of(lookup, target, importance, lam)
        words = lookup.codebook.astype(np.float64) / unit
        codes = lookup.codes.reshape(len(words), -1)
        for _ in range(_TURNS if lam else 1):
            codes = constrained_codes(vectors, h, words, price * prices_of(codes, words.shape[1]))
        return Lookup(codes.reshape(lookup.codes.shape).astype(lookup.codes.dtype), lookup.codebook)

    return solved(expr, target, importance, solve)


def reassigned_within(
    expr: Expr, target: np.ndarray, importance: np.ndarray, bits: float, lam: float
) -> tuple[Expr, float]:
    """(expression, lam): `reassigned` at about the least lam whose codes have an entropy of at most `bits`.

    lam: where to begin, such as the last one; 0 if there is none.
    """
    beyond = reassigned(expr, target, importance, 0.0)
    if code_bits(beyond) <= bits:
        return beyond, 0.0
    error = target - decode(expr).astype(np.float32)
    lam = lam or float(np.mean(importance * np.square(error, dtype=np.float64))) or 1e-12
    low, high = 0.0, lam
    within = reassigned(expr, target, importance, high)
    for _ in range(_MOST_WIDER):
        if code_bits(within) <= bits:
            break
        low, high, beyond = high, high * _WIDER, within
        within = reassigned(expr, target, importance, high)
    for _ in range(_ROUNDS):
        if code_bits(within) >= (1 - _CLOSE) * bits:
            return within, high
        middle = (low * high) ** 0.5 if low else high / _WIDER
        trial = reassigned(expr, target, importance, middle)
        if code_bits(trial) <= bits:
            within, high = trial, middle
        else:
            beyond, low = trial, middle
    return _between(beyond, within, target, importance, bits), high


def _between(beyond: Expr, within: Expr, target: np.ndarray, importance: np.ndarray, bits: float) -> Expr:
    """The codes of `beyond`, which take more than `bits`, where they are worth most, and of `within` elsewhere."""
    others = lookups(within)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # codes, other codes, error a bit saved

    def compare(lookup: Lookup, target: np.ndarray, importance: np.ndarray, together: bool) -> Expr:
        del together
        vectors, h, price, unit = Problem.of(lookup, target, importance, 1.0)
        words = lookup.codebook.astype(np.float64) / unit
        mine, other = (some.codes.reshape(len(words), -1) for some in (lookup, next(others)))
        prices = prices_of(mine, words.shape[1])
        errors = [_errors(vectors, h, codes, words) / price for codes in (other, mine)]
        saved = np.maximum(prices[mine] - prices[other], 1e-3)
        found.append((mine.reshape(-1), other.reshape(-1), ((errors[0] - errors[1]) / saved).reshape(-1)))
        return lookup

    solved(beyond, target, importance, compare)
    mine, other, loss = (np.concatenate(parts) for parts in zip(*found, strict=True))
    (differing,) = np.nonzero(mine != other)
    order = differing[np.argsort(loss[differing], kind="stable")]
    few, many = 0, len(order)  # weights that change to `within`
    best = within
    while few < many:
        middle = (few + many) // 2
        codes = mine.copy()
        codes[order[:middle]] = other[order[:middle]]
        trial = _with_codes(beyond, codes)
        if code_bits(trial) <= bits:
            best, many = trial, middle
        else:
            few = middle + 1
    return best


def _errors(vectors: np.ndarray, h: np.ndarray | None, codes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(g, m) squared errors of vectors (g, m, d), times importance, under their codewords."""
    square = np.square(vectors - np.stack([book[z] for book, z in zip(words, codes, strict=True)]))
    return np.sum(square if h is None else square * h, axis=2)


def _with_codes(expr: Expr, codes: np.ndarray) -> Expr:
    """The expression with these codes, those of all its Lookups in one row."""
    at, arrays = 0, list[np.ndarray]()
    for path, array in leaves(expr):
        if path.endswith("codes"):
            arrays.append(codes[at : at + array.size].reshape(array.shape).astype(array.dtype))
            at += array.size
        else:
            arrays.append(array)
    return with_leaves(expr, iter(arrays))


def code_bits(expr: Expr) -> float:
    """Entropy of the codes of all Lookups, bits in all, as one table for each charges."""
    return sum(_entropies(expr))


def _entropies(expr: Expr) -> Iterator[float]:
    for lookup in lookups(expr):
        counts = np.bincount(lookup.codes.reshape(-1)).astype(np.float64)
        counts = counts[counts > 0]
        yield float(-(counts @ np.log2(counts / counts.sum()))) if len(counts) else 0.0
