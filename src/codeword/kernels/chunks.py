"""Walking over a weight matrix in pieces that fit the cache, so that temporaries stay small whatever the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

Where: TypeAlias = tuple[slice, slice]
_CHUNK = 1 << 20


def chunks(values: np.ndarray, scale: np.ndarray | None) -> Iterator[tuple[Where, np.ndarray]]:
    """(where, values[where] / scale as a float32 copy) over values (r, c), each row divided by scale (r,)."""
    rows = max(1, _CHUNK // max(values.shape[1], 1))
    for row in range(0, values.shape[0], rows):
        for column in range(0, values.shape[1], _CHUNK):
            where = slice(row, row + rows), slice(column, column + _CHUNK)
            part = values[where].astype(np.float32)
            if scale is not None:
                part /= scale[where[0], None]
            yield where, part
