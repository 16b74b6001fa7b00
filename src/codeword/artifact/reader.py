"""An open .cw file: a lazy mapping from tensor names to expressions. Nothing is read until it is asked for."""

from __future__ import annotations

import math
import os
import shutil
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import IO

import numpy as np

from codeword.artifact.header_reader import decode_header, header_nbytes
from codeword.artifact.layout import CRC_NBYTES, PREFIX_NBYTES, Entry, LeafInfo, Place
from codeword.artifact.pools import decode_pool
from codeword.atomic import replacing
from codeword.coding import decode_leaf
from codeword.errors import FormatError
from codeword.expr import DTYPES, Expr, Reshape, decode, nbytes, shape, with_leaves

DEFAULT_MAX_TENSOR_NBYTES = 1 << 34
_KEPT_NBYTES = 1 << 24  # of decoded leaves and pools kept for those that borrow them or are to come
_CHUNK = 1 << 20


class Artifact(Mapping[str, Expr]):
    """A compressed net: `artifact[name]` is the tensor's expression, `decode(name)` the dense array.

    Every read of a tensor checks its CRC. `max_tensor_nbytes` caps what one tensor may take decoded, because a header
    of a few bytes can declare any size; raise it for tensors above 16 GiB.
    """

    def __init__(
        self,
        header: bytes,
        file: IO[bytes],
        *,
        payload_at: int,
        payload_nbytes: int,
        where: str,
        max_tensor_nbytes: int = DEFAULT_MAX_TENSOR_NBYTES,
    ) -> None:
        self._header = header
        self._file = file
        self._payload_at = payload_at
        self._where = where
        self._max_tensor_nbytes = max_tensor_nbytes
        self._lock = threading.Lock()  # seek and read are two steps
        # An artifact is used like a mapping, and who drops a mapping closes nothing.
        self._close = weakref.finalize(self, file.close)
        entries, self.pools, self.metadata = decode_header(header[:PREFIX_NBYTES], header[PREFIX_NBYTES:], where)
        self.entries: dict[str, Entry] = {entry.name: entry for entry in entries}
        self._offsets: dict[str, int] = {}
        offset = 0
        for entry in entries:
            self._offsets[entry.name] = offset
            offset += entry.stored_nbytes
        self._pools_at = list(accumulate((pool.nbytes for pool in self.pools), initial=offset))
        if self.pools:
            offset = self._pools_at[-1] + CRC_NBYTES
        self._order = entries
        self._index = {entry.name: index for index, entry in enumerate(entries)}
        self._lent: dict[Place, np.ndarray | None] = {  # leaves that others borrow; None until decoded, or if too large
            leaf.lender: None for entry in entries for leaf in entry.leaves if leaf.lender is not None
        }
        self._room = _KEPT_NBYTES
        self._pooled: dict[int, np.ndarray] = {}  # pools that are decoded
        self._pools_checked = False
        if offset != payload_nbytes:
            word = "truncated" if offset > payload_nbytes else "too long"
            raise FormatError(f"{where}: {word}: the header declares {offset} bytes of tensors, has {payload_nbytes}")
        self.nbytes = len(header) + payload_nbytes

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, max_tensor_nbytes: int = DEFAULT_MAX_TENSOR_NBYTES) -> Artifact:
        """Open a file; reads the header only. Raises FormatError if it is missing, truncated, corrupted or newer."""
        where = os.fspath(path)
        try:
            file = Path(path).open("rb")  # noqa: SIM115 - the artifact owns it until `close`
        except OSError as error:
            raise FormatError(
                f"{where}: cannot be read: {error.strerror}; check the path and its permissions"
            ) from None
        try:
            prefix = file.read(PREFIX_NBYTES)
            length = header_nbytes(prefix, where)
            header = prefix + file.read(length)
            if len(header) < PREFIX_NBYTES + length:
                raise FormatError(f"{where}: truncated inside the header")
            total = os.fstat(file.fileno()).st_size
            return cls(
                header,
                file,
                payload_at=len(header),
                payload_nbytes=total - len(header),
                where=where,
                max_tensor_nbytes=max_tensor_nbytes,
            )
        except BaseException:
            file.close()
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Expr:
        entry = self.entries[name]
        if entry.tied_to is not None:
            source = self[entry.tied_to]
            return source if shape(source) == entry.shape else Reshape(source, entry.shape)
        expr = self._read(entry)
        return expr if shape(expr) == entry.shape else Reshape(expr, entry.shape)

    def decode(self, name: str) -> np.ndarray:
        """The dense tensor, perhaps read-only, in the dtype and shape it came with. Raises KeyError, FormatError."""
        entry = self.entries[name]
        with np.errstate(over="ignore", invalid="ignore"):  # a float32 beyond float16 becomes infinity, as a cast does
            return decode(self[name]).astype(DTYPES[entry.dtype], copy=False)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the net uncompressed: 4 a floating value, tied tensors once."""
        return sum(entry.dense_nbytes for entry in self.entries.values())

    @property
    def ratio(self) -> float:
        """Bytes of the float32 weights over the bytes of the file."""
        return self.dense_nbytes / self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file, everything counted, over the number of values."""
        size = sum(entry.size for entry in self.entries.values() if entry.tied_to is None)
        return 8 * self.nbytes / max(size, 1)

    @property
    def container_nbytes(self) -> int:
        """Bytes that are no coded leaf: magic, header, names, checksums."""
        return self.nbytes - sum(leaf.nbytes for entry in self.entries.values() for leaf in entry.leaves)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: temporary file, fsync, atomic rename. Raises WriteError and leaves an old file as it was."""
        with replacing(path) as out, self._lock:
            out.write(self._header)
            self._file.seek(self._payload_at)
            shutil.copyfileobj(self._file, out, _CHUNK)

    def close(self) -> None:
        """Close the file; expressions already read stay valid."""
        self._close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Artifact({self._where!r}, {len(self)} tensors, {self.nbytes} bytes, {self.ratio:.1f}x)"

    def _read(self, entry: Entry) -> Expr:
        if entry.skeleton is None:
            raise FormatError(f"{self._where}: tensor {entry.name!r} has no expression of its own")
        where = f"{self._where}: tensor {entry.name!r}"
        declared = max(entry.size * 8, nbytes(entry.skeleton))
        if declared > self._max_tensor_nbytes:
            raise FormatError(
                f"{where}: may take {declared} bytes decoded, the limit is {self._max_tensor_nbytes}; "
                "if you trust the file, open it with a larger max_tensor_nbytes"
            )
        return with_leaves(entry.skeleton, self._leaves(entry, where))

    def _streams(self, entry: Entry) -> Iterator[bytes]:
        """The stream of each leaf, empty for borrowed and pooled ones, after a check of all together."""
        where, stored = f"{self._where}: tensor {entry.name!r}", entry.stored_nbytes
        stream = self._bytes(self._offsets[entry.name], stored, where)
        if stored:
            (checksum,) = struct.unpack("<I", stream[-CRC_NBYTES:])
            _check(zlib.crc32(memoryview(stream)[:-CRC_NBYTES]), checksum, where)
        at = 0
        for leaf in entry.leaves:
            yield stream[at : at + leaf.stored_nbytes]
            at += leaf.stored_nbytes

    def _bytes(self, offset: int, count: int, where: str) -> bytes:
        """Part of the payload."""
        with self._lock:
            self._file.seek(self._payload_at + offset)
            found = self._file.read(count)
        if len(found) != count:
            raise FormatError(f"{where}: truncated: {len(found)} of {count} bytes")
        return found

    def _leaves(self, entry: Entry, where: str) -> Iterator[np.ndarray]:
        index = self._index[entry.name]
        for at, (leaf, stream) in enumerate(zip(entry.leaves, self._streams(entry), strict=True)):
            place, stored = Place(index, at) if leaf.lender is None else leaf.lender, leaf
            array = self._lent.get(place)
            if array is None:
                if leaf.lender is not None:
                    lender = self._order[place.tensor]
                    stored = lender.leaves[place.leaf]
                    if stored.pooled is None:
                        stream = next(islice(self._streams(lender), place.leaf, None))
                array = self._array(stored, stream, f"{where}, {leaf.path}")
                if place in self._lent:
                    self._keep(place, array)
            yield array

    def _array(self, leaf: LeafInfo, stream: bytes, where: str) -> np.ndarray:
        """A leaf that stands in a pool, or in the stream."""
        if leaf.pooled is None and leaf.codec is not None:
            return decode_leaf(leaf.codec, stream, DTYPES[leaf.dtype], leaf.shape, where)
        if leaf.pooled is None:
            raise FormatError(f"{where}: neither coded nor pooled")  # pragma: no cover - layout makes no such leaf
        start = leaf.pooled.start
        return self._pool(leaf.pooled.pool)[start : start + math.prod(leaf.shape)].reshape(leaf.shape)

    def _pool(self, index: int) -> np.ndarray:
        """All values of a pool, read-only."""
        found = self._pooled.get(index)
        if found is None:
            pool, where = self.pools[index], f"{self._where}: pool {index}"
            self._check_pools()
            found = decode_pool(pool, self._bytes(self._pools_at[index], pool.nbytes, where), where)
            found.flags.writeable = False  # it is to be in several expressions
            with self._lock:
                if found.nbytes <= self._room:
                    self._room -= found.nbytes
                    self._pooled[index] = found
        return found

    def _check_pools(self) -> None:
        """Compare the checksum of all pools, once."""
        if self._pools_checked:
            return
        where, checksum = f"{self._where}: pools", 0
        first, last = self._pools_at[0], self._pools_at[-1]
        for at in range(first, last, _CHUNK):
            checksum = zlib.crc32(self._bytes(at, min(_CHUNK, last - at), where), checksum)
        (expected,) = struct.unpack("<I", self._bytes(last, CRC_NBYTES, where))
        _check(checksum, expected, where)
        self._pools_checked = True

    def _keep(self, place: Place, array: np.ndarray) -> None:
        """Keep a lent leaf, so that the lender is not read again for each that borrows from it."""
        with self._lock:
            if self._lent[place] is None and array.nbytes <= self._room:
                self._room -= array.nbytes
                array.flags.writeable = False  # it is to be in several expressions
                self._lent[place] = array


def _check(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise FormatError(f"{where}: the checksum does not match: the file is corrupted; get it again")
