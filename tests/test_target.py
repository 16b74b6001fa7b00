"""The dial: every form of a target, the bytes it means, and what cannot be read."""

import pytest

from codeword.errors import TargetError
from codeword.target import Target


@pytest.mark.parametrize(
    ("text", "kind", "value", "nbytes"),
    [
        # of a net of 1,000 values that take 4,000 bytes uncompressed
        ("30x", "ratio", 30, 133),  # 133.3: the file is never above the target
        ("4X", "ratio", 4, 1000),
        (" 2.5 x ", "ratio", 2.5, 1600),
        ("1e1x", "ratio", 10, 400),
        (".5x", "ratio", 0.5, 8000),
        ("120KB", "bytes", 120_000, 120_000),
        ("120 kb", "bytes", 120_000, 120_000),
        ("1.5MB", "bytes", 1_500_000, 1_500_000),
        ("2GB", "bytes", 2_000_000_000, 2_000_000_000),
        ("1KiB", "bytes", 1024, 1024),
        ("1.5MiB", "bytes", 1_572_864, 1_572_864),
        ("1GiB", "bytes", 1 << 30, 1 << 30),
        ("0.0015KB", "bytes", 1.5, 1),
        ("777", "bytes", 777, 777),
        ("777B", "bytes", 777, 777),
        (777, "bytes", 777, 777),
        (1e6, "bytes", 1_000_000, 1_000_000),
        (1500.9, "bytes", 1500.9, 1500),
        ("2.5bpw", "bpw", 2.5, 312),  # 2,500 bits are 312.5 bytes
        ("1 BPW", "bpw", 1, 125),
        ("1e9x", "ratio", 1e9, 1),  # no file has less than a byte
        ("0.001bpw", "bpw", 0.001, 1),
    ],
)
def test_forms(text, kind, value, nbytes):
    target = Target.parse(text)
    assert (target.kind, target.value) == (kind, pytest.approx(value, rel=1e-12))
    assert target.text == str(text)
    found = target.nbytes(4000, 1000)
    assert (found, type(found)) == (nbytes, int)


def test_bits_per_weight_count_values_and_ratios_count_bytes():
    # 100 bytes of labels beside 100 float32 weights: 500 bytes, 200 values.
    assert Target.parse("8bpw").nbytes(500, 200) == 200
    assert Target.parse("5x").nbytes(500, 200) == 100


@pytest.mark.parametrize(
    "text",
    ["", "x", "abc", "-3x", "0x", "0", "0KB", "0.5B", "30xx", "30x 4x", "3,5x", "12TB", "12KBps", "nan", "inf", "infx"],
)
def test_what_cannot_be_read(text):
    refuse(text)


@pytest.mark.parametrize(
    "text",
    ["1e999x", "1e999", "1e400bpw", "1e308GB", "--30x", "3 0x", "٣x", None, True, float("nan"), float("inf"), -5, 0],
)
def test_nor_can_the_strange(text):
    refuse(text)


def refuse(text):
    """A target that cannot be read is named, with the forms there are."""
    with pytest.raises(TargetError) as caught:
        Target.parse(text)
    assert f"target {text!r} cannot be read" in str(caught.value)
    assert all(form in str(caught.value) for form in ("30x", "120KB", "1.5MiB", "2.5bpw"))
    assert caught.value.exit_code == 6
