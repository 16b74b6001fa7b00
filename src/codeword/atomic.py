"""Write a file whole or not at all.

Hours of compression must not end in half a file over yesterday's good one. So every output is written to a temporary
file beside its target, synced to the disk, and only then renamed over the target: a step the filesystem does at once.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from codeword.errors import CodewordError, WriteError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_WAYS_OUT = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EFBIG: "raise the limit on file size or write to another disk",
    errno.EACCES: "name a file and folder that you may write to",
    errno.EPERM: "name a file and folder that you may write to",
    errno.EROFS: "write to a disk that is not mounted read-only",
    errno.ENOENT: "create its folder first",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "name a file inside that folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names `path`, the reason and the way out."""
    try:
        yield
    except OSError as error:
        way_out = _WAYS_OUT.get(error.errno or 0, "write to another place")
        reason = error.strerror or str(error)
        raise WriteError(f"cannot write {path}: {reason}; {way_out} (nothing was changed)") from error


class _Target(io.FileIO):
    """A new file whose failed writes are WriteErrors.

    Translated here and not around the caller's block: an OSError that the block meets elsewhere, reading its input
    say, is not the target's fault and passes unchanged.
    """

    def __init__(self, temporary: Path, path: Path) -> None:
        # Mode x: never follow or reuse a file that somebody else put there. Permission bits come from the umask.
        super().__init__(temporary, "x+")
        self._path = path

    def write(self, data: ReadableBuffer, /) -> int:
        with _explained(self._path):
            return super().write(data)


def _resolve(path: Path) -> tuple[Path, int | None]:
    """The file a path stands for, symbolic links followed as `open` does, and its permission bits if it exists.

    Raises OSError for what a rename would destroy but `open` would not: folders, devices, files that are read-only.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or pipe, which cannot be replaced as a whole")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file there is read-only")
    return Path(os.path.realpath(path)), stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can: the file itself is already whole and in place."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str], *, lasting: bool = True) -> Iterator[BinaryIO]:
    """A binary file (read and write, buffered) that becomes `path` when the block ends well.

    lasting: it survives a power cut, which takes time; without, a cut may leave a file of that name with less in it.
    If the block raises anything, KeyboardInterrupt included, the temporary file is removed and what was at `path`
    stays. A new file gets the permission bits `open` would give it, a replaced one keeps its own.

    Raises WriteError when the target cannot be written: no space, no permission, no folder, not a regular file.
    """
    named = Path(path)
    with _explained(named):
        target, mode = _resolve(named)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        raw = _Target(temporary, named)
    try:
        file = io.BufferedRandom(raw)
        try:
            yield file
            file.flush()
            if lasting:
                with _explained(named):
                    os.fsync(raw.fileno())
        finally:
            # Closing flushes once more; after a failed write that fails again and would hide the first reason.
            with suppress(OSError, CodewordError):
                file.close()
        with _explained(named):
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        _sync_folder(target.parent)


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if need be. Raises WriteError."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make folder {path}: {error.strerror or error}; name another place") from error
    return path
