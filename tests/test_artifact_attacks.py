"""Files that are damaged or meant to do harm: each is refused with a FormatError, soon and without much memory."""

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

import format_reader
from codeword import methods
from codeword.artifact import Artifact, Writer, code_tensor, tied_tensor
from codeword.artifact.layout import MAGIC, MAX_ELEMENTS, MAX_HEADER, PREFIX_NBYTES
from codeword.coding.varint import put_varint
from codeword.errors import FormatError
from codeword.expr import Raw

RAW = bytes([0, 0 | 0 << 4, 1, 1, 4])  # node Raw: float32, raw, rank 1, 1 element, 4 bytes
START = bytes([0 | 1 << 4, 1])  # float32, rank 1, 1 element
VALUE = struct.pack("<f", 1.5)


def varints(*values):
    return b"".join(map(put_varint, values))


def file_of(plain, *tensors, version=1, deflated=None):
    """A file with right checksums around a header of any content, and the streams of its tensors."""
    if deflated is None:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        deflated = deflate.compress(plain) + deflate.flush()
    fixed = struct.pack("<BI", version, len(deflated))
    payload = b"".join(streams + struct.pack("<I", zlib.crc32(streams)) for streams in tensors)
    return MAGIC + fixed + struct.pack("<I", zlib.crc32(fixed + deflated)) + deflated + payload


def header(*trees, metadata=b"", start=START):
    names = b"".join(b"t%d\0" % at for at in range(len(trees)))
    return varints(len(trees)) + names + b"".join(start + tree for tree in trees) + metadata


def read_all(path, data):
    path.write_bytes(data)
    with Artifact.open(path) as artifact:
        return {name: artifact.decode(name) for name in artifact}


def refused(path, data, says=""):
    """Both readers refuse; ours within 64 MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=says):
            read_all(path, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 26
    with pytest.raises(format_reader.RefusedError):
        format_reader.read(data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.cw"


@pytest.fixture(scope="module")
def net():
    """The bytes of a small net as methods write it: several nodes and codecs, a tied tensor, metadata."""
    writer, generator = Writer(), np.random.default_rng(0)
    shapes = {"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "fc.weight": (30, 72), "fc.bias": (30,)}
    built = (methods.KMeans(8, granularity="row"), methods.Keep(7), methods.RateAware(0.02), methods.Keep())
    for (name, dims), method in zip(shapes.items(), built, strict=True):
        weight = generator.laplace(size=dims).astype(np.float32)
        writer.add(code_tensor(name, "float32", dims, method.compress(weight, None, generator=generator)))
    writer.add(code_tensor("steps", "int64", (), Raw(np.array(12345))))
    writer.add(tied_tensor("head.weight", "float32", (72, 30), 2))
    return bytes(saved(writer.finish({"net": "small"})))


def saved(artifact):
    artifact._file.seek(0)
    return artifact._header + artifact._file.read()


# -- damage -------------------------------------------------------------------------------------------------------


def test_the_builders_build_files_that_read(path, net):
    assert read_all(path, file_of(header(RAW), VALUE))["t0"].tolist() == [1.5]
    assert len(read_all(path, net)) == 6
    assert len(format_reader.read(net)[0]) == 6


def header_end(data):
    return PREFIX_NBYTES + struct.unpack_from("<I", data, 9)[0]


def test_a_flipped_bit_anywhere_in_the_header_is_found(path, net):
    generator = np.random.default_rng(1)
    for at in range(header_end(net)):
        for flip in (1 << int(generator.integers(8)), 0xFF):
            damaged = bytearray(net)
            damaged[at] ^= flip
            with pytest.raises(FormatError):
                read_all(path, damaged)


def test_a_flipped_byte_anywhere_in_the_payload_is_found(path, net):
    start = header_end(net)
    assert len(net) - start > 1000
    for at in np.random.default_rng(2).choice(np.arange(start, len(net)), 500, replace=False):
        damaged = bytearray(net)
        damaged[at] ^= 1 + at % 255
        with pytest.raises(FormatError, match="checksum"):
            read_all(path, damaged)


def test_every_truncation_is_found_on_opening(path, net):
    for length in [*range(header_end(net) + 50), *range(header_end(net), len(net), 13), len(net) - 1]:
        path.write_bytes(net[:length])
        with pytest.raises(FormatError):
            Artifact.open(path)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 100, b"x"])
def test_bytes_behind_the_end_are_found(path, net, tail):
    refused(path, net + tail, "too long")


def test_a_file_that_shrinks_after_opening_is_found(path):
    dims = (50_000,)
    tree = bytes([0]) + leaf(dims=dims, nbytes=200_000)
    data = file_of(header(tree, start=bytes([1 << 4]) + varints(*dims)), bytes(200_000))
    path.write_bytes(data)
    with Artifact.open(path) as artifact:
        path.write_bytes(data[:100_000])
        with pytest.raises(FormatError, match="truncated"):
            artifact["t0"]


def test_files_that_are_no_cw_files(path, tmp_path):
    refused(path, b"", "empty")
    refused(path, b"PK\x03\x04" * 30, "not a .cw file")
    refused(path, MAGIC.replace(b"\r\n", b"\n") + bytes(30), "not a .cw file")
    refused(path, MAGIC, "truncated")
    with pytest.raises(FormatError, match=r"nowhere\.cw: cannot be read"):
        Artifact.open(tmp_path / "nowhere.cw")
    with pytest.raises(FormatError, match="cannot be read"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("version", [0, 4, 255])
def test_other_versions_are_refused_by_number(path, version):
    refused(path, file_of(header(RAW), VALUE, version=version), f"format version {version}")


# -- hostile headers with a valid checksum ------------------------------------------------------------------------

LOOKUP = bytes([1])


def leaf(dtype=0, codec=0, dims=(1,), nbytes=4):
    return bytes([dtype | codec << 4]) + varints(len(dims), *dims, nbytes)


CODES = leaf(4, 0, (1, 1, 1), 1)
BOOK = leaf(0, 0, (1, 1, 1), 4)
CONSTANT = put_varint(0) + b"\0"  # a packed stream of any number of equal elements

HOSTILE = {
    "node": (bytes([8]) + RAW[1:], "node 8"),
    "node 255": (bytes([255]) + RAW[1:], "node 255"),
    "dtype of a leaf": (bytes([0]) + leaf(15), "dtype 15"),
    "codec": (bytes([0]) + leaf(0, 5), "codec 5"),
    "affine flags": (bytes([2, 4]) + RAW, "flags 4"),
    "affine shape": (bytes([2, 1]) + RAW + leaf(dims=(2,)), "broadcast"),
    "affine rank": (bytes([2, 1]) + RAW + leaf(dims=(1, 1)), "broadcast"),
    "sum of nothing": (bytes([3, 0]), "one shape"),
    "sum of 17": (bytes([3, 17]) + RAW * 17, "17 terms"),
    "sum of shapes": (bytes([3, 2]) + RAW + bytes([0]) + leaf(dims=(2,)), "one shape"),
    "signed codes": (LOOKUP + leaf(8, 0, (1, 1, 1), 1) + BOOK, "unsigned"),
    "codes of rank 2": (LOOKUP + leaf(4, 0, (1, 1), 1) + BOOK, "codes must be"),
    "groups": (LOOKUP + CODES + leaf(0, 0, (2, 1, 1), 8), "1 groups of codes"),
    "signed positions": (bytes([4, 1]) + leaf(10) + RAW, "unsigned"),
    "more positions than values": (bytes([4, 9]) + leaf(4, dims=(2,)) + RAW, "positions"),
    "scatter size": (bytes([4]) + put_varint(MAX_ELEMENTS + 1) + leaf(4) + RAW, "scatter over"),
    "order": (bytes([5, 1, 1]) + RAW, "permutation"),
    "order of rank 16": (bytes([5, 16]) + bytes(range(16)) + RAW, "16 dimensions"),
    "huge order": (bytes([5]) + varints(1, 2**64 - 1) + RAW, "permutation"),
    "reshape": (bytes([6]) + varints(1, 2) + RAW, "does not fit"),
    "reshape of rank 16": (bytes([6]) + varints(16, *[1] * 16) + RAW, "16 dimensions"),
    "leaf of rank 2**40": (bytes([0, 0]) + varints(2**40), "dimensions"),
    "huge leaf": (bytes([0]) + leaf(0, 1, (2**41,), 2), "more than"),
    "huge empty leaf": (bytes([0]) + leaf(0, 0, (0, 2**63), 0), "more than"),
    "huge product": (bytes([0]) + leaf(0, 1, (2**20, 2**20, 2), 2), "more than"),
    "huge lookup": (LOOKUP + leaf(4, 0, (1, 0, 2**40), 0) + leaf(0, 0, (1, 0, 2**40), 0), "more than"),
    "other size": (bytes([0]) + leaf(dims=(2,), nbytes=8), r"shape \(2,\) for a tensor of shape \(1,\)"),
    "other dtype": (bytes([0]) + leaf(11, nbytes=8), "int64 for a tensor of float32"),
    "depth": (bytes([6, 1, 1]) * 9 + RAW, "deeper"),
    "depth bomb": (bytes([6, 1, 1]) * 500_000 + RAW, "deeper"),
    "leaves": (bytes([3, 2]) + (bytes([3, 16]) + (bytes([3, 16]) + RAW * 16) * 16) * 2, "256 leaves"),
    "tied to itself": (bytes([7, 0]), "tied to tensor 0"),
    "tied to a later one": (bytes([7, 1]), "tied to tensor 1"),
    "tied to 2**63": (bytes([7]) + put_varint(2**63), "tied to tensor"),
    "long stream": (bytes([0]) + leaf(nbytes=2**62), "truncated"),
    "varint of 11 bytes": (bytes([0, 0, 1]) + b"\xff" * 10 + b"\1", "no valid number"),
    "varint not shortest": (bytes([0, 0, 1]) + b"\x81\x00" + b"\4", "no valid number"),
    "nothing": (b"", "needs 1 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_trees_are_refused(path, case, version):
    tree, says = HOSTILE[case]
    if case == "codec" and version == 2:
        tree, says = bytes([0]) + leaf(0, 6), "codec 6"
    refused(path, file_of(header(tree), VALUE, version=version), says)


def borrowed(tensor, at, dims=(1,), dtype=0):
    """A Raw whose leaf is leaf `at` of another tensor."""
    return bytes([0, dtype | 5 << 4]) + varints(len(dims), *dims, tensor, at)


HALF = bytes([2, 0, 0]) + leaf(1, nbytes=2)  # a float16 leaf in a tensor of float32

BORROWED = {
    "itself": ([borrowed(0, 0)], "leaf 0 of tensor 0, which does not come before it"),
    "a leaf before its own": ([bytes([3, 2]) + RAW + borrowed(0, 0)], "tensor 0, which does not come before it"),
    "a later tensor": ([borrowed(1, 0), RAW], "tensor 1, which does not come before it"),
    "from one that borrowed": ([RAW, borrowed(0, 0), borrowed(1, 0)], "'t1' has borrowed it itself"),
    "from a tied tensor": ([RAW, bytes([7, 0]), borrowed(1, 0)], "tensor 1, which does not come before it or is tied"),
    "another dtype": ([HALF, borrowed(0, 0)], r"as float32 \(1,\); in 't0' it is float16"),
    "other dims": ([RAW, bytes([6, 1, 1]) + borrowed(0, 0, (1, 1))], r"as float32 \(1, 1\); in 't0' it is .*\(1,\)"),
    "no such leaf": ([RAW, borrowed(0, 1)], "leaf 1 of tensor 0, but 't0' has 1 leaves"),
    "leaf 2**64 - 1": ([RAW, borrowed(0, 2**64 - 1)], "has 1 leaves"),
    "tensor 2**64 - 1": ([RAW, borrowed(2**64 - 1, 0)], "does not come before it"),
    "varint of 11 bytes": ([RAW, borrowed(0, 0)[:-2] + b"\xff" * 10 + b"\1\0"], "no valid number"),
    "half an entry": ([RAW, borrowed(0, 0)[:-1]], "needs 1 bytes"),
    "in codes": ([RAW, LOOKUP + borrowed(0, 0)[1:] + BOOK], "codes must be"),
    "257": ([RAW, bytes([3, 2]) + (bytes([3, 16]) + (bytes([3, 16]) + borrowed(0, 0) * 16) * 16) * 2], "256 leaves"),
}  # fmt: skip


@pytest.mark.parametrize("case", BORROWED)
def test_hostile_borrowing_is_refused(path, case):
    trees, says = BORROWED[case]
    refused(path, file_of(header(*trees), *[VALUE] * len(trees), version=2), says)


def test_borrowing_itself_is_allowed_in_version_2_only(path):
    plain = header(RAW, borrowed(0, 0), bytes([7, 1]))
    assert [values.tolist() for values in read_all(path, file_of(plain, VALUE, b"", version=2)).values()] == [[1.5]] * 3
    assert len(format_reader.read(file_of(plain, VALUE, b"", version=2))[0]) == 3
    refused(path, file_of(plain, VALUE, b"", version=1), "codec 5 is unknown to version 1")
    assert read_all(path, file_of(header(RAW), VALUE, version=2))["t0"].tolist() == [1.5]


def test_a_tensor_that_stores_nothing_still_has_a_checksum(path):
    plain = header(RAW, borrowed(0, 0))
    good = file_of(plain, VALUE, b"", version=2)
    refused(path, good[:-4] + b"\1\0\0\0", "'t1': the checksum")
    refused(path, good[:-4], "truncated")


def test_a_lender_is_checked_by_whoever_borrows(path):
    data = file_of(header(RAW, borrowed(0, 0)), VALUE, b"", version=2)
    damaged = data[:-12] + b"\0\0\0\0" + data[-8:]
    path.write_bytes(damaged)
    with Artifact.open(path) as artifact:
        for _ in range(2):
            with pytest.raises(FormatError, match="tensor 't0': the checksum"):
                artifact["t1"]
    refused(path, damaged, "'t0': the checksum")


def test_borrowed_leaves_count_towards_the_cap_of_each_tensor(path):
    dims = (1000,)
    start = bytes([1 << 4]) + varints(*dims)
    one, many = bytes([0]) + leaf(0, 1, dims, 2), bytes([3, 16]) + borrowed(0, 0, dims) * 16
    path.write_bytes(file_of(header(one, many, start=start), CONSTANT, b"", version=2))
    with Artifact.open(path, max_tensor_nbytes=63_999) as artifact, pytest.raises(FormatError, match="64000 bytes"):
        artifact["t1"]
    with Artifact.open(path, max_tensor_nbytes=64_000) as artifact:
        assert artifact.decode("t1").tolist() == [0.0] * 1000


# -- pools --------------------------------------------------------------------------------------------------------


def pooled(pool, dims=(1,), dtype=0):
    """A Raw whose leaf is the next in a pool."""
    return bytes([0, dtype | 6 << 4]) + varints(len(dims), *dims, pool)


def pools(*each):
    """What stands behind the trees: (codec, bytes) of each pool."""
    return varints(len(each)) + b"".join(bytes([codec]) + varints(nbytes) for codec, nbytes in each)


def pooled_file(trees, entries, *streams, start=START):
    return file_of(header(*trees, metadata=pools(*entries), start=start), b"".join(streams), version=3)


BITS = bytes([0x80, 0x80, 0x80, 0xFC, 7, 0])  # packed: the key of 1.5, width 0
LONG = bytes([1 << 4]) + varints(4097)  # start of a tensor
MANY = bytes([1 << 4]) + varints(4096)

POOLED = {
    "pool 1 before 0": ([pooled(1)], [(0, 4)], [VALUE], "pool 1 comes before pool 0"),
    "pool 2**64 - 1": ([pooled(2**64 - 1)], [(0, 4)], [VALUE], "comes before pool 0"),
    "two dtypes": ([pooled(0), bytes([2, 0]) + pooled(0, dtype=1)], [(0, 6)], [VALUE, b"ab"], "float32, not float16"),
    "no pools": ([pooled(0)], [], [VALUE], "0 of them, but tensors have leaves in 1"),
    "one too many": ([pooled(0)], [(0, 4), (0, 0)], [VALUE], "2 of them"),
    "2**64 - 1 of them": ([pooled(0)], None, [VALUE], "18446744073709551615 of them"),
    "codec 5": ([pooled(0)], [(5, 4)], [VALUE], "codec 5"),
    "codec 6": ([pooled(0)], [(6, 4)], [VALUE], "codec 6"),
    "codec 255": ([pooled(0)], [(255, 4)], [VALUE], "codec 255"),
    "a stream too short": ([pooled(0)] * 2, [(0, 4)], [VALUE], "2 values of float32 need 8 bytes"),
    "a stream too long": ([pooled(0)], [(0, 8)], [VALUE, VALUE], "1 values of float32 need 4 bytes"),
    "a long stream": ([pooled(0)], [(0, 2**62)], [VALUE], "truncated"),
    "apart, too short": ([pooled(0)] * 2, [(7, 6)], [bytes([0, 4]), VALUE], "needs 1 bytes"),
    "apart, too long": ([pooled(0)], [(7, 7)], [bytes([0, 4]), VALUE, b"x"], "1 bytes too many"),
    "apart in apart": ([pooled(0)], [(7, 6)], [bytes([7, 4]), VALUE], "codec 7 is unknown"),
    "spaced apart": ([pooled(0)], [(7, 6)], [bytes([8, 4, 0, 4, 1, 0])], "codec spaced does not fit"),
    "spaced by nothing": ([pooled(0)], [(8, 5)], [bytes([0, 0, 1, 0, 0])], "spaced by 0 bits"),
    "spaced by all": ([pooled(0)], [(8, 5)], [bytes([0, 32, 1, 0, 0])], "spaced by 32 bits"),
    "spaced, raw": ([pooled(0)], [(8, 7)], [bytes([0, 4, 0]), VALUE], "over codec raw"),
    "spaced twice": ([pooled(0)], [(8, 8)], [bytes([0, 4, 8, 0, 4, 1, 0, 0])], "over codec spaced"),
    "spaced beyond": ([pooled(0)], [(8, 6)], [bytes([0, 31, 1, 0, 2, 2])], "pass 32 bits"),
    "spaced from beyond": ([pooled(0)], [(8, 9)], [b"\xff\xff\xff\xff\x1f" + bytes([1, 1, 0, 0])], "pass 32 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", POOLED)
def test_hostile_pools_are_refused(path, case):
    trees, entries, streams, says = POOLED[case]
    if entries is None:
        plain = header(*trees, metadata=varints(2**64 - 1) + bytes([0, 4]))
        refused(path, file_of(plain, b"".join(streams), version=3), says)
        return
    refused(path, pooled_file(trees, entries, *streams), says)


def test_pools_themselves_are_allowed_in_version_3_only(path):
    trees = [pooled(0), pooled(1), pooled(0), borrowed(2, 0), bytes([7, 2])]
    data = pooled_file(trees, [(0, 8), (1, len(BITS))], VALUE, struct.pack("<f", -2.0), BITS)
    # Of tensors the one that borrows has a checksum, that of no bytes, before the pools.
    at = header_end(data)
    data = data[:at] + b"\0\0\0\0" + data[at:]
    assert [values.tolist() for values in read_all(path, data).values()] == [[1.5], [1.5], [-2.0], [-2.0], [-2.0]]
    assert len(format_reader.read(data)[0]) == 5
    for version in (1, 2):
        refused(path, file_of(header(pooled(0)), VALUE, version=version), f"codec 6 is unknown to version {version}")
    refused(path, file_of(header(bytes([0]) + leaf(0, 8, nbytes=4), metadata=b"\0"), VALUE, version=3), "codec 8")
    assert read_all(path, file_of(header(RAW, metadata=b"\0"), VALUE, version=3))["t0"].tolist() == [1.5]


def test_the_caps_of_pools(path):
    constant = bytes([0, 0])  # packed: base 0, width 0
    refused(path, pooled_file([pooled(0, (4097,))], [(1, 2)], constant, start=LONG), "4097 values after 0; a leaf may")
    full = [pooled(0, (4096,))] * 256
    good = pooled_file(full, [(1, 2)], constant, start=MANY)
    path.write_bytes(good)
    with Artifact.open(path) as artifact:
        assert artifact.decode("t255").tolist() == [0.0] * 4096
    refused(path, pooled_file([*full, pooled(0, (4096,))], [(1, 2)], constant, start=MANY), "after 1048576")
    many = [pooled(at) for at in range(257)]
    refused(path, pooled_file(many, [(0, 4)] * 257, *[VALUE] * 257), "beyond the 256 allowed")
    assert len(read_all(path, pooled_file(many[:256], [(0, 4)] * 256, *[VALUE] * 256))) == 256


def test_the_caps_themselves_are_allowed(path):
    nested = bytes([6, 1, 1]) * 8 + RAW  # 9 nodes deep
    many = (bytes([3, 16]) + RAW * 16) * 16
    data = file_of(header(nested, bytes([3, 16]) + many), VALUE, VALUE * 256)
    assert [values.tolist() for values in read_all(path, data).values()] == [[1.5], [1.5 * 256]]
    assert len(format_reader.read(data)[0]) == 2


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        (b"", "needs 1 bytes"),
        (varints(2**60), "tensors in a header"),
        (varints(3) + b"a\0b\0", "no valid tensor name|tensors in a header"),
        (varints(1) + b"\0" + START + RAW, "no valid tensor name"),
        (varints(1) + b"x" * 1025 + b"\0" + START + RAW, "no valid tensor name"),
        (varints(1) + b"\xff\xfe\0" + START + RAW, "not UTF-8"),
        (varints(2) + b"a\0a\0" + (START + RAW) * 2, "twice"),
        (header(RAW, start=bytes([15, 1])), "dtype 15"),
        (header(RAW, start=bytes([0 | 1 << 4]) + varints(2**63)), "more than"),
        (header(RAW, bytes([7, 0]), bytes([7, 1])), "tied to tensor 1"),
        (header(RAW) + b"not json", "not JSON"),
        (header(RAW, metadata=b"[1]"), "must map names to strings"),
        (header(RAW, metadata=b'{"a":1}'), "must map names to strings"),
        (header(RAW, metadata='{"a":"b"}'.encode("utf-16")), "not JSON"),
        (header(RAW, metadata=b'{"a":"\xff"}'), "not JSON"),
        (header(RAW, metadata=b"[" * 60000), "not JSON"),
        (header(RAW, metadata=json.dumps({"a": "x" * 65536}).encode()), "at most 65536"),
    ],
)
def test_hostile_headers_are_refused(path, plain, says):
    refused(path, file_of(plain, VALUE), says)


def test_a_tied_tensor_has_the_shape_and_dtype_of_the_other(path):
    for start, says in ((bytes([0 | 1 << 4, 2]), "shape"), (bytes([10 | 1 << 4, 1]), "int32 tied")):
        refused(path, file_of(varints(2) + b"a\0b\0" + START + RAW + start + bytes([7, 0]), VALUE), says)


def test_deflate_bombs_and_junk_are_refused(path):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join([deflate.compress(bytes(1 << 20)) for _ in range(64)]) + deflate.flush()  # 64 MiB in 64 KiB
    refused(path, file_of(b"", deflated=bomb), "does not end where it must")
    good = zlib.compress(header(RAW), 9, -15)
    refused(path, file_of(b"", VALUE, deflated=good + b"\0"), "does not end where it must")
    refused(path, file_of(b"", VALUE, deflated=good[:-1]), "does not end where it must")
    refused(path, file_of(b"", VALUE, deflated=b"\xff" * 20), "does not inflate")
    refused(path, file_of(b"", VALUE, deflated=zlib.compress(header(RAW))), "inflate")  # with a zlib wrapper
    refused(path, MAGIC + struct.pack("<BI", 1, MAX_HEADER + 1) + bytes(100), "at most")


def test_the_largest_header_is_read_to_its_end(path):
    count = MAX_HEADER // 16
    plain = varints(count) + b"".join(b"%x\0" % at for at in range(count)) + (bytes([1 << 4, 0, 0, 0, 1, 0, 0])) * count
    assert MAX_HEADER * 0.7 < len(plain) <= MAX_HEADER
    with pytest.raises(FormatError, match="truncated"):
        read_all(path, file_of(plain))


# -- hostile streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "streams", "says"),
    [
        (LOOKUP + CODES + BOOK, b"\1" + VALUE, "code 1 in a codebook of 1"),
        (bytes([4, 1]) + leaf(4, nbytes=1) + RAW, b"\1" + VALUE, "positions must rise"),
        (bytes([0]) + leaf(nbytes=3), VALUE[:3], "need 4 bytes"),
        (bytes([0]) + leaf(0, 1, nbytes=3), CONSTANT + b"\0", "values: 1 bytes too many"),
        (bytes([0]) + leaf(0, 2, nbytes=1), b"\0", "values: needs"),
    ],
)
def test_hostile_streams_are_refused(path, tree, streams, says):
    refused(path, file_of(header(tree), streams), says)


def test_a_tensor_may_not_take_more_than_the_cap(path):
    elements = 1 << 39
    start = bytes([0 | 1 << 4]) + put_varint(elements)
    one = bytes([0]) + leaf(0, 1, (elements,), 2)
    data = file_of(header(one, start=start), CONSTANT)
    path.write_bytes(data)
    with Artifact.open(path) as artifact:  # to open it costs nothing
        assert artifact.entries["t0"].size == elements
        with pytest.raises(FormatError, match="max_tensor_nbytes"):
            artifact["t0"]


def test_the_cap_counts_all_leaves_together_and_can_be_raised(path):
    dims = (1000,)
    tree = bytes([3, 16]) + (bytes([0]) + leaf(0, 1, dims, 2)) * 16
    path.write_bytes(file_of(header(tree, start=bytes([1 << 4]) + varints(*dims)), CONSTANT * 16))
    with Artifact.open(path, max_tensor_nbytes=63_999) as artifact, pytest.raises(FormatError, match="64000 bytes"):
        artifact["t0"]
    with Artifact.open(path, max_tensor_nbytes=64_000) as artifact:
        assert artifact.decode("t0").tolist() == [0.0] * 1000
