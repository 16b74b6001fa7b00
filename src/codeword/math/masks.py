"""Which weights stay: masks from scores, the larger the score the dearer the weight.

All are deterministic: of equal scores the earlier weight stays.
"""

from __future__ import annotations

import numpy as np


def top_mask(scores: np.ndarray, keep: int) -> np.ndarray:
    """A mask of scores' shape that is True for the `keep` largest."""
    flat = scores.reshape(-1)
    mask = np.zeros(flat.shape, bool)
    if keep >= len(flat):
        mask[:] = True
    elif keep > 0:
        least = np.partition(flat, len(flat) - keep)[len(flat) - keep]
        mask[flat > least] = True
        (level,) = np.nonzero(flat == least)
        mask[level[: keep - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def n_of_m_mask(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Of each m neighbours in a row of scores (r, c) the n largest stay; a shorter last run: its share, rounded up.

    What sparse tensor cores take for n = 2, m = 4.
    """
    rows, columns = scores.shape
    full = columns // m * m
    mask = np.zeros(scores.shape, bool)
    for part, width, keep in (
        (slice(0, full), m, n),
        (slice(full, columns), columns - full, -(-(columns - full) * n // m)),
    ):
        if not width or part.start == part.stop:
            continue
        runs = scores[:, part].reshape(-1, width)
        order = np.argsort(-runs, axis=1, kind="stable")
        kept = np.zeros(runs.shape, bool)
        np.put_along_axis(kept, order[:, :keep], True, axis=1)
        mask[:, part] = kept.reshape(rows, -1)
    return mask


def block_mask(scores: np.ndarray, block: tuple[int, int], keep: int) -> np.ndarray:
    """Blocks of (rows, columns) of scores (r, c) stay or go whole, by their mean score; `keep` weights at least stay.

    Blocks at the lower and right edge may be smaller.
    """
    means, sizes = block_means(scores, block)
    return spread(top_units(means, sizes, keep), block, scores.shape)


def block_means(scores: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(mean score, number of weights) of each block of scores (r, c), (blocks down, blocks across) both."""
    tall, down = _edges(scores.shape[0], block[0])
    wide, across = _edges(scores.shape[1], block[1])
    sums = np.add.reduceat(np.add.reduceat(scores.astype(np.float64), down, axis=0), across, axis=1)
    sizes = np.outer(tall, wide)
    return sums / sizes, sizes


def top_units(scores: np.ndarray, sizes: np.ndarray, keep: int) -> np.ndarray:
    """A mask of scores' shape, True for the units of largest score until `keep` weights at least are in them."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes.reshape(-1)[order]), keep)) + 1 if keep > 0 else 0
    kept = np.zeros(sizes.size, bool)
    kept[order[:enough]] = True
    return kept.reshape(scores.shape)


def spread(kept: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """What is said of blocks (blocks down, blocks across), said of each of their weights: `shape` is (r, c)."""
    tall, _ = _edges(shape[0], block[0])
    wide, _ = _edges(shape[1], block[1])
    return kept.repeat(tall, axis=0).repeat(wide, axis=1)


def _edges(length: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, starts) of runs of `step` in `length`, the last as long as is left."""
    starts = np.arange(0, length, step)
    return np.minimum(step, length - starts), starts
