"""Bit packing: by hand, at every width, across the steps it works in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeword.kernels import bits
from codeword.kernels.bits import pack_bits, packed_nbytes, unpack_bits


def test_bits_run_from_the_lowest():
    assert pack_bits(np.array([1, 0, 1, 1, 1, 0], np.uint8), 1) == bytes([0b011101])
    assert pack_bits(np.array([5, 2, 7], np.uint8), 3) == bytes([0b11_010_101, 0b1])
    assert pack_bits(np.array([0x3FF, 0], np.uint16), 10) == bytes([0xFF, 0x03, 0])


def test_width_zero_takes_no_bytes():
    assert pack_bits(np.zeros(9, np.uint16), 0) == b""
    np.testing.assert_array_equal(unpack_bits(b"", 0, 9, np.dtype(np.uint16)), np.zeros(9))


@given(st.data(), st.sampled_from([8, 16, 32, 64]))
def test_round_trip_at_every_width(data, size):
    width = data.draw(st.integers(0, size))
    values = np.array(data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=40)), f"u{size // 8}")
    packed = pack_bits(values, width)
    assert len(packed) == packed_nbytes(len(values), width) == -(-len(values) * width // 8)
    whole = sum(int(value) << i * width for i, value in enumerate(values))
    assert int.from_bytes(packed, "little") == whole
    found = unpack_bits(packed, width, len(values), values.dtype)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("width", [1, 3, 11])
def test_steps_join_without_a_seam(width, monkeypatch):
    values = np.random.default_rng(0).integers(0, 1 << width, 1000).astype(np.uint16)
    whole = pack_bits(values, width)
    monkeypatch.setattr(bits, "_STEP", 8)
    assert pack_bits(values, width) == whole
    np.testing.assert_array_equal(unpack_bits(whole, width, len(values), values.dtype), values)
