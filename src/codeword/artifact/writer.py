"""Coded tensors, one after another, into an artifact. Payloads wait in a spool: memory holds one tensor at a time.

A leaf whose stream an earlier tensor has stored already is not stored again: it borrows that one. Small leaves that are
no codes (norms, biases, scales, codebooks) go into pools, one for each kind: what an adaptive coder learns of one
serves all, and none needs a length, a coder's state and a checksum of its own.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from typing import IO, TypeAlias

from codeword.artifact.coded import CodedLeaf, CodedTensor, sealed
from codeword.artifact.header_writer import encode_borrowed, encode_header, encode_pool, encode_pooled
from codeword.artifact.layout import BORROWING, MAX_POOL, MAX_POOLED, MAX_POOLS, PLAIN, POOLING, Place
from codeword.artifact.pools import Filling
from codeword.artifact.reader import Artifact
from codeword.coding import Codec
from codeword.coding.varint import Reader

_SPOOL_NBYTES = 1 << 24  # stays in memory up to this size, then moves to a temporary file
# Bytes of the shortest stream that is borrowed: two numbers to name it by may break the pattern that the header is
# deflated by, and take as much.
_WORTH_BORROWING = 9
_POOLED_ROLES = ("values", "scale", "offset", "codebook")
_Kind: TypeAlias = tuple[str, ...]


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
        self._open: dict[_Kind, Filling] = {}  # where the next leaf of a kind goes
        self._pools: list[Filling] = []
        self._spool: IO[bytes] = _Spool(max_size=_SPOOL_NBYTES)  # the artifact's from `finish` on

    def add(self, tensor: CodedTensor) -> int:
        """Append a tensor; returns its index in the header."""
        index = len(self._names)
        entries, streams, lent, pooled = [], [], {}, 0
        for at, leaf in enumerate(tensor.leaves):
            digest = _digest(leaf) if len(leaf.stream) >= _WORTH_BORROWING else None
            if digest is not None and digest in self._lenders:
                entries.append(encode_borrowed(leaf.dtype, leaf.dims, self._lenders[digest]))
                self._borrows = True
                continue
            if digest is not None:
                lent.setdefault(digest, Place(index, at))
            if (pool := self._pool(_kind(tensor.name, leaf), leaf)) is not None:
                entries.append(encode_pooled(leaf.dtype, leaf.dims, pool))
                pooled += 1
                continue
            entries.append(leaf.entry)
            streams.append(leaf.stream)
        self._lenders |= lent  # not before: a tensor borrows from earlier ones only
        self._names.append(tensor.name)
        self._trees.append(tensor.tree_of(entries))
        if pooled < len(entries):
            self._spool.write(sealed(streams))
        return index

    def finish(self, metadata: dict[str, str] | None = None) -> Artifact:
        """The artifact of all tensors added. The writer is done after this."""
        version = POOLING if self._pools else BORROWING if self._borrows else PLAIN
        coded = [pool.coded() for pool in self._pools]
        if coded:
            self._spool.write(sealed([stream for _, stream in coded]))
        pools = [encode_pool(codec, len(stream)) for codec, stream in coded]
        header = encode_header(self._names, self._trees, metadata or {}, version, pools)
        payload_nbytes = self._spool.tell()
        return Artifact(header, self._spool, payload_at=0, payload_nbytes=payload_nbytes, where="artifact")

    def _pool(self, kind: _Kind | None, leaf: CodedLeaf) -> int | None:
        """Puts a leaf into the pool of its kind; returns which that is, None if it goes into none."""
        if kind is None:
            return None
        pool = self._open.get(kind)
        if pool is None or pool.count + math.prod(leaf.dims) > MAX_POOL:
            if len(self._pools) == MAX_POOLS:
                return None
            pool = self._open[kind] = Filling(len(self._pools))
            self._pools.append(pool)
        pool.add(leaf)
        return pool.index


def _kind(name: str, leaf: CodedLeaf) -> _Kind | None:
    """What leaves of one pool have in common; None for a leaf that goes into none."""
    size = math.prod(leaf.dims)
    if leaf.role not in _POOLED_ROLES or not 0 < size <= MAX_POOLED:
        return None
    # "layer1.0.bn1.running_var": values of one tensor are like those of others whose name ends alike.
    ending = re.split(r"[^a-z]+", name.lower().rpartition(".")[2])[-1] if leaf.role == "values" else ""
    return leaf.role, leaf.dtype, ending, "single" if size == 1 else "constant" if _is_constant(leaf) else ""


def _is_constant(leaf: CodedLeaf) -> bool:
    """Whether all its values are one: those among others would only blur what there is to learn."""
    if leaf.codec is not Codec.PACKED:
        return False
    packed = Reader(leaf.stream, "leaf")
    packed.varint()
    return packed.byte() == 0  # the width


def _digest(leaf: CodedLeaf) -> bytes:
    """Equal for leaves that decode to the same array from the same stream, and for no others."""
    kind = f"{leaf.dtype} {leaf.dims} {int(leaf.codec)} ".encode()
    return hashlib.sha256(kind + leaf.stream).digest()
