"""Scores of many tensors into masks: one ranking over all, one a group, or one a tensor, of weights, runs or blocks.

rank(tensors, groups, sparsity, ...) -> a mask for each tensor, True for what stays
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codeword.math.masks import block_means, n_of_m_mask, spread, top_mask, top_units


@dataclass(frozen=True, slots=True)
class Ranked:
    """What of a tensor is ranked: scores (r, c), and how many multiply-accumulates each of its weights is used in."""

    scores: np.ndarray
    uses: int = 0


@dataclass(frozen=True, slots=True)
class Pattern:
    """What may be pruned: m - n of each m neighbours in a row, or whole blocks of (rows, columns)."""

    n: int = 0
    m: int = 0
    block: tuple[int, int] | None = None


def rank(
    tensors: Sequence[Ranked],
    groups: Sequence[Sequence[int]],
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    macs: float | None = None,
    least: float = 0.0,
    adaptive: bool = False,
) -> list[np.ndarray]:
    """Masks (r, c): in each group of tensors, by index, the share `sparsity` of lowest scores goes.

    adaptive: scores compare within a tensor only; each is ranked as its share of all of its tensor that are no smaller
    (Lee 2021, of squared magnitudes), so that the last of a tensor goes last whatever the scale of its scores.
    macs: the share of all multiply-accumulates that goes with them; how much of each of two groups goes is then
    chosen so that both shares are met as nearly as can be. least: the share of each tensor that stays whatever its
    scores. Of equal scores the earlier weight stays.
    """
    falling = adaptive and pattern is None  # units stand in the order of their scores: that takes no argsort
    units = [_falling(it.scores) if falling else _units(it.scores, pattern, adaptive) for it in tensors]
    keeps = [_keep(sum(units[at].weights for at in group), sparsity) for group in groups]
    if macs is not None:
        keeps = _split(units, tensors, groups, sum(keeps), (1 - macs) * _all_macs(units, tensors))
    kept: dict[int, np.ndarray] = {}
    for group, keep in zip(groups, keeps, strict=True):
        members = {at: units[at] for at in group}
        short = list(group)
        while short:  # a tensor that is short of its least gets it outright, at the cost of the others: few ever are
            kept |= _top(members, keep)
            short = [
                at for at in group if not members[at].locked and _count(kept[at], units[at]) < least * units[at].weights
            ]
            members |= {at: _locked(units[at], least) for at in short}
    if falling:
        return [top_mask(it.scores, int(kept[at].sum())) for at, it in enumerate(tensors)]
    return [_mask(kept[at], it.scores.shape, pattern) for at, it in enumerate(tensors)]


def macs_range(sizes: Sequence[int], uses: Sequence[int], sparsity: float) -> tuple[float, float]:
    """(least, most) share of the multiply-accumulates that any masks of this sparsity save, from sizes and uses."""
    whole = sum(size * use for size, use in zip(sizes, uses, strict=True))
    bounds = []
    for cheap_first in (False, True):
        left, saved = round(sparsity * sum(sizes)), 0
        for use, size in sorted(zip(uses, sizes, strict=True), reverse=not cheap_first):
            saved += min(left, size) * use
            left -= min(left, size)
        bounds.append(saved / whole if whole else 0.0)
    return min(bounds), max(bounds)


@dataclass(frozen=True, slots=True)
class _Units:
    """What stays or goes at once: its score, infinite where it must stay, and how many weights it is."""

    scores: np.ndarray
    sizes: np.ndarray
    weights: int
    locked: int = 0  # weights in units that must stay


def _units(scores: np.ndarray, pattern: Pattern | None, adaptive: bool) -> _Units:
    if pattern is not None and pattern.block is not None:
        means, sizes = block_means(scores, pattern.block)
        flat, sizes = means.reshape(-1), sizes.reshape(-1)
    else:
        flat, sizes = scores.reshape(-1), np.broadcast_to(np.int64(1), scores.size)
    if adaptive:
        flat = _shares(flat, sizes)
    if pattern is None or pattern.block is not None:
        return _Units(flat, sizes, scores.size)
    stays = n_of_m_mask(scores, pattern.n, pattern.m).reshape(-1)
    return _Units(np.where(stays, np.inf, flat), sizes, scores.size, int(stays.sum()))


def _falling(scores: np.ndarray) -> _Units:
    """The shares of scores (r, c), the largest score first."""
    falling = np.sort(scores, axis=None)[::-1]
    return _Units(_shares_of(falling, falling), np.broadcast_to(np.int64(1), falling.size), falling.size)


def _shares(scores: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each unit's score over the sum of all that are no smaller, its own included."""
    order = np.argsort(-scores, kind="stable")
    shares = np.empty(len(scores), np.float64)
    shares[order] = _shares_of(scores[order], scores[order] * sizes[order])
    return shares


def _shares_of(falling: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Scores, the largest first, over the sums of the parts up to them; 0 of 0."""
    sums = np.cumsum(parts, dtype=np.float64)
    return np.divide(falling, sums, out=np.zeros_like(sums), where=sums > 0)


def _locked(units: _Units, least: float) -> _Units:
    """The same units, the best of them locked."""
    stays = top_mask(units.scores, math.ceil(least * len(units.scores)))
    return _Units(np.where(stays, np.inf, units.scores), units.sizes, units.weights, _count(stays, units))


def _count(kept: np.ndarray, units: _Units) -> int:
    """Weights in units that stay."""
    return int(kept.sum() if units.weights == len(kept) else units.sizes[kept].sum())


def _top(members: Mapping[int, _Units], keep: int) -> dict[int, np.ndarray]:
    """What stays of each of some tensors that are ranked together."""
    scores = np.concatenate([unit.scores for unit in members.values()])
    keep = max(keep, sum(unit.locked for unit in members.values()))
    if all(unit.weights == len(unit.scores) for unit in members.values()):
        kept = top_mask(scores, keep)
    else:
        kept = top_units(scores, np.concatenate([unit.sizes for unit in members.values()]), keep)
    ends = np.cumsum([len(unit.scores) for unit in members.values()])[:-1]
    return dict(zip(members, np.split(kept, ends), strict=True))


def _mask(kept: np.ndarray, shape: tuple[int, ...], pattern: Pattern | None) -> np.ndarray:
    if pattern is None or pattern.block is None:
        return kept.reshape(shape)
    down, across = (-(-length // step) for length, step in zip(shape, pattern.block, strict=True))
    return spread(kept.reshape(down, across), pattern.block, shape)


def _keep(weights: int, sparsity: float) -> int:
    return weights - round(sparsity * weights)


def _all_macs(units: Sequence[_Units], tensors: Sequence[Ranked]) -> int:
    return sum(unit.weights * it.uses for unit, it in zip(units, tensors, strict=True))


def _split(
    units: Sequence[_Units], tensors: Sequence[Ranked], groups: Sequence[Sequence[int]], keep: int, macs: float
) -> list[int]:
    """How many weights each of two groups keeps so that both together keep `keep` and, as nearly as can be, `macs`."""
    sizes, work = [], []
    for group in groups:
        scores = np.concatenate([units[at].scores for at in group])
        order = np.argsort(-scores, kind="stable")
        size = np.concatenate([units[at].sizes for at in group])[order]
        use = np.concatenate([units[at].sizes * tensors[at].uses for at in group])[order]
        sizes.append(np.concatenate([[0], np.cumsum(size)]))
        work.append(np.concatenate([[0], np.cumsum(use)]))
    first = sizes[0]
    rest = np.searchsorted(sizes[1], keep - first).clip(0, len(sizes[1]) - 1)
    fits = (first <= keep) & (first + sizes[1][rest] >= keep)
    total = np.where(fits, work[0] + work[1][rest], np.inf)
    at = int(np.argmin(np.abs(total - macs)))
    return [int(first[at]), int(sizes[1][rest[at]])]
