"""Walking over a weight matrix in pieces that fit the cache, so that temporaries stay small whatever the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

Where: TypeAlias = tuple[slice, slice]
CHUNK = 1 << 20
_WIDE = (np.float32, np.float64)
_AS_IT_IS = (*_WIDE, np.uint8, np.uint16, np.uint32)


def chunks(values: np.ndarray, scale: np.ndarray | None) -> Iterator[tuple[Where, np.ndarray]]:
    """(where, values[where] / scale as a float32 copy) over values (r, c), each row divided by scale (r,)."""
    for where in pieces(values.shape):
        part = values[where].astype(np.float32)
        if scale is not None:
            part /= scale[where[0], None]
        yield where, part


def pieces(shape: tuple[int, ...], *, whole: bool = False) -> Iterator[Where]:
    """Where the chunks of an array (r, c) are; whole: all of it is one."""
    if whole:
        yield slice(None), slice(None)
        return
    rows = max(1, CHUNK // max(shape[1], 1))
    for row in range(0, shape[0], rows):
        for column in range(0, shape[1], CHUNK):
            yield slice(row, row + rows), slice(column, column + CHUNK)


def blocks(
    values: np.ndarray, scale: np.ndarray | None, *beside: np.ndarray | None
) -> Iterator[tuple[Where, np.ndarray, np.ndarray | None]]:
    """(where, part, divisor) for a native kernel, which divides part by the divisor (r of part,) if there is one.

    Float32 in C order goes down as it is, in one piece, unless what lies beside it (importance, codes: of the same
    shape) would have to be copied; anything else chunk by chunk, as copies.
    """
    for array in beside:
        if array is not None and array.shape != values.shape:
            raise ValueError(f"values {values.shape} and what lies beside them {array.shape} differ in shape")
    if values.ndim != 2 or (scale is not None and scale.shape != values.shape[:1]):
        raise ValueError(f"values {values.shape} must be a matrix, with a scale for each row if any")
    plain = values.dtype == np.float32 and is_plain(values) and (scale is None or scale.dtype == np.float32)
    if plain and all(array is None or (array.dtype in _AS_IT_IS and is_plain(array)) for array in beside):
        yield (slice(None), slice(None)), values, None if scale is None else np.ascontiguousarray(scale)
        return
    for where, part in chunks(values, scale):
        yield where, np.ascontiguousarray(part), None


def wide(importance: np.ndarray) -> np.ndarray:
    """Importance as a native kernel takes it: float32 or float64 in C order, without a copy if it is that."""
    dtype = importance.dtype if importance.dtype in _WIDE else np.float64
    return np.require(importance, dtype, ["C", "A"])


def is_plain(array: np.ndarray) -> bool:
    """Whether a kernel can read the array where it lies."""
    return array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative
