"""Vectors to the nearest of codewords, and what the members of a codeword sum to.

Scores are sums of float32 products, entry after entry, no fused multiply-adds: the same bits on every machine, natively
and by NumPy. Sums are float64, in pieces of a size that follows from the codebook, added up in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels import native
from codeword.kernels.assign import code_dtype

_BLOCK = 1 << 16  # scores NumPy works on at once: they stay in the cache


class Members(NamedTuple):
    """What the members of each of k codewords sum to, float64."""

    counts: np.ndarray  # (k,) number of vectors
    error: np.ndarray  # (k,) sum of importance * squared error
    first: np.ndarray  # (k, d) sum of importance * vector
    mass: np.ndarray | None  # (k, d) sum of importance; None if there is none: counts


class _Table(NamedTuple):
    """What is least where: bias + sum of x * entry or, with importance, bias + sum of importance * (x - entry)**2."""

    entries: np.ndarray  # (k, d) float32
    bias: np.ndarray  # (k,) float32
    words: np.ndarray | None  # (k, d) float32: costs are errors under these, None: what is least


def least_products(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, products), each (n,): the row of table (k, d) whose product with each of x (n, d) is least."""
    entries = np.ascontiguousarray(table, np.float32)
    codes, products, _ = _run(x, None, _Table(entries, np.zeros(len(entries), np.float32), None), sums=False)
    return codes, products


def nearest(
    x: np.ndarray, importance: np.ndarray | None, words: np.ndarray, penalty: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, errors), each (n,), of least importance * (x - word)**2 + penalty; of equals the first.

    x and importance (n, d), words (k, d), penalty (k,). Errors are without the penalty, float32.
    """
    codes, errors, _ = _run(x, importance, _table(words, penalty, importance is not None), sums=False)
    return codes, errors


def nearest_and_members(
    x: np.ndarray, importance: np.ndarray | None, words: np.ndarray, penalty: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, Members]:
    """(codes, errors, members): `nearest` and, from the same pass, what goes to each codeword."""
    codes, errors, sums = _run(x, importance, _table(words, penalty, importance is not None), sums=True)
    d = x.shape[1]
    mass = None if importance is None else sums[:, 2 + d :]
    return codes, errors, Members(sums[:, 0], sums[:, 1], sums[:, 2 : 2 + d], mass)


def _table(words: np.ndarray, penalty: np.ndarray | None, weighted: bool) -> _Table:
    if penalty is not None and penalty.shape != words.shape[:1]:
        raise ValueError(f"a penalty of shape {penalty.shape} with codewords {words.shape}")
    w = np.ascontiguousarray(words, np.float32)
    bias = np.zeros(len(w), np.float32) if penalty is None else penalty.astype(np.float32)
    if weighted:
        return _Table(w, bias, w)
    for column in w.T:
        bias = bias + column * column
    return _Table(-2 * w, bias, w)


def _run(
    x: np.ndarray, importance: np.ndarray | None, table: _Table, *, sums: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, costs, sums): sums (k, 2 + d) or, with importance, (k, 2 + 2 d) are count, error, first, and mass."""
    weights = x.shape if importance is None else importance.shape
    if x.ndim != 2 or weights != x.shape or table.entries.shape[1:] != x.shape[1:] or not len(table.entries):
        raise ValueError(f"vectors {x.shape}, importance {weights}, codewords {table.entries.shape} do not go together")
    h = None if importance is None else np.require(importance, np.float32, ["C", "A"])
    run = run_numpy if native.library() is None else _run_native
    return run(np.require(x, np.float32, ["C", "A"]), h, table, sums)


def run_numpy(
    x: np.ndarray, h: np.ndarray | None, table: _Table, sums: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference of `cw_nearest`."""
    (n, d), k = x.shape, len(table.bias)
    codes, costs = np.empty(n, code_dtype(k)), np.empty(n, np.float32)
    step = max(1, _BLOCK // k)
    for at in range(0, n, step):
        here = slice(at, at + step)
        weight = None if h is None else h[here]
        scores = _scores(x[here], weight, table)
        codes[here] = best = scores.argmin(axis=1)
        if table.words is None:
            costs[here] = scores[np.arange(len(best)), best]
        else:
            costs[here] = _errors(x[here], weight, table.words[best])
    total = np.zeros((k, 2 + d * (1 if h is None else 2)))
    for at in range(0, n if sums else 0, _piece(k)):
        here = slice(at, at + _piece(k))
        z = codes[here].astype(np.intp)
        first = x[here].astype(np.float64)
        if h is not None:
            first *= h[here]
        columns = [None, costs[here], *first.T, *(() if h is None else h[here].T)]
        for column, weights in zip(total.T, columns, strict=True):
            column += np.bincount(z, weights, k)
    return codes, costs, total


def _scores(x: np.ndarray, h: np.ndarray | None, table: _Table) -> np.ndarray:
    """(n, k): what is least, entry after entry."""
    scores = np.repeat(table.bias[None], len(x), axis=0)
    for i in range(x.shape[1]):
        if h is None:
            scores += x[:, i, None] * table.entries[:, i]
        else:
            scores += h[:, i, None] * np.square(x[:, i, None] - table.entries[:, i])
    return scores


def _errors(x: np.ndarray, h: np.ndarray | None, words: np.ndarray) -> np.ndarray:
    """(n,) squared errors of x (n, d) under words (n, d), times importance, entry after entry."""
    errors = np.zeros(len(x), np.float32)
    for i in range(x.shape[1]):
        square = np.square(x[:, i] - words[:, i])
        errors += square if h is None else h[:, i] * square
    return errors


def _run_native(
    x: np.ndarray, h: np.ndarray | None, table: _Table, sums: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (n, d), k = x.shape, len(table.bias)
    codes, costs = np.empty(n, code_dtype(k)), np.empty(n, np.float32)
    total = np.zeros((k, 2 + d * (1 if h is None else 2)))
    native.call(
        "cw_nearest",
        *(x, h, n, d, table.entries, table.bias, table.words, k, _piece(k), native.threads()),
        *(codes, codes.itemsize, costs, total if sums else None),
    )
    return codes, costs, total


def _piece(k: int) -> int:
    """Vectors whose sums are added up apart: enough to pay for adding k sums to those before."""
    return max(1024, 4 * k)
