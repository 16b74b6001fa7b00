"""Coded tensors, one after another, into an artifact. Payloads wait in a spool: memory holds one tensor at a time.

A leaf whose stream an earlier tensor has stored already is not stored again: it borrows that one.
"""

from __future__ import annotations

import hashlib
import tempfile
from typing import IO

from codeword.artifact.coded import CodedLeaf, CodedTensor, sealed
from codeword.artifact.layout import BORROWING, PLAIN, Place, encode_borrowed, encode_header
from codeword.artifact.reader import Artifact

_SPOOL_NBYTES = 1 << 24  # stays in memory up to this size, then moves to a temporary file
# Bytes of the shortest stream that is borrowed: two numbers to name it by may break the pattern that the header is
# deflated by, and take as much.
_WORTH_BORROWING = 9


class _Spool(tempfile.SpooledTemporaryFile):
    """Nobody has to close it: an artifact that was never saved is no mistake to warn of."""

    def __del__(self) -> None:
        self.close()


class Writer:
    """Takes coded tensors in file order; `finish` gives the artifact that `save` writes to disk."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._trees: list[bytes] = []
        self._lenders: dict[bytes, Place] = {}  # digest of a leaf -> where it is stored
        self._borrows = False
        self._spool: IO[bytes] = _Spool(max_size=_SPOOL_NBYTES)  # the artifact's from `finish` on

    def add(self, tensor: CodedTensor) -> int:
        """Append a tensor; returns its index in the header."""
        index = len(self._names)
        entries, streams, lent = [], [], {}
        for at, leaf in enumerate(tensor.leaves):
            digest = _digest(leaf) if len(leaf.stream) >= _WORTH_BORROWING else None
            if digest is not None and digest in self._lenders:
                entries.append(encode_borrowed(leaf.dtype, leaf.dims, self._lenders[digest]))
                continue
            if digest is not None:
                lent.setdefault(digest, Place(index, at))
            entries.append(leaf.entry)
            streams.append(leaf.stream)
        self._borrows |= len(streams) < len(entries)
        self._lenders |= lent  # not before: a tensor borrows from earlier ones only
        self._names.append(tensor.name)
        self._trees.append(tensor.tree_of(entries))
        if entries:
            self._spool.write(sealed(streams))
        return index

    def finish(self, metadata: dict[str, str] | None = None) -> Artifact:
        """The artifact of all tensors added. The writer is done after this."""
        header = encode_header(self._names, self._trees, metadata or {}, BORROWING if self._borrows else PLAIN)
        payload_nbytes = self._spool.tell()
        return Artifact(header, self._spool, payload_at=0, payload_nbytes=payload_nbytes, where="artifact")


def _digest(leaf: CodedLeaf) -> bytes:
    """Equal for leaves that decode to the same array from the same stream, and for no others."""
    kind = f"{leaf.dtype} {leaf.dims} {int(leaf.codec)} ".encode()
    return hashlib.sha256(kind + leaf.stream).digest()
