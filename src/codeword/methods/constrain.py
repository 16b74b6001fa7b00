"""Rate-aware clustering on top of any method: the codes and codewords of an expression move to where bits are few.

Whatever a method built, each Lookup in it stands for weights that other nodes scale, shift, add to or place. Undo
those, and what is left is a clustering problem with importances of its own: `math.ecvq` solves it from where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from codeword.expr import Affine, Expr, Lookup, Permute, Raw, Reshape, Scatter, Sum, decode, shape
from codeword.kernels.compensate import assign_compensated
from codeword.kernels.moments import assign_by_moments
from codeword.math.ecsq import prices_of
from codeword.math.ecvq import compact, constrained_codes, ecvq, squared_error
from codeword.math.moments import Moments
from codeword.methods.base import whole_steps

_GRID_SHARE = 0.01  # of the squared error may come from rounding codewords to a grid
_FITS = 8  # turns of codes and codewords; after them outputs of ResNet-20 hardly change
_MOST_FITTED = 64  # codewords that are fitted to moments: of more each is near its weights anyway
_LEAST_WORTH = 1e-6  # of the row that matters most: a row that matters less takes the cheapest codewords either way
_PARTS = 4  # of an octave, to which the worth of a row is rounded: rounding moves lambda by 9 % at most
_MOST = 1e30  # importance that float32 holds, and its sums


# Solves one Lookup for a target of its decoded shape and an importance that broadcasts to that; told whether neighbours
# in the target's rows are neighbours in the weight's.
Solve: TypeAlias = Callable[[Lookup, np.ndarray, np.ndarray, bool], Expr]


def solved(expr: Expr, target: np.ndarray, importance: np.ndarray, solve: Solve, *, together: bool = True) -> Expr:
    """The expression with each Lookup replaced by what `solve` makes of it, for the target that is left to it.

    target: float32 of expr's shape; importance: float64, >= 0, broadcasts to that.
    """

    def below(inner: Expr, target: np.ndarray, importance: np.ndarray, *, together: bool = together) -> Expr:
        return solved(inner, target, importance, solve, together=together)

    match expr:
        case Raw():
            return expr
        case Reshape(inner, new):
            full = importance if importance.size == 1 else np.broadcast_to(importance, target.shape)
            size = shape(inner)
            h = full.reshape((1,) * len(size)) if full.size == 1 else full.reshape(size)
            return Reshape(below(inner, target.reshape(size), h), new)
        case Permute(inner, order):
            back = tuple(np.argsort(order))
            h = np.broadcast_to(importance, target.shape).transpose(back)
            return Permute(below(inner, target.transpose(back), h, together=False), order)
        case Affine(inner, scale, offset):
            rest = target if offset is None else target - offset.astype(np.float32)
            if scale is None:
                return Affine(below(inner, rest, importance), None, offset)
            s = scale.astype(np.float32)
            rest = np.divide(rest, s, out=np.zeros_like(target), where=np.broadcast_to(s != 0, target.shape))
            return Affine(below(inner, rest, importance * np.square(s, dtype=np.float64)), scale, offset)
        case Sum(terms):
            moved = list(terms)
            for i, term in enumerate(terms):
                others = [decode(other).astype(np.float32) for j, other in enumerate(moved) if j != i]
                moved[i] = below(term, target - np.sum(others, axis=0), importance, together=False)
            return Sum(tuple(moved))
        case Scatter(size, positions, inner):
            h = np.broadcast_to(importance, target.shape)
            some = [array[positions].reshape(shape(inner)) for array in (target, h)]
            return Scatter(size, positions, below(inner, some[0], some[1], together=False))
        case Lookup():
            return solve(expr, target, importance, together)


class Problem(NamedTuple):
    """A Lookup's weights as vectors, in a unit in which no square over- or underflows."""

    vectors: np.ndarray  # (g, m, d) float32, weights over the unit
    h: np.ndarray | None  # (g, m, d) float32; None: all matter alike
    lam: float  # in these units
    unit: float

    @classmethod
    def of(cls, lookup: Lookup, target: np.ndarray, importance: np.ndarray, lam: float) -> Problem:
        """What `Solve` is given, and what a bit is worth in squared error times importance."""
        groups, rows, columns = lookup.codes.shape
        d = lookup.codebook.shape[2]
        unit = float(np.abs(target).max(initial=0)) or 1.0
        vectors = (target / np.float32(unit)).reshape(groups, rows * columns, d)
        importance = importance * unit * unit
        if importance.size == 1 and importance.reshape(-1)[0] > 0:
            return cls(vectors, None, lam / float(importance.reshape(-1)[0]), unit)
        full = np.broadcast_to(np.minimum(importance, _MOST), target.shape)
        return cls(vectors, np.ascontiguousarray(full, np.float32).reshape(vectors.shape), lam, unit)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a bit is worth, and how codes and codewords may move."""

    lam: float  # squared error times importance
    grid: bool  # codewords become whole multiples of a step, unless they are already
    kernel: int | None  # neighbouring weights that are one kernel; None: errors are not made to cancel
    moments: Moments | None = None  # of what the weight's rows multiply: errors cancel as these say, not by a prior

    def apply(self, expr: Expr, target: np.ndarray, importance: np.ndarray) -> Expr:
        """The expression of the same form and less importance * squared error + lam * bits about target.

        target: float32 of expr's shape; importance: float64, >= 0, broadcasts to that.
        """
        return solved(expr, target, importance, self._lookup)

    def _lookup(self, lookup: Lookup, target: np.ndarray, importance: np.ndarray, together: bool) -> Expr:
        groups, rows, columns = lookup.codes.shape
        problem = Problem.of(lookup, target, importance, self.lam)
        vectors, h, lam, unit = problem
        found = ecvq(vectors, h, lookup.codes.reshape(groups, -1), lookup.codebook.astype(np.float64) / unit, lam)
        codes, book = compact(found.codes, found.codebook)
        width = self._width(rows, columns) if together and vectors.shape[2] == 1 else None
        if width is not None and self.moments is not None and book.shape[1] <= _MOST_FITTED:
            codes, book = self._fitted(problem, self.moments, width, book, prices_of(codes, book.shape[1]))
        mass = float(vectors.size if h is None else np.sum(h, dtype=np.float64)) or 1.0
        error = squared_error(vectors, h, codes, book) / mass
        wanted = unit * math.sqrt(error * _GRID_SHARE * 12) if self.grid else None
        shipped, step = _stored(book * unit, lookup.codebook.dtype, wanted)
        words = shipped.astype(np.float64) * (step / unit)
        prices = prices_of(codes, book.shape[1])
        if width is not None:  # twice: compensation uses rare codewords more
            codes = self._assigned(problem, width, words, prices)
            codes = self._assigned(problem, width, words, prices_of(codes, words.shape[1]))
        else:  # once more, in what is shipped
            codes = constrained_codes(vectors, h, words, lam * prices)
        codes, shipped = compact(codes, shipped)
        expr = Lookup(codes.reshape(groups, rows, columns), shipped)
        return expr if step == 1 else Affine(expr, np.full((1, 1, 1), step, np.float32))

    def _width(self, rows: int, columns: int) -> int | None:
        """How many neighbours have errors that meet in one sum, in a Lookup of so many rows and columns; None: none."""
        if self.kernel is None:
            return None
        if self.moments is not None:
            inputs = self.moments.second.shape[-1]
            return None if rows * columns % inputs else inputs
        return None if columns % self.kernel else columns

    def _fitted(
        self, problem: Problem, moments: Moments, columns: int, codebook: np.ndarray, prices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes, codebook) in turns: codes whose errors cancel, and the codewords that are best for them."""
        shape = (len(codebook), -1, columns)
        values, codes = problem.vectors.reshape(shape), np.zeros(problem.vectors.shape[:2], np.intp)
        h = problem.h
        worth = np.ones(values.shape[:2]) if h is None else h.reshape(shape).mean(axis=2, dtype=np.float64)
        owners = moments.owners(worth.size).reshape(worth.shape)
        for _ in range(_FITS):
            codes, codebook = compact(self._assigned(problem, columns, codebook, prices), codebook)
            prices = prices_of(codes, codebook.shape[1])
            groups = zip(values, owners, worth, codes.reshape(shape), codebook[:, :, 0], strict=True)
            codebook = np.stack([moments.fitted(*group) for group in groups])[:, :, None]
        return codes, codebook

    def _assigned(self, problem: Problem, columns: int, codebook: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """Codes (g, m) of scalars (g, m, 1) under codebook (g, k, 1), whose errors cancel.

        columns: neighbours whose errors meet in one sum, a divisor of m.
        """
        codes = np.zeros(problem.vectors.shape[:2], np.intp)
        shape = (len(codes), -1, columns)
        values = problem.vectors.reshape(shape)
        importance = [None] * len(codes) if problem.h is None else problem.h.reshape(shape)
        owners = None if self.moments is None else self.moments.owners(values.shape[0] * values.shape[1])
        for group, (rows, weights, words) in enumerate(zip(values, importance, codebook[:, :, 0], strict=True)):
            order = np.lexsort((prices, words))  # of equal codewords the cheapest
            rising, first = np.unique(words[order], return_index=True)
            some = order[first]
            penalty = problem.lam * prices[some]
            if self.moments is None or owners is None:
                z = assign_compensated(rows, None, weights, self.kernel or 1, rising, penalty)
            else:
                mine = owners[group * len(rows) :][: len(rows)]
                z = _by_moments(rows, weights, self.moments.factors, mine, rising, penalty)
            codes[group] = some[z].reshape(-1)
        return codes


def _by_moments(
    rows: np.ndarray,
    importance: np.ndarray | None,
    factors: Sequence[np.ndarray],
    owners: np.ndarray,
    codebook: np.ndarray,
    penalty: np.ndarray,
) -> np.ndarray:
    """Codes (r, c) of rows (r, c) whose errors cancel as the factor of each row's owner (r,) says.

    importance (r, c): its mean over a row is what that row is worth, to a quarter of an octave: rows of one factor and
    worth are done at once.
    """
    worth = np.ones(len(rows)) if importance is None else importance.mean(axis=1, dtype=np.float64)
    most = float(worth.max(initial=0)) or 1.0
    octaves = np.rint(_PARTS * np.log2(np.maximum(worth, _LEAST_WORTH * most))) / _PARTS
    codes = np.empty(rows.shape, np.intp)
    for owner, octave in sorted(set(zip(owners.tolist(), octaves.tolist(), strict=True))):
        (some,) = np.nonzero((owners == owner) & (octaves == octave))
        codes[some] = assign_by_moments(rows[some], None, factors[owner], codebook, penalty / 2.0**octave)
    return codes


def _stored(codebook: np.ndarray, dtype: np.dtype, step: float | None) -> tuple[np.ndarray, float]:
    """(codebook, step) as a file holds them: in whole numbers if they are those already, or a step is given.

    The step is made wider until 16 bits hold all, and narrower until 8 bits are used.
    """
    if dtype.kind == "i":
        limit = np.iinfo(dtype).max
        return np.clip(np.rint(codebook), -limit, limit).astype(dtype), 1.0
    top = float(np.abs(codebook).max())
    if step is None or not top > 0:
        return codebook.astype(dtype), 1.0
    chosen = float(np.float32(min(max(step, top / 32767), top / 127)))
    if not chosen > 0:
        return codebook.astype(dtype), 1.0
    return whole_steps(np.clip(codebook / chosen, -32767, 32767)), chosen
