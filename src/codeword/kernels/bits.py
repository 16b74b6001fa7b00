"""Bit packing at any width: value i takes bits [i*width, (i+1)*width) of the stream, least significant bit first."""

from __future__ import annotations

import numpy as np

# Values per step: a multiple of 8, so that every step ends on a byte; small, because a bit takes a byte while packing.
_STEP = 1 << 16


def packed_nbytes(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Pack values (n,) unsigned, each below 2**width, width 0..64."""
    if width == 0:
        return b""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    parts = []
    for at in range(0, len(little), _STEP):
        octets = little[at : at + _STEP].view(np.uint8).reshape(-1, little.itemsize)
        bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes, width: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Inverse of `pack_bits`: (count,) values of an unsigned dtype from packed_nbytes(count, width) bytes."""
    values = np.zeros(count, dtype.newbyteorder("<"))
    if width == 0:
        return values.astype(dtype, copy=False)
    octets = values.view(np.uint8).reshape(count, dtype.itemsize)
    stream = np.frombuffer(data, np.uint8)
    for at in range(0, count, _STEP):
        here = min(_STEP, count - at)
        first = at * width // 8
        chunk = stream[first : first + packed_nbytes(here, width)]
        bits = np.unpackbits(chunk, count=here * width, bitorder="little").reshape(here, width)
        packed = np.packbits(bits, axis=1, bitorder="little")
        octets[at : at + here, : packed.shape[1]] = packed
    return values.astype(dtype, copy=False)
