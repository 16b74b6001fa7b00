"""Reading MNIST, CIFAR-10 and .npz files: tiny ones written here, whole, damaged and hostile."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from codeword.data import Dataset, load_data
from codeword.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 5, 4), np.uint8)
LABELS = np.array([0, 1, 9, 3, 4, 5, 6], np.uint8)
COLOUR = RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)
COLOUR_LABELS = np.array([9, 0, 3, 1], np.uint8)


def idx(array, magic=None):
    head = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *, images=None, labels=None, suffix="", split="t10k"):
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix == ".gz" else bytes
    for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
        default = idx(IMAGES if kind == "images-idx3" else LABELS)
        (folder / f"{split}-{kind}-ubyte{suffix}").write_bytes(pack(default if data is None else data))


def cifar_records(x=COLOUR, y=COLOUR_LABELS):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(x, y, strict=True))


def write_cifar_binary(root, data=None):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_batch.bin").write_bytes(cifar_records() if data is None else data)
    for i in range(1, 6):
        y = (COLOUR_LABELS + i) % 10
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_records(COLOUR + np.uint8(i), y))


def write_cifar_python(root, batch=None, *, protocol=4):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    if batch is None:
        batch = {b"data": COLOUR.reshape(4, -1), b"labels": COLOUR_LABELS.tolist(), b"batch_label": b"testing"}
    data = batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol)
    (folder / "test_batch").write_bytes(data)


def python2_batch(x, y):
    """The bytes that Python 2 and the NumPy of its day write with protocol 2: every string is a byte string."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    def array_class(name):
        return b"c" + name.replace(b" ", b"\n") + b"\n"

    raw = x.tobytes()
    dtype = array_class(b"numpy dtype") + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = array_class(b"numpy.core.multiarray _reconstruct") + array_class(b"numpy ndarray")
    array += integer(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + integer(1) + integer(x.shape[0]) + integer(x.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def check_mnist(dataset, n=7):
    assert dataset.x.shape == (n, 1, 5, 4)
    assert dataset.x.dtype == np.float32
    assert np.array_equal(dataset.x[:, 0], IMAGES[:n].astype(np.float32) / np.float32(255))
    assert dataset.y.dtype == np.int64
    assert dataset.y.tolist() == LABELS[:n].tolist()
    assert len(dataset) == n


def check_cifar(dataset, n=4):
    assert dataset.x.dtype == np.float32
    assert np.array_equal(dataset.x, COLOUR[:n].astype(np.float32) / np.float32(255))
    assert dataset.y.tolist() == COLOUR_LABELS[:n].tolist()


# MNIST


@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_layouts(tmp_path, folder, suffix):
    write_mnist(tmp_path / folder, suffix=suffix)
    check_mnist(load_data("mnist:test", root=tmp_path))


def test_root_comes_from_the_environment_and_limit_cuts(tmp_path, monkeypatch):
    write_mnist(tmp_path, split="train")
    monkeypatch.setenv("CODEWORD_DATA", str(tmp_path))
    dataset = load_data("mnist:train", limit=3)
    check_mnist(dataset, 3)
    assert dataset.name == "mnist:train"
    check_mnist(load_data("mnist:train", limit=1000))


def test_no_root_at_all(monkeypatch):
    monkeypatch.delenv("CODEWORD_DATA", raising=False)
    with pytest.raises(DataError, match=r"mnist:test: no data folder; set \$CODEWORD_DATA .*yann\.lecun\.com"):
        load_data("mnist:test")


def test_missing_mnist_names_files_page_and_variable(tmp_path):
    with pytest.raises(DataError) as error:
        load_data("mnist:test", root=tmp_path)
    for part in (str(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"), "yann.lecun.com", "$CODEWORD_DATA"):
        assert part in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (idx(IMAGES, magic=0x0801), r"magic number 0x00000801; expected 0x00000803"),
        (idx(IMAGES)[:-1], r"139 bytes of data; expected 140 for \(7, 5, 4\)"),
        (idx(IMAGES) + b"\0", r"more than 140 bytes of data; expected 140"),
        (idx(IMAGES)[:10], r"the header has 10 bytes; expected 16"),
        (b"", r"the header has 0 bytes"),
        (struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"abc", r"3 bytes of data; expected 7922"),
        (idx(IMAGES[:6]), r"holds 6 images but .*t10k-labels-idx1-ubyte.* holds 7 labels"),
    ],
)
def test_damaged_images(tmp_path, images, message, suffix):
    write_mnist(tmp_path, images=images, suffix=suffix)
    with pytest.raises(DataError, match=message) as error:
        load_data("mnist:test", root=tmp_path)
    assert str(tmp_path / f"t10k-images-idx3-ubyte{suffix}") in str(error.value)


def test_label_that_is_no_digit(tmp_path):
    write_mnist(tmp_path, labels=idx(np.array([1, 2, 10, 3, 4, 5, 6], np.uint8)))
    with pytest.raises(DataError, match=r"labels-idx1-ubyte: label 10 at position 2; expected 0 to 9"):
        load_data("mnist:test", root=tmp_path)


@pytest.mark.parametrize("data", [gzip.compress(idx(IMAGES))[:-9], b"not gzip at all, but long enough", b""])
def test_damaged_gzip(tmp_path, data):
    write_mnist(tmp_path, suffix=".gz")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz"):
        load_data("mnist:test", root=tmp_path)


# CIFAR-10


def test_cifar_binary(tmp_path):
    write_cifar_binary(tmp_path)
    check_cifar(load_data("cifar10:test", root=tmp_path))
    check_cifar(load_data("cifar10:test", root=tmp_path, limit=2), 2)
    train = load_data("cifar10:train", root=tmp_path)
    assert train.x.shape == (20, 3, 32, 32)
    assert train.y.tolist() == [(label + i) % 10 for i in range(1, 6) for label in COLOUR_LABELS.tolist()]
    across = load_data("cifar10:train", root=tmp_path, limit=6)
    assert np.array_equal(across.x, train.x[:6])


@pytest.mark.parametrize("data", [cifar_records()[:-1], b""])
def test_truncated_cifar_binary(tmp_path, data):
    write_cifar_binary(tmp_path, data)
    with pytest.raises(DataError, match=rf"test_batch\.bin: {len(data)} bytes; expected a positive multiple of 3073"):
        load_data("cifar10:test", root=tmp_path)


def test_label_that_is_no_class_of_cifar(tmp_path):
    write_cifar_binary(tmp_path, cifar_records(y=np.array([1, 200, 3, 4], np.uint8)))
    with pytest.raises(DataError, match="label 200 at position 1; expected 0 to 9"):
        load_data("cifar10:test", root=tmp_path)


def test_missing_cifar_names_what_is_absent(tmp_path):
    write_cifar_binary(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"looked for \S*data_batch_4\.bin.*cs\.toronto\.edu.*\$CODEWORD_DATA") as error:
        load_data("cifar10:train", root=tmp_path)
    assert "data_batch_3.bin" not in str(error.value)


@pytest.mark.parametrize("protocol", [3, 4])
def test_cifar_python(tmp_path, protocol):
    write_cifar_python(tmp_path, protocol=protocol)
    check_cifar(load_data("cifar10:test", root=tmp_path))


def test_cifar_python_as_published(tmp_path):
    data = python2_batch(COLOUR.reshape(4, -1), COLOUR_LABELS.tolist())
    original = pickle.loads(data, encoding="bytes")  # so that it is a pickle NumPy itself reads
    assert np.array_equal(original[b"data"], COLOUR.reshape(4, -1))
    write_cifar_python(tmp_path, data)
    check_cifar(load_data("cifar10:test", root=tmp_path))


class Attack:
    """A pickle that runs a command when it is read."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    trace = tmp_path / "it ran"
    for attack in (Attack(os.mkdir, str(trace)), {b"data": Attack(eval, f"open({str(trace)!r}, 'w')")}):
        write_cifar_python(tmp_path, attack, protocol=protocol)
        with pytest.raises(DataError, match=r"test_batch: refused to unpickle: it asks for \S+; only NumPy arrays"):
            load_data("cifar10:test", root=tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"", "not a CIFAR-10 python batch"),
        (pickle.dumps({b"data": COLOUR.reshape(4, -1), b"labels": [1, 2, 3, 4]}, 4)[:500], "test_batch: "),
        (b"\x80\x04\x95", "test_batch: "),
        ([1, 2], "holds a list; expected a dict"),
        ({b"labels": [1]}, "b'data' is no 2-D uint8 array"),
        ({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, "b'data' is no 2-D uint8 array"),
        ({b"data": np.zeros((2, 10), np.uint8), b"labels": [1, 2]}, r"shape \(2, 10\) .* expected \(n, 3072\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "2 images but 1 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "b'labels' must be a list of integers, 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": "a"}, "b'labels' must be a list"),
    ],
)
def test_damaged_python_batch(tmp_path, batch, message):
    write_cifar_python(tmp_path, batch)
    with pytest.raises(DataError, match=message):
        load_data("cifar10:test", root=tmp_path)


def test_any_prefix_of_a_python_batch_is_a_data_error(tmp_path):
    data = python2_batch(np.zeros((1, 3072), np.uint8), [1])
    for end in (*range(0, 200), *range(len(data) - 60, len(data))):
        write_cifar_python(tmp_path, data[:end])
        with pytest.raises(DataError):
            load_data("cifar10:test", root=tmp_path)


# npz, digits, specs


def npz(tmp_path, **arrays):
    path = tmp_path / "some.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 9), (2, 1, 8, 9)),
        ((2, 3, 8, 9), (2, 3, 8, 9)),
        ((2, 8, 9, 3), (2, 3, 8, 9)),
        ((2, 1, 8, 9), (2, 1, 8, 9)),
        ((2, 8, 9, 1), (2, 1, 8, 9)),
    ],
)
def test_npz_image_layouts(tmp_path, shape, expected):
    x = RNG.integers(0, 256, shape, np.uint8)
    dataset = load_data(npz(tmp_path, x=x, y=[1, 2]))
    assert dataset.x.shape == expected
    assert dataset.x.dtype == np.float32
    planes = x.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else x.reshape(expected)
    assert np.array_equal(dataset.x, planes.astype(np.float32) / np.float32(255))


def test_npz_floats_and_integers_pass_as_they_are(tmp_path):
    x = RNG.normal(size=(3, 5)).astype(np.float32)
    dataset = load_data(npz(tmp_path, x=x, y=np.array([5, 0, 1], np.uint8)), limit=2)
    assert np.array_equal(dataset.x, x[:2])
    assert dataset.y.tolist() == [5, 0]
    tokens = load_data(npz(tmp_path, x=np.array([[7, 300]], np.int32), y=[1]))
    assert tokens.x.dtype == np.int64
    assert tokens.x.tolist() == [[7, 300]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "expected arrays named x and y, found x"),
        ({"x": np.zeros((2, 3, 8, 3), np.uint8), "y": [0, 1]}, "either axis 1 or axis 3 may be the channels"),
        ({"x": np.zeros((2, 5, 8, 8), np.uint8), "y": [0, 1]}, "no axis of 1 or 3 channels"),
        ({"x": np.zeros((2, 5), np.uint8), "y": [0, 1]}, r"uint8 x of shape \(2, 5\)"),
        ({"x": np.zeros((2, 5), np.float32), "y": [0, 1, 2]}, r"x of shape \(2, 5\) but 3 labels"),
        ({"x": np.zeros((2, 5), np.float32), "y": [0.0, 1.0]}, "y must be integers .* found float64"),
        ({"x": np.zeros((2, 5), np.float32), "y": [0, -1]}, "y holds the label -1"),
        ({"x": np.array([[np.nan]]), "y": [0]}, "x holds NaN or infinity"),
        ({"x": np.array(["a"]), "y": [0]}, "x is <U1; expected uint8 images, floats or integers"),
        ({"x": np.array([None]), "y": [0]}, "cannot be read as .npz"),
    ],
)
def test_npz_that_does_not_say_what_it_should(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message) as error:
        load_data(npz(tmp_path, **arrays))
    assert "some.npz" in str(error.value)


def test_npz_missing_truncated_and_not_npz(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npz: no such file"):
        load_data(f"npz:{tmp_path / 'nowhere.npz'}")
    spec = npz(tmp_path, x=IMAGES, y=LABELS)
    path = Path(spec.removeprefix("npz:"))
    whole = path.read_bytes()
    for data in (whole[:-30], whole[:40], b"", b"text", pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"some\.npz"):
            load_data(spec)
    np.save(tmp_path / "array.npy", IMAGES)
    with pytest.raises(DataError, match="holds a single array; expected"):
        load_data(f"npz:{tmp_path / 'array.npy'}")


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("mnist:tset", "'mnist:test'"),
        ("cifar:test", "'cifar10:test'"),
        ("mnist", "'mnist:t"),
        ("digit", "'digits'"),
        ("my/file.npz", "'npz:my/file.npz'"),
        ("npz:", "'npz:PATH'"),
    ],
)
def test_unknown_spec_names_the_nearest(spec, nearest):
    with pytest.raises(DataError, match="did you mean " + nearest):
        load_data(spec)


def test_spec_like_nothing_lists_all():
    with pytest.raises(DataError, match="unknown data 'zzz': Valid are mnist:train, mnist:test"):
        load_data("zzz")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(limit):
    with pytest.raises(DataError, match=f"limit must be a positive number of examples, got {limit}"):
        load_data("digits", limit=limit)


def test_dataset_checks_itself():
    with pytest.raises(DataError, match=r"mine: \(2, 3\) examples for 1 labels"):
        Dataset("mine", np.zeros((2, 3), np.float32), np.zeros(1, np.int64))
    with pytest.raises(DataError, match="mine: labels must be integers"):
        Dataset("mine", np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
