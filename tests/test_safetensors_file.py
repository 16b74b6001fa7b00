"""The reader and writer of .safetensors against the safetensors package, and against files made to harm."""

import json
import struct
import subprocess
import sys
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.errors import SourceError, WriteError
from codeword.expr import DTYPES, dtype_name
from codeword.safetensors_file import SafetensorsEntry, read_header, read_tensor, write_safetensors

ONE = '{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
TWO = ONE[:-1] + "," + ONE[1:].replace("a", "b", 1)


def raw(header: str | bytes, data: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def write(path, tensors, metadata=None):
    described = [(name, dtype_name(array.dtype), array.shape) for name, array in tensors.items()]
    write_safetensors(path, described, tensors.__getitem__, metadata)


def read(path):
    return {name: read_tensor(path, entry) for name, entry in read_header(path).entries.items()}


def example():
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal((3, 5)) * 4).astype(dtype) for name, dtype in DTYPES.items() if name != "bool"
    }
    tensors["bool"] = np.array([True, False, True])
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 7), ml_dtypes.bfloat16)
    tensors["strided"] = np.arange(12, dtype=np.int16).reshape(3, 4).T
    tensors["naïve ☃.weight"] = np.ones((1, 1, 1, 1), np.float16)
    return tensors


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()


def test_what_we_write_we_read(tmp_path):
    write(tmp_path / "a.safetensors", example(), {"format": "pt", "ключ": "значение"})
    same(read(tmp_path / "a.safetensors"), example())
    assert read_header(tmp_path / "a.safetensors").metadata == {"format": "pt", "ключ": "значение"}


def test_what_we_write_the_library_reads_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    write(tmp_path / "a.safetensors", example(), {"format": "pt"})
    ours = example()
    theirs = load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == ours[name].shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == ours[name].tobytes()
    assert theirs["bfloat16"].dtype == torch.bfloat16
    assert theirs["float8_e4m3"].dtype == torch.float8_e4m3fn
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_with_torch_we_read(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.bool,
        torch.int8,
    ]
    theirs = {str(dtype): torch.arange(-3, 3).to(dtype) for dtype in dtypes}
    save_file(theirs, tmp_path / "a.safetensors")
    ours = read(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].astype(np.float64).tolist() == tensor.double().tolist()


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([np.float32, np.int8, np.uint16, np.float64]), st.lists(st.integers(0, 3), max_size=3)
        ),
        max_size=5,
    )
)
def test_both_writers_are_read_the_same_by_both(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("h") / "a.safetensors"
    tensors = {
        name: np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }
    write(path, tensors)
    same(safetensors.numpy.load_file(path), tensors)
    same(read(path), tensors)
    path.write_bytes(safetensors.numpy.save(tensors))
    same(read(path), tensors)


def test_literal_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"b": np.array([1, 2], np.uint8), "a": np.array([1.0], np.float32)}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}     '
    )
    assert len(header) % 8 == 0
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + b"\x00\x00\x80\x3f\x01\x02"
    assert list(read_header(path).entries.values()) == [
        SafetensorsEntry("a", "float32", (1,), 8 + len(header), 12 + len(header)),
        SafetensorsEntry("b", "uint8", (2,), 12 + len(header), 14 + len(header)),
    ]


def test_the_bytes_do_not_depend_on_the_order_of_the_arguments(tmp_path):
    tensors = example()
    write(tmp_path / "a", tensors, {"a": "1", "b": "2"})
    write(tmp_path / "b", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    write(tmp_path / "a", example())
    for entry in read_header(tmp_path / "a").entries.values():
        assert entry.start % DTYPES[entry.dtype].itemsize == 0


def test_entries_come_in_the_order_of_their_bytes(tmp_path):
    place = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for name, i in (("late", 1), ("early", 0))}
    (tmp_path / "a").write_bytes(raw(json.dumps(place), b"\x07\x09"))
    assert {name: array.tolist() for name, array in read(tmp_path / "a").items()} == {"early": [7], "late": [9]}
    assert list(read_header(tmp_path / "a").entries) == ["early", "late"]


def test_only_one_tensor_is_in_memory_while_writing(tmp_path):
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def load(name):
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        array = np.zeros(1000, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_safetensors(tmp_path / "a", [(str(i), "float32", (1000,)) for i in range(4)], load)
    assert len(alive) == 4


def test_a_read_tensor_can_be_changed_without_changing_the_file(tmp_path):
    write(tmp_path / "a", {"x": np.ones(3, np.float32)})
    read(tmp_path / "a")["x"][:] = 5
    assert read(tmp_path / "a")["x"].tolist() == [1, 1, 1]


HOSTILE = {
    "empty file": (b"", "0 bytes"),
    "no room for a length": (b"\x01\x00\x00", "3 bytes"),
    "header past the end": (struct.pack("<Q", 50) + b"{}", "header of 50 bytes in a file of 10"),
    "header of 2**64": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "header of nothing": (raw(""), "not valid JSON"),
    "not JSON": (raw("{,}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not valid JSON"),
    "UTF-16": (raw("{}".encode("utf-16")), "not valid JSON"),
    "lone surrogate": (raw(ONE.replace("a", "\\ud800", 1), bytes(4)), "not valid JSON"),
    "deep nesting": (raw("[" * 100_000), "not valid JSON"),
    "huge number": (raw("9" * 10_000), "not valid JSON"),
    "NaN": (raw('{"__metadata__":{"a":NaN}}'), "NaN is not JSON"),
    "a list": (raw("[]"), "must be an object"),
    "same name twice": (raw(TWO.replace('"b"', '"a"'), bytes(4)), "'a' appears twice"),
    "same field twice": (
        raw('{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "twice",
    ),
    "metadata of numbers": (raw('{"__metadata__":{"a":1}}'), "map strings to strings"),
    "metadata list": (raw('{"__metadata__":[]}'), "map strings to strings"),
    "entry is a number": (raw('{"a":1}'), "tensor 'a': needs dtype, shape and data_offsets"),
    "entry without dtype": (raw('{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "'a': needs dtype"),
    "overlap": (raw(TWO, bytes(4)), "'b' overlaps"),
    "hole": (raw('{"a":{"dtype":"I8","shape":[1],"data_offsets":[1,2]}}', bytes(2)), "'a' leaves a hole"),
    "truncated": (raw(ONE, bytes(3)), r"truncated \(last tensor 'a'\)"),
    "left over": (raw(ONE, bytes(5)), "bytes after its last tensor"),
    "left over without tensors": (raw("{}", bytes(5)), "bytes after its last tensor"),
}
FIELDS = {
    "unknown dtype F4": ("F4", [2], [0, 1], "dtype 'F4' is not supported; Codeword knows F32, F16, BF16"),
    "complex": ("C64", [1], [0, 8], "dtype 'C64' is not supported"),
    "dtype is a list": (["F32"], [1], [0, 4], "is not supported"),
    "dtype is long": ("F" * 1000, [1], [0, 4], "is not supported"),
    "size does not match": ("F32", [3], [0, 8], "takes 12 bytes, but"),
    "offsets run back": ("F32", [1], [8, 4], "takes 4 bytes, but"),
    "offsets below zero": ("F32", [1], [-4, 0], "must be \\[start, end\\]"),
    "three offsets": ("F32", [1], [0, 4, 8], "must be \\[start, end\\]"),
    "offsets are text": ("F32", [1], ["0", "4"], "must be \\[start, end\\]"),
    "offsets are floats": ("F32", [1], [0.0, 4.0], "must be \\[start, end\\]"),
    "shape is negative": ("F32", [-1, -1], [0, 4], "shape must be"),
    "shape is a number": ("F32", 1, [0, 4], "shape must be"),
    "shape is true": ("F32", [True], [0, 4], "shape must be"),
    "rank of 65": ("F32", [1] * 65, [0, 4], "shape must be"),
    "product overflows": ("F32", [2**62, 2**62, 4], [0, 4], "larger than any memory"),
    "product overflows beside a zero": ("F32", [0, 2**62, 2**62], [0, 0], "larger than any memory"),
}
for case, (dtype, shape, offsets, message) in FIELDS.items():
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    HOSTILE[case] = (raw(text, bytes(8)), f"tensor 'w': .*{message}")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name_and_place(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=message) as raised:
        read_header(path)
    assert "hostile.safetensors" in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_header_above_the_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(SourceError, match="at most 100000000"):
        read_header(path)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
def test_one_wrong_byte_never_ends_in_anything_but_a_source_error(tmp_path_factory, position, value):
    data = bytearray(safetensors.numpy.save(GOOD))
    data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "wrong.safetensors"
    path.write_bytes(data)
    with suppress(SourceError):
        read(path)


GOOD = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.bool_), "c": np.array(1, np.int64)}


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_missing_file_or_a_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match=f"cannot read .*{name}"):
        read_header(tmp_path / name)


def test_a_file_cut_after_its_header_was_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.ones(100, np.float32)})
    entry = read_header(path).entries["x"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SourceError, match="'x' has 390 of its 400 bytes"):
        read_tensor(path, entry)
    path.unlink()
    with pytest.raises(SourceError, match="cannot read tensor 'x'"):
        read_tensor(path, entry)


def test_a_bool_that_is_no_bool(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw('{"m":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}', b"\x01\x02"))
    with pytest.raises(SourceError, match="tensor 'm' is BOOL but holds byte 2"):
        read(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "float32", (2,)), ("a", "float64", (2,))], "name 'a' is taken"),
        ([("__metadata__", "float32", (2,))], "name '__metadata__' is taken"),
        ([("a", "complex64", (2,))], "no dtype for 'a' \\(complex64\\)"),
        ([("a", "float32", (3,))], "announced as float32 \\(3,\\), got float32 \\(2,\\)"),
        ([("a", "float64", (2,))], "announced as float64 \\(2,\\), got float32 \\(2,\\)"),
    ],
)
def test_the_writer_refuses_what_it_cannot_keep_and_leaves_the_old_file(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WriteError, match=message):
        write_safetensors(path, tensors, lambda name: np.zeros(2, np.float32))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_loader_passes_and_leaves_the_old_file(tmp_path):
    def load(name):
        raise SourceError("the source is gone")

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(SourceError, match="the source is gone"):
        write_safetensors(path, [("a", "float32", (2,))], load)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory as Linux reports it")
def test_memory_stays_at_one_tensor(tmp_path):
    """Eight tensors of 16 MiB are read and written through; the peak grows by little more than one of them."""
    code = """
import re, sys
from pathlib import Path
import numpy as np
from codeword.safetensors_file import read_header, read_tensor, write_safetensors
# Not getrusage: its peak is inherited from the process that started this one.
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
tensors = [(str(i), "float32", (2048, 2048)) for i in range(8)]
before = peak()
write_safetensors(sys.argv[1], tensors, lambda name: np.full((2048, 2048), float(name), np.float32))
entries = read_header(sys.argv[1]).entries
load = lambda name: read_tensor(sys.argv[1], entries[name])
write_safetensors(sys.argv[2], [(e.name, e.dtype, e.shape) for e in entries.values()], load)
print(peak() - before)
"""
    arguments = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 15 < float(done.stdout) < 1.5 * 16
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
