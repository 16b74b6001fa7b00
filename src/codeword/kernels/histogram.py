"""One pass over the weights into bins fine enough that clustering never looks at the weights again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels.chunks import chunks

_KEY_BITS = 20  # of an order-preserving float32 key: sign, exponent and 11 bits of mantissa, 0.05 % wide or less


class Sums(NamedTuple):
    """What each occupied bin holds, bins by rising value; all (m,) float64."""

    counts: np.ndarray  # number of weights
    weight: np.ndarray  # sum of importance
    first: np.ndarray  # sum of importance * value
    second: np.ndarray  # sum of importance * value**2


def histogram(values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None) -> Sums:
    """Bin values (r, c), each row divided by scale (r,), weighted by importance (r, c).

    Bins follow the bit pattern of float32, so an outlier of 1e30 costs nothing: precision is relative everywhere.
    Memory does not grow with the number of values. All values finite.
    """
    bins = 1 << _KEY_BITS
    counts, weight, first, second = (np.zeros(bins) for _ in range(4))
    for where, part in chunks(values, scale):
        flat = part.reshape(-1)
        keys = _keys(flat)
        moment = flat.astype(np.float64)
        counts += np.bincount(keys, minlength=bins)
        if importance is not None:
            h = importance[where].reshape(-1).astype(np.float64)
            weight += np.bincount(keys, h, bins)
            moment *= h
        first += np.bincount(keys, moment, bins)
        moment *= flat
        second += np.bincount(keys, moment, bins)
    if importance is None:
        weight = counts
    (occupied,) = np.nonzero(counts)
    return Sums(counts[occupied], weight[occupied], first[occupied], second[occupied])


def _keys(values: np.ndarray) -> np.ndarray:
    """Order-preserving integers: flip all bits of negatives, the sign bit of the others, keep the top bits."""
    bits = values.view(np.uint32)
    flip = np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return ((bits ^ flip) >> np.uint32(32 - _KEY_BITS)).astype(np.int64)
