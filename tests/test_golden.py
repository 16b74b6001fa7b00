"""Files of each version, as written when the version was made. They decode for ever, and are still what is written."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import format_reader
from codeword.artifact import Artifact, code_tensor, tied_tensor
from codeword.coding import Codec
from codeword.expr import DTYPES

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.cw"))


def header_nbytes(data):
    return 17 + struct.unpack_from("<I", data, 9)[0]


def test_the_files_are_there():
    assert {"borrowed", "codecs", "dtypes", "nodes", "pooled"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_decode_for_ever(name):
    expected = np.load(GOLDEN / f"{name}.npz")
    with Artifact.open(GOLDEN / f"{name}.cw") as artifact:
        assert sorted(artifact) == sorted(expected.files)
        for tensor in artifact:
            assert artifact.decode(tensor).tobytes() == expected[tensor].tobytes(), tensor


@pytest.mark.parametrize("name", NAMES)
def test_the_second_reader_decodes_them_too(name):
    expected = np.load(GOLDEN / f"{name}.npz")
    found, _ = format_reader.read((GOLDEN / f"{name}.cw").read_bytes())
    assert {tensor: data for tensor, (_, _, data) in found.items()} == {
        tensor: expected[tensor].tobytes() for tensor in expected.files
    }


def coded(golden):
    index = {tensor: at for at, tensor in enumerate(golden)}
    for tensor, entry in golden.entries.items():
        if entry.tied_to is None:
            yield code_tensor(tensor, entry.dtype, entry.shape, golden[tensor])
        else:
            yield tied_tensor(tensor, entry.dtype, entry.shape, index[entry.tied_to])


def plain(data):
    """The header inflated: another zlib may deflate the same otherwise."""
    return zlib.decompress(data[17 : header_nbytes(data)], -15)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_still_coded_byte_for_byte(name):
    kept = (GOLDEN / f"{name}.cw").read_bytes()
    with Artifact.open(GOLDEN / f"{name}.cw") as golden:
        tensors = list(coded(golden))
        lent = [leaf for entry in golden.entries.values() for leaf in entry.leaves if leaf.lender is not None]
        pooled = [leaf.pooled is not None for entry in golden.entries.values() for leaf in entry.leaves]
        if any(pooled):  # which leaves share a pool is no matter of the format
            stored = [leaf.stream for tensor in tensors for leaf in tensor.leaves]
            assert all(stream in kept for stream, away in zip(stored, pooled, strict=True) if not away)
        elif lent:  # written before small leaves went into pools, after equal ones were stored once
            assert all(leaf.stream in kept for tensor in tensors for leaf in tensor.leaves)
        else:
            assert kept[header_nbytes(kept) :] == b"".join(tensor.payload for tensor in tensors)
            assert b"".join(tensor.tree for tensor in tensors) in plain(kept)


def test_the_pools_of_the_golden_file():
    with Artifact.open(GOLDEN / "pooled.cw") as artifact:
        names = ["apart" if pool.codec is None else pool.codec.name.lower() for pool in artifact.pools]
        assert [(pool.dtype, len(pool.sizes), name) for pool, name in zip(artifact.pools, names, strict=True)] == [
            ("int8", 6, "raw"),
            ("float16", 7, "spaced"),
            ("float32", 6, "planes"),
            ("float32", 6, "packed"),
            ("int64", 6, "packed"),
            ("uint16", 6, "spaced"),
            ("float32", 2, "apart"),
        ]
        # Of the last tensor codes and codebook, which is pooled, are borrowed; so short a scale is stored again.
        assert [leaf.lender for leaf in artifact.entries["all borrowed"].leaves] == [(0, 0), (0, 1), None]
        # A share of the pool by values; no checksum for a tensor that has nothing else.
        assert [artifact.entries[f"{at}.bias"].nbytes for at in range(6)] == [30, 31, 31, 30, 31, 31]


def test_the_borrowed_leaves_of_the_golden_file():
    with Artifact.open(GOLDEN / "borrowed.cw") as artifact:
        found = {name: [leaf.lender for leaf in entry.leaves] for name, entry in artifact.entries.items()}
        assert found == {
            "lender": [None, None, None],
            "codebook": [None, (0, 1), (0, 2)],
            "all": [(0, 0), (0, 1), (0, 2)],
            "two lenders": [(1, 0), (0, 1), (0, 2), None, None],
            "third": [(3, 3), (3, 4)],
            "tied to one that borrows": [],
        }
        assert [entry.nbytes for entry in artifact.entries.values()][2] == 4


def test_every_node_codec_and_dtype_has_a_golden_tensor():
    codecs, dtypes, nodes = set(), set(), set()
    for name in NAMES:
        with Artifact.open(GOLDEN / f"{name}.cw") as artifact:
            for entry in artifact.entries.values():
                codecs |= {leaf.codec for leaf in entry.leaves}
                dtypes.add(entry.dtype)
                todo = [entry.skeleton] if entry.skeleton is not None else []
                while todo:
                    node = todo.pop()
                    nodes.add(type(node).__name__)
                    todo += [*getattr(node, "terms", ())] + ([node.inner] if hasattr(node, "inner") else [])
            codecs |= {pool.codec for pool in artifact.pools}
    assert codecs == {*Codec, None}
    assert dtypes == set(DTYPES)
    assert nodes == {"Raw", "Lookup", "Affine", "Sum", "Scatter", "Permute", "Reshape"}


def test_the_codecs_of_the_golden_file_are_those_of_their_names():
    with Artifact.open(GOLDEN / "codecs.cw") as artifact:
        found = {name: entry.leaves[0].codec.name.lower() for name, entry in artifact.entries.items()}
    assert found.pop("constant") == "packed"
    assert found == {name: name.split()[0] for name in found}
