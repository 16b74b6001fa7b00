"""docs/design/format.md: its example is a file, and the reader written from the text alone reads it."""

import re
from pathlib import Path

import numpy as np

import format_reader
from codeword.artifact import Artifact

TEXT = (Path(__file__).parent.parent / "docs" / "design" / "format.md").read_text(encoding="utf-8")


def example():
    lines = re.findall(r"^    ((?:[0-9a-f]{2} )+) ", TEXT, re.MULTILINE)
    return bytes.fromhex("".join(lines))


def test_the_example_is_a_file_that_both_readers_read(tmp_path):
    path = tmp_path / "example.cw"
    path.write_bytes(example())
    values = np.array([[0.5, -1, 0.5], [0.5, 0.5, -1]], "<f4")
    with Artifact.open(path) as artifact:
        assert artifact.metadata == {"by": "hand"}
        assert artifact.nbytes == 8 + 5 + 4 + 37 + 11 + 4
        np.testing.assert_array_equal(artifact.decode("w"), values)
    assert format_reader.read(example()) == ({"w": ("float32", (2, 3), values.tobytes())}, {"by": "hand"})


def test_the_text_is_short_enough_to_implement():
    assert len(TEXT.splitlines()) <= 200
