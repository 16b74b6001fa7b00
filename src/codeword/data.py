"""Evaluation data as NumPy arrays: `load_data("mnist:test")` and friends. Needs NumPy only, downloads nothing.

    mnist:train, mnist:test        the IDX files, plain or .gz, under ROOT/MNIST/raw/, ROOT/mnist/ or ROOT/
    cifar10:train, cifar10:test    ROOT/cifar-10-batches-bin/*.bin or ROOT/cifar-10-batches-py/*
    npz:PATH                       arrays x and y of a .npz file
    digits                         1,000 MNIST test digits that ship with the package

ROOT is the `root` argument or $CODEWORD_DATA. Images come out as float32 NCHW in [0, 1], labels as int64. Whatever
is missing or malformed raises `DataError` with the path, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import gzip
import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import numpy as np

from codeword.errors import DataError

Array: TypeAlias = np.ndarray

SPECS = ("mnist:train", "mnist:test", "cifar10:train", "cifar10:test", "npz:PATH", "digits")
_MNIST_PAGE = "http://yann.lecun.com/exdb/mnist"
_CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR10_IMAGE = (3, 32, 32)
_CLASSES = 10  # of MNIST and of CIFAR-10
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """Labelled examples.

    name: the spec they came from. x (n, ...): float32 images (n, c, h, w) in [0, 1], or the values as a .npz file
    gives them. y (n,): int64 class numbers. Raises DataError if x and y differ in length or y is no list of integers.
    """

    name: str
    x: Array
    y: Array

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.y.dtype.kind not in "iu":
            raise DataError(f"{self.name}: labels must be integers (n,), found {self.y.dtype} {self.y.shape}")
        if self.x.ndim < 1 or len(self.x) != len(self.y):
            raise DataError(f"{self.name}: {self.x.shape} examples for {len(self.y)} labels; give one label for each")

    def __len__(self) -> int:
        return len(self.y)


def load_data(spec: str, *, limit: int | None = None, root: Path | None = None) -> Dataset:
    """The data set that `spec` names (see the top of this file), or its first `limit` examples.

    root: folder of the published files; None takes $CODEWORD_DATA. Only `mnist:` and `cifar10:` need it.
    Raises DataError if the spec is unknown, the limit is not positive, or files are missing or malformed.
    """
    if limit is not None and limit <= 0:
        raise DataError(f"limit must be a positive number of examples, got {limit}")
    match spec.split(":", 1):
        case ["mnist", "train" | "test" as split]:
            x, y = _mnist(_root(spec, root, _MNIST_PAGE), split, limit)
        case ["cifar10", "train" | "test" as split]:
            x, y = _cifar10(_root(spec, root, _CIFAR10_PAGE), split, limit)
        case ["npz", path] if path:
            x, y = _npz(Path(path).expanduser(), limit)
        case ["digits"]:
            # Not through codeword.zoo: that imports torch, and a device that only reads data may have none.
            x, y = _npz(Path(str(resources.files("codeword").joinpath("zoo/digits.npz"))), limit)
        case _:
            raise DataError(_unknown_spec(spec))
    return Dataset(spec, _scaled(x), np.asarray(y, np.int64))


def _unknown_spec(spec: str) -> str:
    """The message for a spec that names nothing, with the nearest one that does."""
    valid = ", ".join(SPECS)
    if spec.endswith(".npz"):
        return f"unknown data {spec!r}: did you mean 'npz:{spec}'? Valid are {valid}"
    near = difflib.get_close_matches(spec, SPECS, n=1, cutoff=0.4)
    return f"unknown data {spec!r}: {f'did you mean {near[0]!r}? ' if near else ''}Valid are {valid}"


def _root(spec: str, root: Path | None, page: str) -> Path:
    """The data folder: the argument, else $CODEWORD_DATA. Raises DataError if there is neither."""
    named = root if root is not None else os.environ.get("CODEWORD_DATA")
    if not named:
        raise DataError(
            f"{spec}: no data folder; set $CODEWORD_DATA to (or pass as root) the folder that holds the files of {page}"
        )
    return Path(named).expanduser()


def _scaled(x: Array) -> Array:
    """uint8 images as float32 in [0, 1], in one allocation; anything else as it is."""
    return np.divide(x, np.float32(255), dtype=np.float32) if x.dtype == np.uint8 else x


def _missing(spec: str, looked_for: Sequence[Path], page: str) -> DataError:
    names = ", ".join(str(path) for path in looked_for)
    return DataError(
        f"{spec} is not here: looked for {names}. Get the files from {page} and set $CODEWORD_DATA to their folder"
    )


def _check_labels(path: Path, y: Array) -> None:
    if len(y) and int(y.max()) >= _CLASSES:
        at = int(np.argmax(y >= _CLASSES))
        raise DataError(f"{path}: label {int(y[at])} at position {at}; expected 0 to {_CLASSES - 1}")


# MNIST -------------------------------------------------------------------------------------------------------------


def _mnist(root: Path, split: str, limit: int | None) -> tuple[Array, Array]:
    """x uint8 (n, 1, h, w), y uint8 (n,) from a pair of IDX files in one folder."""
    stem = "train" if split == "train" else "t10k"
    looked_for: list[Path] = []
    for folder in (root / "MNIST" / "raw", root / "mnist", root):
        pair: list[Path] = []
        for kind in ("images-idx3", "labels-idx1"):
            plain = folder / f"{stem}-{kind}-ubyte"
            choices = (plain, plain.with_name(plain.name + ".gz"))
            looked_for.extend(choices)
            pair.extend([path for path in choices if path.is_file()][:1])
        if len(pair) == 2:
            x, y = _idx(pair[0], 3), _idx(pair[1], 1)
            if len(x) != len(y):
                raise DataError(f"{pair[0]} holds {len(x)} images but {pair[1]} holds {len(y)} labels")
            _check_labels(pair[1], y)
            return x[:limit, None], y[:limit]
    raise _missing(f"mnist:{split}", looked_for, _MNIST_PAGE)


def _idx(path: Path, ndim: int) -> Array:
    """The uint8 array of an IDX file: big-endian magic 0x0800 + ndim, ndim sizes, then the bytes in C order."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * ndim)
            if len(head) < 4 + 4 * ndim:
                raise DataError(f"{path}: truncated, the header has {len(head)} bytes; expected {4 + 4 * ndim}")
            magic, *sizes = (int(word) for word in np.frombuffer(head, ">u4"))
            if magic != 0x0800 + ndim:
                raise DataError(f"{path}: magic number {magic:#010x}; expected {0x0800 + ndim:#010x} (IDX, {ndim}-D)")
            expected = math.prod(sizes)
            # By chunks and never past the end: the sizes in a damaged header cost no memory.
            body = bytearray()
            while len(body) <= expected and (chunk := file.read(min(_CHUNK, expected + 1 - len(body)))):
                body += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(body) != expected:
        found = f"more than {expected}" if len(body) > expected else str(len(body))
        raise DataError(f"{path}: {found} bytes of data; expected {expected} for {tuple(sizes)}")
    return np.frombuffer(body, np.uint8).reshape(sizes)


# CIFAR-10 ----------------------------------------------------------------------------------------------------------


def _cifar10(root: Path, split: str, limit: int | None) -> tuple[Array, Array]:
    """x uint8 (n, 3, 32, 32), y uint8 (n,) from the binary or the python version."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    binary = [root / "cifar-10-batches-bin" / f"{name}.bin" for name in names]
    python = [root / "cifar-10-batches-py" / name for name in names]
    for paths, read in ((binary, _cifar10_binary), (python, _cifar10_python)):
        if not all(path.is_file() for path in paths):
            continue
        images, labels, count = [], [], 0
        for path in paths:
            x, y = read(path)
            _check_labels(path, y)
            images.append(x)
            labels.append(y)
            count += len(y)
            if limit is not None and count >= limit:
                break
        return np.concatenate(images)[:limit], np.concatenate(labels)[:limit]
    absent = [path for path in (*binary, *python) if not path.is_file()]
    raise _missing(f"cifar10:{split}", absent, _CIFAR10_PAGE)


def _cifar10_binary(path: Path) -> tuple[Array, Array]:
    """x (n, 3, 32, 32), y (n,): records of one label byte and 3,072 bytes of an image, plane by plane."""
    record = 1 + math.prod(_CIFAR10_IMAGE)
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not len(data) or len(data) % record:
        raise DataError(f"{path}: {len(data)} bytes; expected a positive multiple of {record} (truncated?)")
    rows = data.reshape(-1, record)
    return rows[:, 1:].reshape(-1, *_CIFAR10_IMAGE), rows[:, 0]


# What unpickling damaged or hostile bytes may raise, UnpicklingError apart.
_DAMAGED_PICKLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
)


class _PickledArray:
    """Stands in for a pickled ndarray: keeps the state it was to be restored from, runs nothing."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PickledDtype:
    """Stands in for a pickled dtype: keeps the name it was called with."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and NumPy arrays, and refuses every other class or function.

    NumPy's own constructors are not called either: arrays come back as `_PickledArray`, so nothing but the opcodes
    that build lists, dicts, strings and numbers ever acts on what a file says.
    """

    _known = {  # noqa: RUF012  (read only)
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module_name: str, global_name: str) -> type:
        """The stand-in of a NumPy name; UnpicklingError for any other."""
        try:
            return self._known[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}; only NumPy arrays are allowed"
            ) from None


def _cifar10_python(path: Path) -> tuple[Array, Array]:
    """x (n, 3, 32, 32), y (n,) of a python batch: a pickled dict with b"data" uint8 (n, 3072) and b"labels"."""
    width = math.prod(_CIFAR10_IMAGE)
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused to unpickle: {error}") from error
    except _DAMAGED_PICKLE as error:
        raise DataError(f"{path}: not a CIFAR-10 python batch ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path}: holds a {type(batch).__name__}; expected a dict with b'data' and b'labels'")
    data, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels"))
    match data:
        case _PickledArray(state=(_, (int(), int()) as sizes, _PickledDtype(name=b"u1" | "u1"), order, bytes(raw))):
            if sizes[1] != width or len(raw) != math.prod(sizes):
                raise DataError(f"{path}: b'data' has shape {sizes} and {len(raw)} bytes; expected (n, {width})")
            rows = np.frombuffer(raw, np.uint8).reshape(sizes, order="F" if order else "C")
        case _:
            raise DataError(f"{path}: b'data' is no 2-D uint8 array; expected one of shape (n, {width})")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < _CLASSES for label in labels):
        raise DataError(f"{path}: b'labels' must be a list of integers, 0 to {_CLASSES - 1}")
    if len(labels) != len(rows):
        raise DataError(f"{path}: {len(rows)} images but {len(labels)} labels")
    return rows.reshape(-1, *_CIFAR10_IMAGE), np.array(labels, np.uint8)


# A .npz file -------------------------------------------------------------------------------------------------------


def _npz(path: Path, limit: int | None) -> tuple[Array, Array]:
    """x, y of a .npz file: uint8 images as uint8 (n, c, h, w), floats as float32, other integers as int64."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: holds a single array; expected a .npz with arrays x and y")
            with file:
                if not {"x", "y"} <= set(file.files):
                    raise DataError(f"{path}: expected arrays named x and y, found {', '.join(file.files) or 'none'}")
                x, y = file["x"], file["y"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a .npz with arrays x and y") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"{path}: y must be integers of shape (n,), found {y.dtype} {y.shape}")
    if len(y) and int(y.min()) < 0:
        raise DataError(f"{path}: y holds the label {int(y.min())}; expected 0 or more")
    if x.ndim < 1 or len(x) != len(y):
        raise DataError(f"{path}: x of shape {x.shape} but {len(y)} labels in y; expected one label for each example")
    x, y = x[:limit], y[:limit]
    if x.dtype == np.uint8:
        return _channels_first(path, x), y
    if x.dtype.kind == "f":
        if not np.isfinite(x).all():
            raise DataError(f"{path}: x holds NaN or infinity; expected finite values")
        return x.astype(np.float32, copy=False), y
    if x.dtype.kind in "iu":
        return x.astype(np.int64, copy=False), y
    raise DataError(f"{path}: x is {x.dtype}; expected uint8 images, floats or integers")


def _channels_first(path: Path, x: Array) -> Array:
    """uint8 images (n, h, w), (n, c, h, w) or (n, h, w, c) with c of 1 or 3 as (n, c, h, w)."""
    if x.ndim == 3:
        return x[:, None]
    first, last = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (1, 3))
    if first != last:
        return x if first else x.transpose(0, 3, 1, 2)
    both = "either axis 1 or axis 3 may be the channels" if first else "no axis of 1 or 3 channels"
    raise DataError(f"{path}: uint8 x of shape {x.shape}: {both}; expected (n, h, w), (n, c, h, w) or (n, h, w, c)")
