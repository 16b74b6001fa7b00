"""Results kept for the next time: what was coded for one target, or in one run, is not coded again for another.

A result is bytes under a key: the SHA-256 of all that it depends on, so that it is never out of date. On disk an entry
is a file of its own, `FOLDER/ab/cdef...`, put there whole or not at all. Whatever is wrong with one, it is as if it
were not there; whatever is wrong with the folder, work goes on without. Processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np

from codeword.atomic import make_folder, replacing
from codeword.errors import WriteError
from codeword.kernels import native
from codeword.math.moments import Moments
from codeword.sources import Source, TensorInfo

ALGORITHMS = 2  # to be raised when the same method, curve or candidate comes out otherwise than before
LIMIT = 2_000_000_000  # bytes of a folder
_IN_MEMORY = 1 << 28  # bytes, of what was last put or got
_MAGIC = b"codeword cache 1\n"
_SWEEPS = 16  # of a folder, while as many bytes are written as it may hold
_STALE = 3600  # seconds after which a file that nobody finished is removed
_WORTH_A_FILE = 256  # values of a tensor; smaller ones are coded as fast as a file is opened
Warn: TypeAlias = Callable[[str], None]
_T = TypeVar("_T")


class CacheUnusable(UserWarning):
    """The cache folder cannot be written to; results of this run are not kept."""


def default_folder() -> Path | None:
    """$CODEWORD_CACHE, or the platform's folder for caches; None if that variable is empty, or nobody is at home."""
    named = os.environ.get("CODEWORD_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        match sys.platform:
            case "win32":
                return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "codeword" / "cache"
            case "darwin":
                return Path.home() / "Library" / "Caches" / "codeword"
            case _:
                stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
                return (stated if stated.is_absolute() else Path.home() / ".cache") / "codeword"
    except RuntimeError:  # no home
        return None


class Cache:
    """Bytes by key: the latest in memory, all of them in a folder if there is one."""

    def __init__(self, folder: Path | None = None, *, limit: int = LIMIT, warn: Warn | None = None) -> None:
        self._folder = folder
        self._limit = limit
        self._warn = warn or (lambda text: warnings.warn(text, CacheUnusable, stacklevel=2))
        self._memory: dict[str, bytes] = {}
        self._held = 0
        self._unswept = limit  # bytes written since the folder was last looked through; at first it is not known

    @classmethod
    def of(cls, where: str | os.PathLike[str] | bool, warn: Warn | None = None) -> Cache:
        """The cache in a folder; in the default one if `where` is true, in memory alone if it is not."""
        if isinstance(where, bool):
            return cls(default_folder() if where else None, warn=warn)
        return cls(Path(where), warn=warn)

    @property
    def lasts(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def get(self, key: str) -> bytes | None:
        """What was put under the key, if it is still there and as it was."""
        data = self._memory.get(key)
        if data is None and self._folder is not None:
            data = self._read(key)
            if data is not None:
                self._hold(key, data)
        return data

    def __contains__(self, key: str) -> bool:
        """Whether there seems to be something under the key."""
        return key in self._memory or (self._folder is not None and self._path(self._folder, key).exists())

    def put(self, key: str, data: bytes, *, lasting: bool = True) -> None:
        """Keep data under the key; unless lasting, in memory alone."""
        self._hold(key, data)
        if self._folder is None or not lasting:
            return
        path = self._path(self._folder, key)
        if path.exists():  # another process was faster: what it wrote is the same
            return
        entry = _sealed(key, data)
        if len(entry) > self._limit // 2:
            return
        try:
            if self._unswept + len(entry) > self._limit // _SWEEPS:
                self._sweep(self._folder, len(entry))
            make_folder(path.parent)
            with replacing(path, lasting=False) as file:
                file.write(entry)
        except (WriteError, OSError) as error:
            self._warn(f"results are not kept for the next time: {error}; name another folder in CODEWORD_CACHE")
            self._folder = None
            return
        self._unswept += len(entry)

    def _hold(self, key: str, data: bytes) -> None:
        self._held += len(data) - len(self._memory.pop(key, b""))
        self._memory[key] = data
        while self._held > _IN_MEMORY:
            oldest = next(iter(self._memory))
            self._held -= len(self._memory.pop(oldest))

    def _path(self, folder: Path, key: str) -> Path:
        return folder / key[:2] / key[2:]

    def _read(self, key: str) -> bytes | None:
        if self._folder is None:
            return None
        path = self._path(self._folder, key)
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        data = _unsealed(key, entry)
        with suppress(OSError):
            if data is None:
                path.unlink()  # or it would stand in the way of a good one
            else:
                os.utime(path)  # those used last are removed last
        return data

    def _sweep(self, folder: Path, more: int) -> None:
        """Remove entries, those unused for longest first, until there is room for as much as until the next sweep."""
        entries = sorted(_entries(folder))
        total, room = sum(entry.nbytes for entry in entries), self._limit - self._limit // _SWEEPS - more
        for entry in entries:
            if total <= room:
                break
            with suppress(OSError):
                entry.path.unlink()
                total -= entry.nbytes
        self._unswept = 0


class Results:
    """What was found out about the tensors of one source, given what their errors cost."""

    def __init__(
        self, cache: Cache, source: Source, importance: Mapping[str, np.ndarray | Moments] | None = None
    ) -> None:
        self._cache = cache
        self._source = source
        self._importance = importance or {}
        self._digests: dict[str, tuple[str, str | None]] = {}  # of a tensor's values, and of what its errors cost

    def key(self, what: str, info: TensorInfo, weight: np.ndarray | None = None, **facts: Any) -> str:  # noqa: ANN401
        """The key of one kind of result for one tensor: of its name, its values and all facts, methods among them.

        weight: its values, if they have been loaded already.
        """
        from codeword import __version__  # not before the package is there

        if info.name not in self._digests:
            values = self._source.load(info.name) if weight is None else weight
            cost = self._importance.get(info.name)
            found = None if cost is None else _cost_digest(cost)
            self._digests[info.name] = _digest(values), found
        versions = __version__, ALGORITHMS, native.library() is not None
        tensor = info.name, info.dtype, info.shape, *self._digests[info.name]
        return hashlib.sha256(msgspec.json.encode((what, versions, tensor, facts), order="sorted")).hexdigest()

    def has(self, key: str) -> bool:
        """Whether there seems to be a result under a key."""
        return key in self._cache

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """The result under a key, if it is there and of that kind."""
        data = self._cache.get(key)
        if data is None:
            return None
        try:
            return msgspec.msgpack.decode(data, type=kind, dec_hook=_array)
        except (msgspec.MsgspecError, ValueError, TypeError):
            return None

    def put(self, key: str, result: object, values: int) -> None:
        """Keep the result for a tensor of so many values: for good if it is large enough to be worth a file."""
        data = msgspec.msgpack.encode(result, enc_hook=_plain)
        self._cache.put(key, data, lasting=values >= _WORTH_A_FILE)


def _digest(values: np.ndarray) -> str:
    flat = np.ascontiguousarray(values).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").hexdigest()


def _cost_digest(cost: np.ndarray | Moments) -> str:
    values, kind = (cost.second, f"moments {cost.damping!r}") if isinstance(cost, Moments) else (cost, "each")
    return f"{kind} {values.dtype} {values.shape} {_digest(values)}"


def _plain(value: object) -> object:
    """An array as msgpack can hold it."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _array(kind: type, value: Any) -> np.ndarray:  # noqa: ANN401
    """The array again. Raises TypeError or ValueError if it is none."""
    if kind is not np.ndarray:
        raise TypeError(f"{kind.__name__} cannot be kept")
    dtype, shape, data = value
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape)


class _Entry(NamedTuple):
    used: float
    nbytes: int
    path: Path


def _entries(folder: Path) -> Iterator[_Entry]:
    """The files of a cache, and of nobody else: they may have been told a folder where other things are."""
    with suppress(OSError):
        for part in folder.iterdir():
            if len(part.name) != 2 or not _is_hex(part.name):
                continue
            with suppress(OSError):
                for path in part.iterdir():
                    with suppress(OSError):
                        facts = path.stat()
                        unfinished = path.name.startswith(".") and path.suffix == ".tmp"
                        if unfinished and time.time() - facts.st_mtime > _STALE:
                            path.unlink()
                        elif len(path.name) == 62 and _is_hex(path.name):
                            yield _Entry(facts.st_mtime, facts.st_size, path)


def _is_hex(text: str) -> bool:
    return all(letter in "0123456789abcdef" for letter in text)


def _sealed(key: str, data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + data).digest() + data


def _unsealed(key: str, entry: bytes) -> bytes | None:
    """What an entry holds, None unless it is whole and of this key."""
    at = len(_MAGIC) + 32
    data = entry[at:]
    good = entry[:at] == _MAGIC + hashlib.sha256(key.encode() + data).digest()
    return data if good else None
