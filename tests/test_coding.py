"""Leaves to bytes: every dtype and shape comes back bit for bit, never longer than raw, and bad bytes are refused."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.coding import Codec, decode_leaf, encode_leaf
from codeword.coding.varint import Reader, put_varint
from codeword.errors import FormatError
from codeword.expr import DTYPES

NAMES = sorted(DTYPES)


def same_bits(found, values):
    assert (found.dtype, found.shape) == (values.dtype.newbyteorder("="), values.shape)
    assert found.tobytes() == np.ascontiguousarray(values).astype(found.dtype).tobytes()


def round_trip(values):
    codec, data = encode_leaf(values)
    assert len(data) <= values.nbytes
    assert encode_leaf(values.copy()) == (codec, data)
    same_bits(decode_leaf(codec, data, values.dtype.newbyteorder("="), values.shape), values)
    shorter, spaced = encode_leaf(values, spaced=True)
    assert len(spaced) <= len(data)
    same_bits(decode_leaf(shorter, spaced, values.dtype.newbyteorder("="), values.shape, spaced=True), values)
    return codec, data


def random_bits(dtype, shape, generator):
    if dtype == np.bool_:
        return generator.integers(0, 2, shape).astype(bool)
    return np.frombuffer(generator.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


# -- varints ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_varints_come_back(value):
    assert Reader(put_varint(value), "here").varint() == value


def test_varints_by_hand():
    assert [put_varint(value).hex() for value in (0, 127, 128, 300)] == ["00", "7f", "8001", "ac02"]


@pytest.mark.parametrize("data", ["", "80", "8000", "ffffffffffffffffff02", "80808080808080808080 01"])
def test_varints_cut_short_too_long_or_too_large_are_refused(data):
    with pytest.raises(FormatError, match="here"):
        Reader(bytes.fromhex(data), "here").varint()


# -- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (40, 9), (2, 3, 4, 5)])
def test_every_dtype_and_shape(name, shape):
    generator = np.random.default_rng(len(shape))
    dtype = DTYPES[name]
    round_trip(random_bits(dtype, shape, generator))
    round_trip(np.zeros(shape, dtype))
    round_trip(np.ones(shape, dtype))
    small = generator.integers(0, 2 if name == "bool" else 5, shape).astype(dtype)
    round_trip(small)
    round_trip(np.sort(small.reshape(-1)).reshape(shape))


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_pattern_of_small_dtypes_and_the_ends_of_large_ones(name):
    dtype = DTYPES[name]
    if name == "bool":
        values = np.array([False, True])
    elif dtype.itemsize == 1:
        values = np.arange(256, dtype=np.uint8).view(dtype)
    elif dtype.itemsize == 2:
        values = np.arange(65536, dtype=np.uint16).view(dtype)
    else:
        top = 1 << 8 * dtype.itemsize
        ends = [0, 1, top // 2 - 1, top // 2, top // 2 + 1, top - 1]
        values = np.array(ends, f"u{dtype.itemsize}").view(dtype)
    round_trip(values)
    round_trip(values[::-1])


def test_steps_are_coded_without_the_zeros_below_them_where_that_is_allowed():
    generator = np.random.default_rng(0)
    values = (1000 + 64 * generator.integers(0, 9, 300)).astype(np.uint16)
    codec, data = encode_leaf(values, spaced=True)
    assert codec is Codec.SPACED
    assert data[:3] == put_varint(1000) + bytes([6])
    assert len(data) <= 4 + len(encode_leaf((values - 1000) >> 6)[1]) < len(encode_leaf(values)[1])
    with pytest.raises(FormatError, match="codec spaced does not fit here"):
        decode_leaf(codec, data, values.dtype, values.shape)
    # Three bits of mantissa: in the plane of its highest ones there are 8 values, 32 apart.
    floats = (generator.normal(size=300).astype(np.float32).view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32)
    codec, data = encode_leaf(floats, spaced=True)
    assert codec is Codec.PLANES
    assert len(data) < len(encode_leaf(floats)[1]) - 20
    same_bits(decode_leaf(codec, data, floats.dtype, floats.shape, spaced=True), floats)
    with pytest.raises(FormatError, match="codec spaced does not fit here"):
        decode_leaf(codec, data, floats.dtype, floats.shape)


def test_nan_payloads_infinities_and_signed_zeros_survive():
    patterns = [0x7FC00000, 0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x80000001]
    for values in (patterns, patterns * 100):
        round_trip(np.array(values, np.uint32).view(np.float32))


def test_byte_order_and_strides_do_not_matter():
    for dtype in (">i2", ">u4", ">f4", ">f8"):
        values = np.arange(-300, 300).astype(dtype)
        assert encode_leaf(values) == encode_leaf(values.astype(values.dtype.newbyteorder("<")))
        round_trip(values)
    grid = np.arange(60, dtype=np.uint16).reshape(6, 10)
    assert encode_leaf(grid.T[::2]) == encode_leaf(np.ascontiguousarray(grid.T[::2]))


@given(st.data())
@settings(deadline=None)
def test_round_trip_of_any_integers(data):
    dtype = DTYPES[data.draw(st.sampled_from([name for name in NAMES if "int" in name]))]
    info = np.iinfo(dtype)
    low = data.draw(st.integers(info.min, info.max))
    high = data.draw(st.integers(low, min(info.max, low + data.draw(st.sampled_from([0, 1, 40, 5000, 2**64])))))
    values = np.array(data.draw(st.lists(st.integers(low, high), max_size=60)), dtype)
    round_trip(np.sort(values) if data.draw(st.booleans()) else values)


# -- the choice of a codec ----------------------------------------------------------------------------------------


def skewed(n, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(0.6, n) - 1, 30)


def test_the_codec_that_suits_the_values_is_taken():
    generator = np.random.default_rng(0)
    wide = generator.integers(0, 256, 500).astype(np.uint8)
    assert encode_leaf(wide)[0] is Codec.RAW
    assert encode_leaf(generator.integers(0, 8, 500).astype(np.uint8))[0] is Codec.PACKED
    assert encode_leaf(np.full((100, 100), 3.5))[0] is Codec.PACKED
    assert len(encode_leaf(np.full((100, 100), 7, np.int8))[1]) <= 3
    assert encode_leaf(skewed(5000).astype(np.uint8))[0] is Codec.RANS
    assert encode_leaf(generator.normal(size=5000).astype(np.float32))[0] is Codec.PLANES
    positions = np.flatnonzero(generator.random(50_000) < 0.1).astype(np.uint32)
    codec, data = encode_leaf(positions)
    assert codec is Codec.RISING
    assert len(data) * 8 < 5.5 * len(positions)  # the entropy of the gaps is 4.7 bits


def test_skewed_codes_come_near_their_entropy():
    codes = skewed(100_000).astype(np.uint8)
    share = np.bincount(codes) / len(codes)
    entropy = -np.sum(share[share > 0] * np.log2(share[share > 0]))
    assert 8 * len(encode_leaf(codes)[1]) / len(codes) < 1.012 * entropy


def test_signed_values_around_zero_are_as_cheap_as_unsigned_ones():
    steps = np.random.default_rng(0).integers(-3, 4, 4000).astype(np.int16)
    assert len(encode_leaf(steps)[1]) <= len(encode_leaf((steps + 3).astype(np.uint16))[1]) + 2


# -- bytes by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "data", "dtype", "expected"),
    [
        (Codec.RAW, "0100feff", np.int16, [1, -2]),
        (Codec.PACKED, "05 02 e4", np.uint8, [5, 6, 7, 8]),
        (Codec.PACKED, "7e 02 e4", np.int8, [-2, -1, 0, 1]),
        (Codec.PACKED, "818080f807 00", np.float32, [-1.0, -1.0]),  # 0xbf800000 rotated is 0x7f000001
        (Codec.RISING, "0a 00 0000 0300", np.uint16, [10, 11, 15]),
        (Codec.RISING, "0a 01 02 00", np.uint16, [10, 13, 16]),
        (Codec.PLANES, "01 02 0100 00 02 0507", np.uint16, [0x105, 0x107]),
    ],
)
def test_streams_by_hand(codec, data, dtype, expected):
    found = decode_leaf(codec, bytes.fromhex(data), np.dtype(dtype), (len(expected),))
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("codec", "data", "dtype", "count", "why"),
    [
        (Codec.RAW, "00", "u2", 1, "need 2 bytes"),
        (Codec.RAW, "02", "?", 1, "bool"),
        (Codec.PACKED, "00 02 03", "?", 1, "bool"),
        (Codec.PACKED, "00 09 0000", "u1", 1, "width"),
        (Codec.PACKED, "8002 00", "u1", 1, "base"),
        (Codec.PACKED, "ff01 01 01", "u1", 1, "overflow"),
        (Codec.PACKED, "00 01 01 00", "u1", 1, "too many"),
        (Codec.PACKED, "00 01", "u1", 1, "needs 1 bytes"),
        (Codec.RANS, "00 00 00 00000100", "u1", 0, "out of bounds"),  # one symbol
        (Codec.RANS, "00 8020 00 00000100", "u2", 0, "out of bounds"),  # 4097 symbols
        (Codec.RANS, "00 01 0d 00000100", "u1", 0, "out of bounds"),  # 2**13 lanes
        (Codec.RANS, "00 01 30 00000100", "u1", 0, "out of bounds"),  # limit 3
        (Codec.RANS, "ff01 01 00 00000100", "u1", 0, "pass 8 bits"),
        (Codec.RANS, "00 01 00 ffff0000", "u1", 0, "below"),
        (Codec.RANS, "00 01 00 00000100 00", "u1", 0, "half a word"),
        (Codec.RANS, "00 01 00 00000100 0000", "u1", 0, "1 words are left"),
        (Codec.RANS, "00 01 00 01000100", "u1", 0, "states not at"),
        (Codec.PLANES, "00 01 05", "u1", 1, "does not fit"),
        (Codec.PLANES, "03 00 00 00", "u2", 1, "does not fit"),
        (Codec.PLANES, "04 01 00 00 01 00", "u2", 1, "does not fit"),
        (Codec.PLANES, "00 01 00 00 02 0000", "u2", 1, "too many"),
        (Codec.PLANES, "05 01 00 00 01 00", "u2", 1, "codec 5"),
        (Codec.RISING, "00 00", "u1", 0, "does not fit"),
        (Codec.RISING, "00 04 00 00", "u1", 2, "does not fit"),
        (Codec.RISING, "8002 00", "u1", 1, "pass 8 bits"),
        (Codec.RISING, "ff01 00 00", "u1", 2, "pass 8 bits"),
        (Codec.RISING, "00 00 ff", "u1", 2, "pass 8 bits"),
        (Codec.RISING, "00 00 ffffffffffffffff", "u8", 2, "pass 64 bits"),
    ],
)
def test_malformed_streams_are_refused(codec, data, dtype, count, why):
    with pytest.raises(FormatError, match=why) as caught:
        decode_leaf(codec, bytes.fromhex(data), np.dtype(dtype), (count,), "tensor 'w', codes")
    assert "tensor 'w', codes" in str(caught.value)


# -- attacks ------------------------------------------------------------------------------------------------------

SAMPLES = [
    encoded
    for values in (
        np.random.default_rng(0).normal(size=300).astype(np.float32),
        skewed(2000).astype(np.uint8),
        np.flatnonzero(skewed(3000) > 2).astype(np.uint32),
        np.arange(50, dtype=np.int64) ** 3,
        skewed(60).astype(np.float16),
        np.arange(40) % 3 == 0,
    )
    for encoded in [(*encode_leaf(values), values.dtype, values.shape)]
]


def decode_hostile(codec, data, dtype, shape):
    """FormatError or an array of the right shape; anything else fails the test."""
    tracemalloc.start()
    try:
        found = decode_leaf(codec, data, dtype, shape)
        assert (found.shape, found.dtype) == (shape, dtype)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 23  # tables of the entropy coder, nothing that a stream can make larger


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_streams_are_refused_or_decode_to_the_right_shape(data):
    codec, stream, dtype, shape = data.draw(st.sampled_from(SAMPLES))
    stream = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(stream) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip" if stream:
                stream[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set" if stream:
                stream[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "cut":
                del stream[at:]
            case _:
                stream[at:at] = data.draw(st.binary(min_size=1, max_size=12))
    codec = data.draw(st.sampled_from([codec, codec, codec, *Codec]))
    decode_hostile(codec, bytes(stream), dtype, shape)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(Codec)), st.binary(max_size=40), st.sampled_from(NAMES), st.integers(0, 300))
def test_random_streams_are_refused_or_decode_to_the_right_shape(codec, stream, name, count):
    decode_hostile(codec, stream, DTYPES[name], (count,))
