"""The .cw file: what is written comes back, lazily, the same bytes every time, and as small as promised."""

import json
import zlib

import numpy as np
import pytest

import format_reader
from codeword import methods
from codeword.artifact import Artifact, Writer, code_tensor, tied_tensor
from codeword.artifact.pools import decode_pool
from codeword.errors import ExprError, FormatError
from codeword.expr import (
    DTYPES,
    FLOATS,
    Affine,
    Expr,
    Lookup,
    Permute,
    Raw,
    Reshape,
    Scatter,
    Sum,
    decode,
    leaves,
    result_dtype,
    shape,
)

GENERATOR = np.random.default_rng(7)


def lookup(g=1, r=4, c=6, k=5, d=1):
    codes = np.minimum(GENERATOR.geometric(0.5, (g, r, c)) - 1, k - 1).astype(np.uint8)
    return Lookup(codes, GENERATOR.normal(size=(g, k, d)).astype(np.float32))


def scatter(size, kept):
    positions = np.sort(GENERATOR.choice(size, kept, replace=False)).astype(np.uint32)
    return Scatter(size, positions, Raw(GENERATOR.normal(size=kept).astype(np.float32)))


# A tensor of each node and of the nestings that the methods of design.md build.
TENSORS: dict[str, tuple[str, tuple[int, ...], Expr]] = {
    "raw": ("float32", (3, 5), Raw(GENERATOR.normal(size=(3, 5)).astype(np.float32))),
    "sharing": ("float32", (4, 3, 2, 1), Reshape(lookup(), (4, 3, 2, 1))),
    "groups": ("float32", (8, 12), Reshape(lookup(g=2, d=2), (8, 12))),
    "rows": ("float32", (4, 6), Reshape(Affine(lookup(), np.full((4, 1, 1), 0.3, np.float16)), (4, 6))),
    "templates": ("float32", (4, 6, 3, 3), Affine(lookup(d=9), np.ones((4, 6, 1)), np.full((4, 6, 1), 2, np.int8))),
    "converted": ("float32", (2,), Affine(Raw(np.array([1, 2], np.int64)))),
    "pruned": ("float32", (50, 60), Reshape(scatter(3000, 200), (50, 60))),
    "outliers": ("float32", (4, 6), Sum((Reshape(lookup(), (24,)), scatter(24, 2), scatter(24, 1)))),
    "permuted": ("float32", (3, 4, 2), Permute(Raw(np.arange(24).reshape(2, 3, 4).astype(np.float32)), (1, 2, 0))),
    "deep": ("float32", (6,), Reshape(Reshape(Reshape(Raw(np.arange(6, dtype=np.uint8)), (2, 3)), (6,)), (3, 2))),
    "scalar": ("int64", (), Raw(np.array(-5))),
    "empty": ("float32", (3, 0, 2), Raw(np.zeros((3, 0, 2), np.float32))),
    "half": ("float16", (4, 6), Affine(lookup(), np.full((1, 1, 1), 1e5, np.float32))),
    **{name: (name, (40,), Raw(np.arange(40).astype(dtype))) for name, dtype in DTYPES.items()},
}  # fmt: skip
METADATA = {"plan": "λ = 0.4", "": '\0"\\'}


def write(tensors=TENSORS, metadata=None, tied=()):
    writer = Writer()
    index = {name: writer.add(code_tensor(name, *spec)) for name, spec in tensors.items()}
    for name, target, dims in tied:
        writer.add(tied_tensor(name, tensors[target][0], dims, index[target]))
    return writer.finish(metadata)


def file_bytes(artifact, path):
    artifact.save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.cw"


def dense(dtype, dims, expr):
    with np.errstate(over="ignore"):
        return decode(expr).reshape(dims).astype(DTYPES[dtype])


def same(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


# -- round trips --------------------------------------------------------------------------------------------------


def test_everything_comes_back(path):
    tied = [("twin", "raw", (3, 5)), ("flat", "raw", (15,)), ("again", "bfloat16", (8, 5))]
    write(metadata=METADATA, tied=tied).save(path)
    with Artifact.open(path) as artifact:
        assert list(artifact) == [*TENSORS, "twin", "flat", "again"]
        assert len(artifact) == len(TENSORS) + 3
        assert artifact.metadata == METADATA
        for name, spec in TENSORS.items():
            same(artifact.decode(name), dense(*spec))
            entry = artifact.entries[name]
            assert (entry.dtype, entry.shape, entry.tied_to) == (*spec[:2], None)
            assert shape(artifact[name]) == spec[1]
            assert result_dtype(artifact[name]) == result_dtype(spec[2])
            stored, given = list(leaves(artifact[name])), list(leaves(spec[2]))
            for (_, found), (_, array) in zip(stored, given, strict=True):
                same(found, array)
        for name, target, dims in tied:
            same(artifact.decode(name), artifact.decode(target).reshape(dims))
            assert artifact.entries[name].tied_to == target
            assert artifact.entries[name].nbytes == artifact.entries[name].dense_nbytes == 0


def test_an_artifact_reads_the_same_before_and_after_it_is_saved(path):
    written = write(metadata=METADATA)
    data = file_bytes(written, path)
    with Artifact.open(path) as opened:
        assert opened.entries.keys() == written.entries.keys()
        assert opened.nbytes == written.nbytes == len(data)
        for name in TENSORS:
            same(written.decode(name), opened.decode(name))


def test_bytes_are_a_function_of_the_input(tmp_path):
    first, second = (file_bytes(write(metadata=dict(order)), tmp_path / f"{at}.cw")
                     for at, order in enumerate([METADATA.items(), reversed(METADATA.items())]))  # fmt: skip
    assert first == second
    with Artifact.open(tmp_path / "0.cw") as artifact:
        assert file_bytes(artifact, tmp_path / "2.cw") == first


def test_a_file_of_no_tensors(path):
    data = file_bytes(write({}), path)
    with Artifact.open(path) as artifact:
        assert dict(artifact) == {}
        assert artifact.metadata == {}
        assert artifact.bits_per_weight == 8 * len(data)
    assert format_reader.read(data) == ({}, {})


def test_the_second_reader_agrees_bit_for_bit(path):
    tied = [("flat", "raw", (15,)), ("again", "half", (24,))]
    artifact = write(metadata=METADATA, tied=tied)
    found, metadata = format_reader.read(file_bytes(artifact, path))
    assert metadata == METADATA
    assert list(found) == list(artifact)
    for name, (dtype, dims, data) in found.items():
        values = artifact.decode(name)
        assert (dtype, dims) == (artifact.entries[name].dtype, values.shape)
        assert data == values.tobytes(), name


@pytest.mark.parametrize("target", sorted(FLOATS))
@pytest.mark.parametrize("source", sorted(DTYPES))
def test_the_second_reader_agrees_on_every_conversion(source, target, path):
    dtype, generator = DTYPES[source], np.random.default_rng(1)
    bits = generator.integers(0, 2 if source == "bool" else 256, 600 * dtype.itemsize).astype(np.uint8)
    with np.errstate(all="ignore"):
        near = (generator.normal(size=200) * np.logspace(-9, 6, 200)).astype(np.float32).astype(dtype)
        values = np.concatenate([bits.view(dtype), near])
        expr = Affine(Raw(np.where(np.isfinite(values), values, dtype.type(1))), np.ones(1, np.float32))
        data = file_bytes(write({"w": (target, (800,), expr)}), path)
        with Artifact.open(path) as artifact:
            ours = artifact.decode("w")
    theirs = np.frombuffer(format_reader.read(data)[0]["w"][2], DTYPES[target])
    finite = np.isfinite(ours)
    assert ours[finite].tobytes() == theirs[finite].tobytes()
    np.testing.assert_array_equal(ours.astype(np.float64), theirs.astype(np.float64))


# -- laziness -----------------------------------------------------------------------------------------------------


def test_a_corrupted_tensor_leaves_the_others_readable(path):
    artifact = write()
    pooled = {name for name, entry in artifact.entries.items() if any(leaf.pooled for leaf in entry.leaves)}
    assert {"sharing", "raw", "scalar"} <= pooled
    assert not {"empty"} & pooled
    good = file_bytes(artifact, path)
    for at, says, lost in (
        (
            len(artifact._header),
            "'sharing'.*checksum",
            {"sharing"},
        ),  # the first tensor of whose leaves one has a stream
        (len(good) - 1, "pools: the checksum", pooled),
    ):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        with Artifact.open(path) as damaged:
            for name in TENSORS:
                if name not in lost:
                    same(damaged.decode(name), artifact.decode(name))
                    continue
                with pytest.raises(FormatError, match=says):
                    damaged[name]


def test_opening_reads_the_header_only(path, monkeypatch):
    write().save(path)
    monkeypatch.setattr("codeword.artifact.reader.decode_leaf", lambda *_: pytest.fail("a leaf was decoded"))
    with Artifact.open(path) as artifact:
        assert artifact.entries["sharing"].size == 24
        assert artifact.container_nbytes < artifact.nbytes


def test_expressions_outlive_the_file(path):
    write().save(path)
    with Artifact.open(path) as artifact:
        expr = artifact["rows"]
    assert decode(expr).shape == (4, 6)


def test_unknown_names_are_key_errors():
    with pytest.raises(KeyError):
        write()["nothing"]


# -- equal leaves -------------------------------------------------------------------------------------------------


BOOK = GENERATOR.normal(size=(1, 1200, 4)).astype(np.float32)  # 19,200 bytes of raw floats, too many for a pool
SMALL = BOOK[:, :16]


def of_one_book(seed, book=BOOK):
    codes = np.random.default_rng(seed).integers(0, 16, (1, 6, 8)).astype(np.uint8)
    return "float32", (6, 32), Reshape(Lookup(codes, book), (6, 32))


def test_equal_leaves_are_stored_once(path):
    tensors = {f"w{seed}": of_one_book(seed, BOOK.copy()) for seed in range(3)} | {"again": of_one_book(1)}
    data = file_bytes(write(tensors, METADATA), path)
    assert data[8] == 2
    with Artifact.open(path) as artifact:
        entries = artifact.entries
        assert [leaf.lender for leaf in entries["w0"].leaves] == [None, None]
        for name in ("w1", "w2"):
            assert [leaf.lender for leaf in entries[name].leaves] == [None, (0, 1)]
            assert [leaf.nbytes for leaf in entries[name].leaves][1] == 0
        assert [leaf.lender for leaf in entries["again"].leaves] == [(1, 0), (0, 1)]
        assert entries["again"].nbytes == 4
        assert (entries["w1"].leaves[1].codec, entries["w1"].leaves[1].path) == (
            entries["w0"].leaves[1].codec,
            "codebook",
        )
        streams = sum(leaf.nbytes for entry in entries.values() for leaf in entry.leaves)
        assert len(data) == artifact.container_nbytes + streams
        for name, spec in tensors.items():
            same(artifact.decode(name), dense(*spec))
        assert file_bytes(artifact, path.with_suffix(".2")) == data
    found = format_reader.read(data)[0]
    assert {name: values for name, (_, _, values) in found.items()} == {
        name: dense(*spec).tobytes() for name, spec in tensors.items()
    }


@pytest.mark.parametrize("book", [BOOK, SMALL], ids=["stored", "pooled"])
def test_any_tensor_alone_reads_its_lender(path, book):
    tensors = {f"w{seed}": of_one_book(seed, book) for seed in range(3)}
    write(tensors).save(path)
    for name in reversed(tensors):
        with Artifact.open(path) as artifact:
            same(artifact.decode(name), dense(*tensors[name]))


def test_a_lender_is_read_once_and_its_leaf_is_in_all_expressions(path, monkeypatch):
    tensors = {f"w{seed}": of_one_book(seed) for seed in range(3)}
    write(tensors).save(path)
    for room, reads in ((1 << 24, {"w0": 1, "w1": 1, "w2": 1}), (BOOK.nbytes - 1, {"w0": 3, "w1": 1, "w2": 1})):
        monkeypatch.setattr("codeword.artifact.reader._KEPT_NBYTES", room)
        with Artifact.open(path) as artifact:
            read, streams = [], artifact._streams
            monkeypatch.setattr(artifact, "_streams", lambda entry, r=read, s=streams: r.append(entry.name) or s(entry))
            books = [list(leaves(artifact[name]))[1][1] for name in tensors]
            assert {name: read.count(name) for name in tensors} == reads
            assert (books[0] is books[1] is books[2]) == (room > BOOK.nbytes)
            for book in books:
                same(book, BOOK)


@pytest.mark.parametrize(
    "other", [BOOK.astype(np.float16), BOOK.reshape(1, 2400, 2), BOOK + 1], ids=["dtype", "dims", "values"]
)
def test_leaves_that_differ_in_anything_are_stored(other):
    artifact = write({"a": of_one_book(0), "b": ("float32", other.shape, Affine(Raw(other)))})
    assert all(leaf.lender is None for entry in artifact.entries.values() for leaf in entry.leaves)


def test_a_file_that_borrows_nothing_is_of_version_1(path):
    # Short streams are stored again, and so are equal leaves of one tensor.
    ones = {f"norm{at}.weight": ("float32", (6400,), Raw(np.ones(6400, np.float32))) for at in range(9)}
    twice = {"sum": ("float32", (6, 32), Sum((of_one_book(0)[2],) * 2))}
    assert file_bytes(write(ones | twice), path)[8] == 1
    assert file_bytes(write(ones | twice | {"bias": ("float32", (4,), Raw(np.zeros(4, np.float32)))}), path)[8] == 3
    artifact = write(twice | {"more": of_one_book(0)})
    assert [leaf.lender for leaf in artifact.entries["more"].leaves] == [(0, 0), (0, 1)]


# -- pools --------------------------------------------------------------------------------------------------------


def norms(count, channels=32):
    """Vectors of two kinds, rounded to 3 bits of mantissa."""
    generator = np.random.default_rng(3)

    def rounded(values):
        return Raw((values.astype(np.float32).view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32))

    shapes = ("float32", (channels,))
    return {
        f"layer{at}.{part}": (*shapes, rounded(generator.normal(mean, spread, channels)))
        for at in range(count)
        for part, mean, spread in (("weight", 1.0, 0.3), ("running_mean", 0.0, 4.0))
    }


def test_small_leaves_of_one_kind_share_a_stream_and_nothing_else(path):
    tensors = norms(20) | {"wide.weight": ("float32", (4097,), Raw(np.zeros(4097, np.float32)))}
    data = file_bytes(write(tensors), path)
    assert data[8] == 3
    with Artifact.open(path) as artifact:
        assert [(pool.dtype, pool.sizes) for pool in artifact.pools] == [("float32", (32,) * 20)] * 2
        for index, part in enumerate(("weight", "running_mean")):
            leaves_of = [artifact.entries[f"layer{at}.{part}"].leaves[0] for at in range(20)]
            assert [leaf.pooled for leaf in leaves_of] == [(index, 32 * at) for at in range(20)]
            assert sum(leaf.nbytes for leaf in leaves_of) == artifact.pools[index].nbytes
        assert artifact.entries["wide.weight"].leaves[0].pooled is None
        assert len(data) == artifact.container_nbytes + sum(entry.nbytes for entry in artifact.entries.values()) - 4
        for name, spec in tensors.items():
            same(artifact.decode(name), dense(*spec))
        # Sign, a few exponents and three bits of mantissa: what is learned of one serves all.
        assert artifact.pools[0].nbytes < 640 * 6 / 8
        assert artifact.pools[1].nbytes < 640 * 8 / 8


def test_constants_have_a_pool_of_their_own(path):
    zeros = {f"frozen{at}.running_mean": ("float32", (32,), Raw(np.zeros(32, np.float32))) for at in range(5)}
    write(norms(20) | zeros).save(path)
    with Artifact.open(path) as artifact:
        assert [(len(pool.sizes), pool.nbytes < 5) for pool in artifact.pools] == [(20, False), (20, False), (5, True)]


def test_a_pool_is_decoded_once_while_there_is_room_for_it(path, monkeypatch):
    write(norms(3)).save(path)
    for room, decoded in ((1 << 24, 2), (100, 6)):
        monkeypatch.setattr("codeword.artifact.reader._KEPT_NBYTES", room)
        calls = []
        with monkeypatch.context() as patched, Artifact.open(path) as artifact:
            counted = "codeword.artifact.reader.decode_pool"
            patched.setattr(counted, lambda *given, calls=calls: calls.append(1) or decode_pool(*given))
            for name, spec in norms(3).items():
                same(artifact.decode(name), dense(*spec))
        assert len(calls) == decoded


def test_what_is_in_a_pool_cannot_be_changed(path):
    write(norms(2)).save(path)
    with Artifact.open(path) as artifact, pytest.raises(ValueError, match="read-only"):
        artifact.decode("layer0.weight")[:] = 0


def test_pools_are_full_at_their_caps(monkeypatch, path):
    monkeypatch.setattr("codeword.artifact.writer.MAX_POOL", 70)
    monkeypatch.setattr("codeword.artifact.writer.MAX_POOLS", 3)
    tensors = norms(5)
    write(tensors).save(path)
    with Artifact.open(path) as artifact:
        # Two leaves of 32 in each; where there may be no more pools, leaves have streams of their own.
        assert [pool.sizes for pool in artifact.pools] == [(32, 32)] * 3
        assert sum(entry.leaves[0].pooled is None for entry in artifact.entries.values()) == 4
        for name, spec in tensors.items():
            same(artifact.decode(name), dense(*spec))


# -- what many tensors take ---------------------------------------------------------------------------------------


def test_many_tensors_of_one_codebook_take_a_few_bytes_each_in_the_header():
    sizes = [write({f"w{seed}": of_one_book(seed) for seed in range(n)}).container_nbytes for n in (100, 200)]
    assert sizes[1] - sizes[0] <= 100 * (4 + 6)  # checksum; name and two numbers, deflated


# -- accounts -----------------------------------------------------------------------------------------------------


def test_sizes_add_up(path):
    artifact = write(tied=[("twin", "raw", (3, 5))])
    data = file_bytes(artifact, path)
    entries = artifact.entries.values()
    streams = sum(leaf.nbytes for entry in entries for leaf in entry.leaves)
    assert artifact.nbytes == len(data) == artifact.container_nbytes + streams
    own = [entry for entry in entries if entry.tied_to is None]
    expected = sum(entry.size * (4 if entry.dtype in FLOATS else DTYPES[entry.dtype].itemsize) for entry in own)
    assert artifact.dense_nbytes == expected
    assert artifact.ratio == expected / len(data)
    assert artifact.bits_per_weight == 8 * len(data) / sum(entry.size for entry in own)


def container_of(shapes):
    """Container bytes of a net whose weights of more than one axis are shared and whose vectors are rounded."""
    writer, generator = Writer(), np.random.default_rng(0)
    for name, dims in shapes.items():
        weight = generator.laplace(scale=0.05, size=dims).astype(np.float32)
        method = methods.RateAware(0.4, granularity="tensor") if len(dims) > 1 else methods.Keep(7)
        expr = method.compress(weight, None, generator=generator)
        writer.add(code_tensor(name, "float32", dims, expr))
    return writer.finish().container_nbytes


def test_the_container_of_a_lenet5_takes_220_bytes_at_most():
    layers = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    shapes = {}
    for name, dims in layers.items():
        shapes |= {f"{name}.weight": dims, f"{name}.bias": dims[:1]}
    assert len(shapes) == 8
    assert container_of(shapes) <= 220


def test_the_container_of_a_resnet20_takes_800_bytes_at_most():
    shapes = {}

    def block(conv, norm, outputs, inputs):
        shapes[f"{conv}.weight"] = (outputs, inputs, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outputs,)

    block("conv1", "bn1", 16, 3)
    width = 16
    for layer, outputs in ((1, 16), (2, 32), (3, 64)):
        for at in range(3):
            for conv in (1, 2):
                block(f"layer{layer}.{at}.conv{conv}", f"layer{layer}.{at}.bn{conv}", outputs, width)
                width = outputs
    shapes |= {"linear.weight": (10, 64), "linear.bias": (10,)}
    assert len(shapes) == 97
    assert container_of(shapes) <= 800


# -- what the writer refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dims", "expr", "says"),
    [
        ("float32", (7,), Raw(np.zeros(6, np.float32)), r"w: .*\(6,\).*\(7,\)"),
        ("complex64", (6,), Raw(np.zeros(6, np.float32)), "w: dtype complex64"),
        ("int8", (6,), Raw(np.zeros(6, np.float32)), "w: an expression of float32 for a tensor of int8"),
        ("float32", (6,), Raw(np.zeros(6, np.int64)), "w: an expression of int64"),
        ("float32", (1,) * 16, Raw(np.zeros(1, np.float32)), "16 dimensions"),
        ("float32", (1,), Sum((Raw(np.zeros(1)),) * 17), "17 terms"),
        ("float32", (1,), Sum((Raw(np.zeros(1)),) * 300), "300 terms"),
    ],
)  # fmt: skip
def test_tensors_that_the_format_cannot_hold_are_refused(dtype, dims, expr, says):
    with pytest.raises(ExprError, match=says):
        code_tensor("w", dtype, dims, expr)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 1025, "\u00e9" * 600, "\ud800"])
def test_names_that_the_format_cannot_hold_are_refused(name):
    with pytest.raises(FormatError, match="tensor name"):
        write({name: TENSORS["raw"]})


def test_the_longest_name_is_held():
    name = "\u00e9" * 512
    assert list(write({name: TENSORS["raw"]})) == [name]


def test_a_name_that_stands_twice_is_refused():
    writer = Writer()
    for _ in range(2):
        writer.add(code_tensor("w", *TENSORS["raw"]))
    with pytest.raises(FormatError, match="twice"):
        writer.finish()


def test_metadata_has_a_limit():
    assert write({}, {"a": "x" * 65000}).metadata == {"a": "x" * 65000}
    with pytest.raises(FormatError, match="metadata takes"):
        write({}, {"a": "x" * 65536})


def test_metadata_is_plain_json_in_the_header(path):
    data = file_bytes(write({}, METADATA), path)
    plain = zlib.decompress(data[17:], -15)
    assert plain[0] == 0
    assert json.loads(plain[1:]) == METADATA
