"""One pass over the weights into bins fine enough that clustering never looks at the weights again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels import chunks as walk
from codeword.kernels import native
from codeword.kernels.chunks import blocks, chunks, wide

_KEY_BITS = 20  # of an order-preserving float32 key: sign, exponent and 11 bits of mantissa, 0.05 % wide or less
_LOW_BITS = 32 - _KEY_BITS
_BINS = 1 << _KEY_BITS
_PATTERNS = 1 << 16


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
    whole = np.zeros((_BINS, 3), np.int64)
    for _, part in chunks(values, scale):
        keys = bin_keys(part.reshape(-1))
        rest = low_bits(part.reshape(-1)).astype(np.float64)
        for power in range(3):
            whole[:, power] += np.bincount(keys, rest**power, _BINS).astype(np.int64)  # below 2**53: exact
    return whole_sums_numpy(_found(whole))


def prefixes(parts: np.ndarray, anchor: int) -> np.ndarray:
    """(r, m+1) P with P[j] - P[i] = sum of parts[i:j] and P[anchor] = 0, for each row of parts (r, m)."""
    run = prefixes_numpy if native.library() is None else _prefixes_native
    return run(parts, anchor)


def prefixes_numpy(parts: np.ndarray, anchor: int) -> np.ndarray:
    """Reference of `prefixes`."""
    right = np.cumsum(parts[:, anchor:], axis=1)
    left = -np.cumsum(parts[:, :anchor][:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([left, np.zeros((len(parts), 1)), right], axis=1)


def _weighted_sums(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray) -> Sums:
    counts, weight, first, second = (np.zeros(_BINS) for _ in range(4))
    for where, part in chunks(values, scale):
        flat = part.reshape(-1)
        keys = bin_keys(flat)
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


def _found(whole: np.ndarray) -> np.ndarray:
    """(m, 4) key, count, low and square of the occupied ones among all bins (bins, 3)."""
    (keys,) = np.nonzero(whole[:, 0])
    return np.column_stack([keys, whole[keys]])


def whole_sums_numpy(found: np.ndarray) -> Sums:
    """Sums from integers alone, hence the same in whatever order they were added up.

    The values of a bin share sign, exponent and the upper mantissa: each is +-(base + unit * low), low the lower bits.
    Columns of found (m, 4): the bin's key, and its sums of 1, low and low**2.
    """
    key = found[:, 0].astype(np.uint32)
    positive = key >> np.uint32(_KEY_BITS - 1) == 1
    upper = np.where(positive, key, ~key) << np.uint32(_LOW_BITS) & np.uint32(0x7FFFFFFF)
    base = upper.view(np.float32).astype(np.float64)
    unit = np.ldexp(1.0, np.maximum(upper >> np.uint32(23), 1).astype(np.int32) - 150)
    n, low_sum, square_sum = found[:, 1:].T.astype(np.float64)
    first = n * base + low_sum * unit
    second = n * (base * base) + 2 * (base * unit) * low_sum + unit * unit * square_sum
    return Sums(n, n, np.where(positive, first, -first), second)


def bin_keys(values: np.ndarray) -> np.ndarray:
    """The bins of values (n,) float32, int64: integers in the order of the values."""
    bits = values.view(np.uint32)
    # Flip all of negatives, the sign bit of the others, keep the top.
    flip = np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return ((bits ^ flip) >> np.uint32(_LOW_BITS)).astype(np.int64)


def low_bits(values: np.ndarray) -> np.ndarray:
    """What bins of values (n,) float32 leave out: their lower bits, uint32."""
    return values.view(np.uint32) & np.uint32((1 << _LOW_BITS) - 1)


def _histogram_native(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None) -> Sums:
    threads = native.threads()
    if importance is not None:
        sums = tuple(np.zeros(_BINS) for _ in range(4))
        for where, part, divisor in blocks(values, scale, importance):
            h = wide(importance[where])
            native.call("cw_histogram_weighted", part, *part.shape, divisor, h, h.itemsize, walk.CHUNK, threads, *sums)
        return _occupied(*sums)
    if is_16_bit(values) and scale is None and values.size > _PATTERNS:
        return _whole_sums_native(_count16(values, threads))
    found = []
    for _, part, divisor in blocks(values, scale):
        here = np.empty((min(part.size, _BINS), 4), np.int64)
        m = native.call("cw_histogram", part, *part.shape, divisor, threads, here)
        found.append(here[:m].copy())
    if len(found) == 1:
        return _whole_sums_native(found[0])
    whole = np.zeros((_BINS, 3), np.int64)
    for part in found:
        whole[part[:, 0]] += part[:, 1:]
    return _whole_sums_native(_found(whole))


def _whole_sums_native(found: np.ndarray) -> Sums:
    sums = np.empty((3, len(found)))
    native.call("cw_whole_sums", np.require(found, np.int64, ["C", "A"]), len(found), sums)
    return Sums(sums[0], sums[0], sums[1], sums[2])


def _prefixes_native(parts: np.ndarray, anchor: int) -> np.ndarray:
    parts = np.require(parts, np.float64, ["C", "A"])
    if parts.ndim != 2 or not 0 <= anchor <= parts.shape[1]:
        raise ValueError(f"anchor {anchor} of parts {parts.shape}")
    sums = np.empty((len(parts), parts.shape[1] + 1))
    native.call("cw_prefixes", parts, *parts.shape, anchor, sums)
    return sums


def is_16_bit(values: np.ndarray) -> bool:
    """Whether values are floats of 16 bits, which have so few patterns that tables serve."""
    return values.itemsize == 2 and values.dtype.kind not in "iu" and values.dtype.isnative


def _count16(values: np.ndarray, threads: int) -> np.ndarray:
    """What `whole_sums_numpy` takes, for values (r, c) of 16 bits: no two share a bin, so low bits are all zero."""
    seen = np.zeros(_PATTERNS, np.int64)
    for where in walk.pieces(values.shape, whole=walk.is_plain(values)):
        part = np.ascontiguousarray(values[where]).view(np.uint16)
        native.call("cw_count16", part, part.size, threads, seen)
    (patterns,) = np.nonzero(seen)
    keys = bin_keys(patterns.astype(np.uint16).view(values.dtype).astype(np.float32))
    rising = np.argsort(keys)
    found = np.zeros((len(keys), 4), np.int64)
    found[:, 0], found[:, 1] = keys[rising], seen[patterns[rising]]
    return found
