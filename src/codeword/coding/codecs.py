"""The codecs of a leaf: an array of any dtype in, the shortest of several codings out.

Coding sees a leaf as unsigned integers whose order makes neighbours close (`_to_keys`): signed integers shift their
zero to the middle, floats rotate their sign into the lowest bit, so that the top byte of a float is its exponent.

| id | codec  | payload |
|----|--------|---------|
| 0  | raw    | the array's own bytes, little endian |
| 1  | packed | base, width; then key - base in `width` bits each (width 0: a constant) |
| 2  | rans   | base, alphabet, lanes and limit; states; words (kernels/rans.py) |
| 3  | planes | for each byte of the key, highest first: codec, length, payload |
| 4  | rising | strictly increasing keys: the first, then codec and payload of the gaps less one |
| 8  | spaced | base, shift; codec and payload of (key - base) >> shift, whose lost bits are 0; in pools only |

docs/design/format.md is normative; this module is the reference implementation.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from codeword.coding.varint import Reader, put_varint
from codeword.errors import FormatError
from codeword.expr import FLOATS, dtype_name
from codeword.kernels.bits import pack_bits, packed_nbytes, unpack_bits
from codeword.kernels.rans import MAX_ALPHABET, MAX_LANES, adaptive_cost, rans_decode, rans_encode


class Codec(enum.IntEnum):
    """How a leaf's bytes are written; the value is what stands in the file."""

    RAW = 0
    PACKED = 1
    RANS = 2
    PLANES = 3
    RISING = 4
    SPACED = 8  # 5 to 7 stand where a codec stands and are none (artifact/layout.py)


# Where the model forgets: never, slowly, fast. The index stands in the file; the encoder takes the cheapest.
LIMITS = (1 << 62, 1 << 16, 1 << 13)
_BYTES_A_LANE = 400  # coded bytes that pay for one more lane: four bytes of state stay below 1 %
_Coded: TypeAlias = tuple[Codec, bytes]
_IN_SPACED = (Codec.PACKED, Codec.RANS)
_KEYS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def encode_leaf(values: np.ndarray, *, spaced: bool = False) -> _Coded:
    """Shortest coding of an array of any shape (C order) and any dtype of the format. Pure: same array, same bytes.

    spaced: that codec may be used too.
    """
    return _encode_keys(_to_keys(values), raw=lambda: _raw_bytes(values), spaced=spaced)


def decode_leaf(
    codec: Codec,
    data: bytes,
    dtype: np.dtype,
    shape: tuple[int, ...],
    where: str = "leaf",
    *,
    spaced: bool = False,
) -> np.ndarray:
    """Inverse of `encode_leaf`. Raises FormatError, naming `where`, if data is not exactly one coding of such an array.

    Allocates the array that shape and dtype declare; a caller that does not trust them caps them first.
    """
    count = math.prod(shape)
    if codec is Codec.RAW:
        if len(data) != count * dtype.itemsize:
            raise FormatError(
                f"{where}: {count} values of {dtype} need {count * dtype.itemsize} bytes, has {len(data)}"
            )
        values = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)
        if dtype == np.bool_ and data.strip(b"\0\1"):
            raise FormatError(f"{where}: a bool that is neither 0 nor 1")
        return values.reshape(shape)
    keys = _decode_keys(codec, Reader(data, where), _KEYS[dtype.itemsize], count, spaced=spaced)
    return _from_keys(keys, dtype, where).reshape(shape)


def _raw_bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _to_keys(values: np.ndarray) -> np.ndarray:
    """Flat unsigned keys, one to one with the values' bit patterns."""
    bits = 8 * values.itemsize
    native = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("="), copy=False)
    keys = native.reshape(-1).view(_KEYS[values.itemsize])
    if dtype_name(values.dtype) in FLOATS:
        return keys << keys.dtype.type(1) | keys >> keys.dtype.type(bits - 1)
    if values.dtype.kind == "i":
        return keys ^ keys.dtype.type(1 << (bits - 1))
    return keys


def _from_keys(keys: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    bits, one = 8 * dtype.itemsize, keys.dtype.type(1)
    if dtype_name(dtype) in FLOATS:
        return (keys >> one | keys << keys.dtype.type(bits - 1)).view(dtype)
    if dtype.kind == "i":
        return (keys ^ keys.dtype.type(1 << (bits - 1))).view(dtype)
    if dtype == np.bool_ and keys.size and keys.max() > 1:
        raise FormatError(f"{where}: a bool that is neither 0 nor 1")
    return keys.view(dtype)


def _encode_keys(
    keys: np.ndarray, raw: Callable[[], bytes] | None = None, *, rising: bool = True, spaced: bool = False
) -> _Coded:
    """The shortest coding of keys (n,); `raw` makes the bytes of the raw codec if they are not the keys' own."""
    if not keys.size:
        return Codec.RAW, b""
    low, high = int(keys.min()), int(keys.max())
    width = (high - low).bit_length()
    head = put_varint(low) + bytes([width])
    packed_size = len(head) + packed_nbytes(keys.size, width)
    size = min(keys.nbytes, packed_size)  # raw and packed need no coding to know their size
    candidates: list[_Coded] = []
    if 0 < high - low < MAX_ALPHABET:
        candidates += _encode_rans(keys, low, high - low + 1, size)
    if width and keys.itemsize > 1:
        planes = (_encode_plane(plane, spaced=spaced) for plane in _planes(keys))
        candidates.append((Codec.PLANES, b"".join(planes)))
    if rising and keys.size > 1 and np.all(keys[1:] > keys[:-1]):
        codec, gaps = _encode_keys(np.diff(keys) - keys.dtype.type(1), rising=False)
        candidates.append((Codec.RISING, put_varint(low) + bytes([codec]) + gaps))
    shift = _low_zeros(keys - keys.dtype.type(low)) if spaced and width else 0
    if shift:
        codec, rest = _encode_keys((keys - keys.dtype.type(low)) >> keys.dtype.type(shift), rising=False)
        if codec in _IN_SPACED:
            candidates.append((Codec.SPACED, put_varint(low) + bytes([shift, codec]) + rest))
    best = min(candidates, key=lambda coded: len(coded[1]), default=None)
    if best is not None and len(best[1]) < size:
        return best
    if packed_size < keys.nbytes:
        return Codec.PACKED, head + pack_bits(keys - keys.dtype.type(low), width)
    return Codec.RAW, raw() if raw is not None else _raw_bytes(keys)


def _low_zeros(keys: np.ndarray) -> int:
    """Low bits that are 0 in all of them, at least one of which is not 0."""
    together = int(np.bitwise_or.reduce(keys))
    return (together & -together).bit_length() - 1


def _encode_rans(keys: np.ndarray, low: int, alphabet: int, bound: int) -> list[_Coded]:
    """rANS, or nothing if the model's cost says that it will not get below `bound` bytes."""
    symbols = (keys - keys.dtype.type(low)).astype(np.uint8 if alphabet <= 256 else np.uint16, copy=False)
    limits = range(len(LIMITS)) if len(symbols) > LIMITS[-1] else range(1)  # too short to forget anything
    costs = [adaptive_cost(symbols, alphabet, 1, LIMITS[index]) for index in limits]
    limit = int(np.argmin(costs))
    nbytes = costs[limit] / 8
    lanes = min(1 << max(0, int(nbytes // _BYTES_A_LANE).bit_length() - 1), MAX_LANES)
    head = put_varint(low) + put_varint(alphabet - 1) + bytes([limit << 4 | lanes.bit_length() - 1])
    if len(head) + 2 * lanes + nbytes >= bound:
        return []
    states, words = rans_encode(symbols, alphabet, lanes, LIMITS[limit])
    return [(Codec.RANS, head + states.astype("<u4").tobytes() + words.astype("<u2").tobytes())]


def _planes(keys: np.ndarray) -> list[np.ndarray]:
    return [(keys >> keys.dtype.type(8 * byte)).astype(np.uint8) for byte in reversed(range(keys.itemsize))]


def _encode_plane(plane: np.ndarray, *, spaced: bool) -> bytes:
    codec, data = _encode_keys(plane, rising=False, spaced=spaced)
    return bytes([codec]) + put_varint(len(data)) + data


def _decode_keys(
    codec: Codec, reader: Reader, dtype: np.dtype, count: int, *, depth: int = 0, spaced: bool = False
) -> np.ndarray:
    match codec:
        case Codec.RAW:
            data = reader.take(count * dtype.itemsize)
            keys = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
        case Codec.PACKED:
            keys = _decode_packed(reader, dtype, count)
        case Codec.RANS:
            keys = _decode_rans(reader, dtype, count)
        case Codec.PLANES if depth < 2 and dtype.itemsize > 1:
            keys = np.zeros(count, dtype)
            for _ in range(dtype.itemsize):
                inner = read_codec(reader)
                part = Reader(reader.take(reader.varint()), reader.where)
                plane = _decode_keys(inner, part, _KEYS[1], count, depth=2, spaced=spaced)
                keys = keys << dtype.type(8) | plane.astype(dtype)
        case Codec.RISING if depth < 1 and count:
            first, inner = reader.varint(), read_codec(reader)
            gaps = _decode_keys(inner, reader, dtype, count - 1, depth=1)
            keys = _sum_gaps(first, gaps, reader.where)
        case Codec.SPACED if spaced:
            keys = _decode_spaced(reader, dtype, count)
        case _:
            raise FormatError(f"{reader.where}: codec {codec.name.lower()} does not fit here")
    reader.finish()
    return keys


def read_codec(reader: Reader) -> Codec:
    """The codec that stands next. Raises FormatError for one that is unknown."""
    value = reader.byte()
    try:
        return Codec(value)
    except ValueError:
        raise FormatError(f"{reader.where}: codec {value} is unknown to this version") from None


def _base(reader: Reader, dtype: np.dtype, span: int) -> int:
    """Reads the base, and checks that base + span still fits the key."""
    base = reader.varint()
    if base + span >= 1 << 8 * dtype.itemsize:
        raise FormatError(f"{reader.where}: base {base} and range {span} pass {8 * dtype.itemsize} bits")
    return base


def _decode_packed(reader: Reader, dtype: np.dtype, count: int) -> np.ndarray:
    base = _base(reader, dtype, 0)
    width = reader.byte()
    if width > 8 * dtype.itemsize:
        raise FormatError(f"{reader.where}: width {width} in a key of {8 * dtype.itemsize} bits")
    values = unpack_bits(reader.take(packed_nbytes(count, width)), width, count, dtype)
    if count and int(values.max()) + base >= 1 << 8 * dtype.itemsize:
        raise FormatError(f"{reader.where}: base {base} and a value of {int(values.max())} overflow")
    return values + dtype.type(base)


def _decode_rans(reader: Reader, dtype: np.dtype, count: int) -> np.ndarray:
    base, alphabet, flags = reader.varint(), reader.varint() + 1, reader.byte()
    lanes, limit = 1 << (flags & 15), flags >> 4
    if not 2 <= alphabet <= MAX_ALPHABET or lanes > MAX_LANES or limit >= len(LIMITS):
        raise FormatError(f"{reader.where}: rans of {alphabet} symbols, {lanes} lanes, limit {limit} is out of bounds")
    if base + alphabet - 1 >= 1 << 8 * dtype.itemsize:
        raise FormatError(f"{reader.where}: base {base} and {alphabet} symbols pass {8 * dtype.itemsize} bits")
    states = np.frombuffer(reader.take(4 * lanes), "<u4")
    if reader.left % 2:
        raise FormatError(f"{reader.where}: half a word at the end")
    words = np.frombuffer(reader.rest(), "<u2")
    if np.any(states < 1 << 16):
        raise FormatError(f"{reader.where}: a rans state below 2**16")
    small = np.dtype(np.uint8 if alphabet <= 256 else np.uint16)
    try:
        symbols = rans_decode(states, words, count, alphabet, LIMITS[limit], small)
    except FormatError as error:
        raise FormatError(f"{reader.where}: {error}") from None
    return symbols.astype(dtype, copy=False) + dtype.type(base)


def _decode_spaced(reader: Reader, dtype: np.dtype, count: int) -> np.ndarray:
    base, shift = _base(reader, dtype, 0), reader.byte()
    inner, bits = read_codec(reader), 8 * dtype.itemsize
    if not 0 < shift < bits or inner not in _IN_SPACED:
        raise FormatError(f"{reader.where}: spaced by {shift} bits of {bits} over codec {inner.name.lower()}")
    steps = _decode_keys(inner, reader, dtype, count, depth=2)
    if count and base + (int(steps.max()) << shift) >= 1 << bits:
        raise FormatError(f"{reader.where}: base {base} and {int(steps.max())} << {shift} pass {bits} bits")
    return (steps << dtype.type(shift)) + dtype.type(base)


def _sum_gaps(first: int, gaps: np.ndarray, where: str) -> np.ndarray:
    keys = np.empty(len(gaps) + 1, gaps.dtype)
    keys[0] = first if first < 1 << 8 * gaps.itemsize else 0
    with np.errstate(over="ignore"):
        np.cumsum(gaps + gaps.dtype.type(1), out=keys[1:])
        keys[1:] += keys[0]
    if keys[0] != first or np.any(keys[1:] <= keys[:-1]):
        raise FormatError(f"{where}: rising values pass {8 * gaps.itemsize} bits")
    return keys
