"""Bit packing at any width: value i takes bits [i*width, (i+1)*width) of the stream, least significant bit first."""

from __future__ import annotations

import numpy as np

from codeword.kernels import native

# Values per step: a multiple of 8, so that every step ends on a byte; small, because a bit takes a byte while packing.
_STEP = 1 << 16


def packed_nbytes(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Pack values (n,) unsigned, each below 2**width, width 0..64."""
    if width == 0:
        return b""
    run = pack_bits_numpy if native.library() is None else _pack_bits_native
    return run(values, width)


def unpack_bits(data: bytes, width: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Inverse of `pack_bits`: (count,) values of an unsigned dtype from packed_nbytes(count, width) bytes."""
    if width == 0:
        return np.zeros(count, dtype)
    run = unpack_bits_numpy if native.library() is None else _unpack_bits_native
    return run(data, width, count, dtype)


def pack_bits_numpy(values: np.ndarray, width: int) -> bytes:
    """Reference of `pack_bits`."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    parts = []
    for at in range(0, len(little), _STEP):
        octets = little[at : at + _STEP].view(np.uint8).reshape(-1, little.itemsize)
        bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits_numpy(data: bytes, width: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Reference of `unpack_bits`."""
    values = np.zeros(count, dtype.newbyteorder("<"))
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


def _pack_bits_native(values: np.ndarray, width: int) -> bytes:
    plain = np.require(values, values.dtype.newbyteorder("="), ["C", "A"])
    if not (plain.dtype.kind == "u" and 1 <= width <= 64):
        raise ValueError(f"cannot pack {values.dtype} in {width} bits")
    data = np.empty(packed_nbytes(len(plain), width), np.uint8)
    native.call("cw_pack_bits", plain, plain.itemsize, len(plain), width, native.threads(), data)
    return data.tobytes()


def _unpack_bits_native(data: bytes, width: int, count: int, dtype: np.dtype) -> np.ndarray:
    values, stream = np.empty(count, dtype.newbyteorder("=")), np.frombuffer(data, np.uint8)
    if len(stream) < packed_nbytes(count, width) or not 1 <= width <= 8 * dtype.itemsize or dtype.kind != "u":
        raise ValueError(f"{len(stream)} bytes are not {count} values of {width} bits in {dtype}")
    native.call("cw_unpack_bits", stream, count, width, native.threads(), values, values.itemsize)
    return values.astype(dtype, copy=False)
