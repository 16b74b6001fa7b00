"""One pass over the weights into bins fine enough that clustering never looks at the weights again."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from codeword.kernels import chunks as walk
from codeword.kernels import native
from codeword.kernels.chunks import blocks, chunks, wide

_KEY_BITS = 20  # of an order-preserving float32 key: sign, exponent and 11 bits of mantissa, 0.05 % wide or less
_LOW_BITS = 32 - _KEY_BITS
_BINS = 1 << _KEY_BITS
_PATTERNS = 1 << 16
_Integers: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


class Sums(NamedTuple):
    """What each occupied bin holds, bins by rising value; all (m,) float64."""

    counts: np.ndarray  # number of weights
    weight: np.ndarray  # sum of importance
    first: np.ndarray  # sum of importance * value
    second: np.ndarray  # sum of importance * value**2


def histogram(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None) -> Sums:
    """Bin values (r, c), each row divided by scale (r,), weighted by importance (r, c).

    Bins follow the bit pattern of float32, so an outlier of 1e30 costs nothing: precision is relative everywhere.
    Each value of float16 and bfloat16 has a bin of its own. Memory does not grow with the number of values. All values
    finite.
    """
    run = histogram_numpy if native.library() is None else _histogram_native
    return run(values, scale, importance)


def histogram_numpy(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None) -> Sums:
    """Reference of `histogram`."""
    if importance is not None:
        return _weighted_sums(values, scale, importance)
    counts, low, square = (np.zeros(_BINS, np.int64) for _ in range(3))
    for _, part in chunks(values, scale):
        bits = part.reshape(-1).view(np.uint32)
        keys = _keys(bits)
        rest = (bits & np.uint32((1 << _LOW_BITS) - 1)).astype(np.float64)
        counts += np.bincount(keys, minlength=_BINS)
        low += np.bincount(keys, rest, _BINS).astype(np.int64)  # whole numbers below 2**53: exact
        square += np.bincount(keys, rest * rest, _BINS).astype(np.int64)
    return _whole_sums(counts, low, square)


def _weighted_sums(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray) -> Sums:
    counts, weight, first, second = (np.zeros(_BINS) for _ in range(4))
    for where, part in chunks(values, scale):
        flat = part.reshape(-1)
        keys = _keys(flat.view(np.uint32))
        h = importance[where].reshape(-1).astype(np.float64)
        moment = flat.astype(np.float64) * h
        counts += np.bincount(keys, minlength=_BINS)
        weight += np.bincount(keys, h, _BINS)
        first += np.bincount(keys, moment, _BINS)
        second += np.bincount(keys, moment * flat, _BINS)
    return _occupied(counts, weight, first, second)


def _occupied(counts: np.ndarray, weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> Sums:
    (at,) = np.nonzero(counts)
    return Sums(counts[at], weight[at], first[at], second[at])


def _whole_sums(counts: np.ndarray, low: np.ndarray, square: np.ndarray) -> Sums:
    """Sums from integers alone, hence the same in whatever order they were added up.

    The values of a bin share sign, exponent and the upper mantissa: each is +-(base + unit * low), low the lower bits.
    counts, low and square (bins,) are the sums of 1, low and low**2.
    """
    (keys,) = np.nonzero(counts)
    key = keys.astype(np.uint32)
    positive = key >> np.uint32(_KEY_BITS - 1) == 1
    upper = np.where(positive, key, ~key) << np.uint32(_LOW_BITS) & np.uint32(0x7FFFFFFF)
    base = upper.view(np.float32).astype(np.float64)
    unit = np.ldexp(1.0, np.maximum(upper >> np.uint32(23), 1).astype(np.int32) - 150)
    n, low_sum, square_sum = (part[keys].astype(np.float64) for part in (counts, low, square))
    first = n * base + low_sum * unit
    second = n * (base * base) + 2 * (base * unit) * low_sum + unit * unit * square_sum
    return Sums(n, n, np.where(positive, first, -first), second)


def _keys(bits: np.ndarray) -> np.ndarray:
    """Order-preserving integers of float32 bits: flip all of negatives, the sign bit of the others, keep the top."""
    flip = np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return ((bits ^ flip) >> np.uint32(_LOW_BITS)).astype(np.int64)


def _histogram_native(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None) -> Sums:
    threads = native.threads()
    if importance is not None:
        sums = tuple(np.zeros(_BINS) for _ in range(4))
        for where, part, divisor in blocks(values, scale, importance):
            h = wide(importance[where])
            native.call("cw_histogram_weighted", part, *part.shape, divisor, h, h.itemsize, walk.CHUNK, threads, *sums)
        return _occupied(*sums)
    if values.itemsize == 2 and values.dtype.kind != "i" and scale is None and values.size > _PATTERNS:
        return _whole_sums(*_count16(values, threads))
    whole = tuple(np.zeros(_BINS, np.int64) for _ in range(3))
    for _, part, divisor in blocks(values, scale):
        native.call("cw_histogram", part, *part.shape, divisor, threads, *whole)
    return _whole_sums(*whole)


def _count16(values: np.ndarray, threads: int) -> _Integers:
    """The integers of `_whole_sums` for values (r, c) of 16 bits: no two share a bin, so low bits are all zero."""
    seen = np.zeros(_PATTERNS, np.int64)
    for where in walk.pieces(values.shape, whole=walk.is_plain(values)):
        part = np.ascontiguousarray(values[where]).view(np.uint16)
        native.call("cw_count16", part, part.size, threads, seen)
    (patterns,) = np.nonzero(seen)
    counts, none = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    counts[_keys(patterns.astype(np.uint16).view(values.dtype).astype(np.float32).view(np.uint32))] = seen[patterns]
    return counts, none, none
