"""Codes anew from where weights would be, against the codewords as they are now, for as many bits as before.

The nodes around a Lookup are undone as `methods.constrain` does, so scalars, vectors, scaled rows, residual stages and
pruned weights are one case. What a bit costs is bisected until the codes take no more than they may.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from codeword.expr import Expr, Lookup, decode, lookups
from codeword.math.ecsq import prices_of
from codeword.math.ecvq import constrained_codes
from codeword.methods.constrain import Problem, solved

_TURNS = 2  # of codes and prices
_ROUNDS = 10  # of the bisection, once the bits lie between two prices
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
    found = reassigned(expr, target, importance, 0.0)
    if code_bits(found) <= bits:
        return found, 0.0
    error = target - decode(expr).astype(np.float32)
    lam = lam or float(np.mean(importance * np.square(error, dtype=np.float64))) or 1e-12
    low, high = 0.0, lam
    within = reassigned(expr, target, importance, high)
    for _ in range(_MOST_WIDER):
        if code_bits(within) <= bits:
            break
        low, high = high, high * _WIDER
        within = reassigned(expr, target, importance, high)
    for _ in range(_ROUNDS):
        if code_bits(within) >= (1 - _CLOSE) * bits:
            break
        middle = (low * high) ** 0.5 if low else high / _WIDER
        trial = reassigned(expr, target, importance, middle)
        if code_bits(trial) <= bits:
            within, high = trial, middle
        else:
            low = middle
    return within, high


def code_bits(expr: Expr) -> float:
    """Entropy of the codes of all Lookups, bits in all, as one table for each charges."""
    return sum(_entropies(expr))


def _entropies(expr: Expr) -> Iterator[float]:
    for lookup in lookups(expr):
        counts = np.bincount(lookup.codes.reshape(-1)).astype(np.float64)
        counts = counts[counts > 0]
        yield float(-(counts @ np.log2(counts / counts.sum()))) if len(counts) else 0.0
