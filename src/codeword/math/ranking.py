"""Scores of many tensors into masks: one ranking over all, one a group, or one a tensor, of weights, runs or blocks.

rank(tensors, groups, sparsity, ...) -> a mask for each tensor, True for what stays
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
) -> list[np.ndarray]:
    """Masks (r, c): in each group of tensors, by index, the share `sparsity` of lowest scores goes.

    macs: the share of all multiply-accumulates that goes with them; how much of each of two groups goes is then
    chosen so that both shares are met as nearly as can be. least: the share of each tensor that stays whatever its
    scores. Of equal scores the earlier weight stays.
    """
    units = [_units(it.scores, pattern, least) for it in tensors]
    keeps = [_keep(sum(units[at].weights for at in group), sparsity) for group in groups]
    if macs is not None:
        keeps = _split(units, tensors, groups, sum(keeps), (1 - macs) * _all_macs(units, tensors))
    masks: dict[int, np.ndarray] = {}
    for group, keep in zip(groups, keeps, strict=True):
        members = [units[at] for at in group]
        scores = np.concatenate([unit.scores for unit in members])
        sizes = np.concatenate([unit.sizes for unit in members]) if pattern is not None and pattern.block else None
        locked = int(np.isinf(scores).sum() if sizes is None else sizes[np.isinf(scores)].sum())
        keep = max(keep, locked)
        kept = top_mask(scores, keep) if sizes is None else top_units(scores, sizes, keep)
        ends = np.cumsum([len(unit.scores) for unit in members])[:-1]
        for at, part in zip(group, np.split(kept, ends), strict=True):
            masks[at] = _mask(part, tensors[at].scores.shape, pattern)
    return [masks[at] for at in range(len(tensors))]


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


def _units(scores: np.ndarray, pattern: Pattern | None, least: float) -> _Units:
    if pattern is not None and pattern.block is not None:
        means, sizes = block_means(scores, pattern.block)
        flat, sizes = means.reshape(-1), sizes.reshape(-1)
    else:
        flat, sizes = scores.reshape(-1), np.ones(1, np.int64)
    if pattern is not None and pattern.block is None:
        flat = np.where(n_of_m_mask(scores, pattern.n, pattern.m).reshape(-1), np.inf, flat)
    if least > 0:
        flat = np.where(top_mask(flat, math.ceil(least * len(flat))), np.inf, flat)
    return _Units(flat, np.broadcast_to(sizes, flat.shape), scores.size)


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
