"""A header from bytes, which nobody has to trust: every number is checked against a cap before it is used."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from codeword.artifact.layout import (
    APART,
    BORROWED,
    BORROWING,
    CODECS,
    FIXED,
    IN_POOLS,
    MAGIC,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_HEADER,
    MAX_LEAVES,
    MAX_METADATA,
    MAX_NAME,
    MAX_POOL,
    MAX_POOLED,
    MAX_POOLS,
    MAX_RANK,
    MAX_TERMS,
    POOLED,
    POOLING,
    PREFIX_NBYTES,
    TAGS,
    TIED,
    VERSIONS,
    Entry,
    LeafInfo,
    Place,
    Pool,
    Stretch,
)
from codeword.coding import Codec
from codeword.coding.varint import Reader
from codeword.errors import ExprError, FormatError
from codeword.expr import (
    DTYPES,
    Affine,
    Expr,
    Lookup,
    Permute,
    Raw,
    Reshape,
    Scatter,
    Sum,
    fits_dtype,
    leaves,
    result_dtype,
    shape,
)


def header_nbytes(prefix: bytes, where: str) -> int:
    """Bytes of the deflated header, from the first PREFIX_NBYTES bytes of a file."""
    if not prefix:
        raise FormatError(f"{where}: the file is empty")
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)]:
        raise FormatError(f"{where}: not a .cw file (it begins with {prefix[:8]!r}); `codeword compress` makes one")
    if len(prefix) < PREFIX_NBYTES:
        raise FormatError(f"{where}: truncated: {len(prefix)} bytes, a .cw file begins with {PREFIX_NBYTES}")
    version, length = FIXED.unpack_from(prefix, len(MAGIC))
    if version not in VERSIONS:
        raise FormatError(f"{where}: format version {version}; this Codeword reads versions "
                          f"{', '.join(map(str, VERSIONS))} (upgrade, or the file is corrupted)")  # fmt: skip
    if length > MAX_HEADER:
        raise FormatError(f"{where}: a header of {length} bytes; at most {MAX_HEADER} are allowed")
    return length


class Header(NamedTuple):
    """What a header says."""

    entries: tuple[Entry, ...]
    pools: tuple[Pool, ...]
    metadata: dict[str, str]


def decode_header(prefix: bytes, deflated: bytes, where: str) -> Header:
    """Reads a header. Raises FormatError naming the file and the tensor's path."""
    fixed = prefix[len(MAGIC) : len(MAGIC) + FIXED.size]
    (crc,) = struct.unpack("<I", prefix[-4:])
    if zlib.crc32(fixed + deflated) != crc:
        raise FormatError(f"{where}: the header's checksum does not match: the file is corrupted; get it again")
    inflate = zlib.decompressobj(-15)
    try:
        plain = inflate.decompress(deflated, MAX_HEADER)
    except zlib.error as error:
        raise FormatError(f"{where}: the header does not inflate: {error}") from None
    if not inflate.eof or inflate.unused_data:
        raise FormatError(f"{where}: the header does not end where it must")
    return _parse(Reader(plain, where), fixed[0])


def _parse(reader: Reader, version: int) -> Header:
    where = reader.where
    count = reader.varint()
    if count > reader.left:  # a name takes two bytes at least: no list is made longer than the header itself
        raise FormatError(f"{where}: {count} tensors in a header of {reader.left} bytes")
    names = [_name(reader) for _ in range(count)]
    if len(set(names)) != count:
        raise FormatError(f"{where}: a tensor name stands twice")
    entries: list[Entry] = []
    filled: list[_Filling] = []
    for name in names:
        reader.where = f"{where}: tensor {name!r}"
        entries.append(_entry(name, reader, version, entries, filled))
    pools: tuple[Pool, ...] = ()
    if version >= POOLING:
        reader.where = f"{where}: pools"
        pools = _pools(reader, filled)
        entries = [_with_shares(entry, pools) for entry in entries]
    reader.where = f"{where}: metadata"
    return Header(tuple(entries), pools, _metadata(reader))


@dataclass(slots=True)
class _Filling:
    """A pool while its leaves are read."""

    dtype: str
    sizes: list[int] = field(default_factory=list)
    count: int = 0  # values


def _pools(reader: Reader, filled: Sequence[_Filling]) -> tuple[Pool, ...]:
    count = reader.varint()
    if count != len(filled):
        raise FormatError(f"{reader.where}: {count} of them, but tensors have leaves in {len(filled)}")
    pools = []
    for filling in filled:
        codec = reader.byte()
        if codec != APART and codec not in IN_POOLS:
            raise FormatError(f"{reader.where}: codec {codec} is unknown")
        known = None if codec == APART else Codec(codec)
        pools.append(Pool(filling.dtype, tuple(filling.sizes), known, reader.varint()))
    return tuple(pools)


def _with_shares(entry: Entry, pools: Sequence[Pool]) -> Entry:
    """The entry with what its pooled leaves take of their pools: by values, and so that all shares make up a pool."""

    def shared(leaf: LeafInfo) -> LeafInfo:
        if leaf.pooled is None:
            return leaf
        pool, start = pools[leaf.pooled.pool], leaf.pooled.start
        total = max(sum(pool.sizes), 1)
        end = start + math.prod(leaf.shape)
        return replace(leaf, nbytes=pool.nbytes * end // total - pool.nbytes * start // total)

    if all(leaf.pooled is None for leaf in entry.leaves):
        return entry
    return replace(entry, leaves=tuple(map(shared, entry.leaves)))


def _name(reader: Reader) -> str:
    end = reader.data.find(b"\0", reader.at, reader.at + MAX_NAME + 1)
    if end <= reader.at:
        raise FormatError(f"{reader.where}: no valid tensor name at byte {reader.at} of the header")
    raw = reader.take(end - reader.at)
    reader.take(1)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{reader.where}: tensor name {raw[:80]!r} is not UTF-8") from None


def _metadata(reader: Reader) -> dict[str, str]:
    if not reader.left:
        return {}
    if reader.left > MAX_METADATA:
        raise FormatError(f"{reader.where}: {reader.left} bytes; at most {MAX_METADATA} are allowed")
    try:
        found = json.loads(reader.rest().decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{reader.where}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{reader.where}: must map names to strings")
    return found


def _entry(name: str, reader: Reader, version: int, before: list[Entry], filled: list[_Filling]) -> Entry:
    tag = reader.byte()
    dtype, dims = _dtype(tag & 15, reader), _read_dims(reader, tag >> 4)
    if reader.data[reader.at : reader.at + 1] == bytes([TIED]):
        reader.byte()
        index = reader.varint()
        if index >= len(before) or before[index].tied_to is not None:
            raise FormatError(
                f"{reader.where}: tied to tensor {index}, which does not come before it or is tied itself"
            )
        if math.prod(dims) != before[index].size:
            raise FormatError(f"{reader.where}: shape {dims} tied to {before[index].name!r} of {before[index].shape}")
        if dtype != before[index].dtype:
            raise FormatError(f"{reader.where}: {dtype} tied to {before[index].name!r} of {before[index].dtype}")
        return Entry(name, dtype, dims, None, (), before[index].name)
    tree = _Tree(reader, version, before, filled)
    try:
        skeleton = tree.node(0)
    except ExprError as error:
        raise FormatError(f"{reader.where}: {error}") from None
    if math.prod(shape(skeleton)) != math.prod(dims):
        raise FormatError(f"{reader.where}: an expression of shape {shape(skeleton)} for a tensor of shape {dims}")
    if not fits_dtype(skeleton, DTYPES[dtype]):
        raise FormatError(f"{reader.where}: an expression of {result_dtype(skeleton)} for a tensor of {dtype}")
    stored = tuple(replace(info, path=path) for (path, _), info in zip(leaves(skeleton), tree.infos, strict=True))
    return Entry(name, dtype, dims, skeleton, stored)


class _Tree:
    """Reads the nodes of one tensor; leaves become zero-stride arrays, which have a shape and a dtype but no memory."""

    def __init__(self, reader: Reader, version: int, before: Sequence[Entry], filled: list[_Filling]) -> None:
        self.infos: list[LeafInfo] = []  # paths are not known while reading
        self._filled = filled
        self._reader = reader
        self._version = version
        self._before = before

    def node(self, depth: int) -> Expr:
        """The next node with all that it holds."""
        reader = self._reader
        if depth > MAX_DEPTH:
            raise FormatError(f"{reader.where}: an expression deeper than {MAX_DEPTH}")
        match tag := reader.byte():
            case 0:
                return Raw(self._leaf())
            case 1:
                codes = self._leaf()
                lookup = Lookup(codes, self._leaf())
                _check_elements(shape(lookup), reader)
                return lookup
            case 2:
                flags, inner = reader.byte(), self.node(depth + 1)
                if flags > 3:
                    raise FormatError(f"{reader.where}: affine flags {flags} are unknown to version {self._version}")
                scale = self._leaf() if flags & 1 else None
                return Affine(inner, scale, self._leaf() if flags & 2 else None)
            case 3:
                count = reader.byte()
                if count > MAX_TERMS:
                    raise FormatError(f"{reader.where}: a sum of {count} terms; at most {MAX_TERMS} are allowed")
                return Sum(tuple(self.node(depth + 1) for _ in range(count)))
            case 4:
                size = reader.varint()
                if size > MAX_ELEMENTS:
                    raise FormatError(
                        f"{reader.where}: a scatter over {size} places; at most {MAX_ELEMENTS} are allowed"
                    )
                positions = self._leaf()
                return Scatter(size, positions, self.node(depth + 1))
            case 5:
                order = _read_dims(reader, reader.varint(), bounded=False)
                return Permute(self.node(depth + 1), order)
            case 6:
                new = _read_dims(reader, reader.varint())
                return Reshape(self.node(depth + 1), new)
            case _:
                raise FormatError(f"{reader.where}: node {tag} is unknown to version {self._version}")

    def _leaf(self) -> np.ndarray:
        reader = self._reader
        tag = reader.byte()
        dtype, codec = _dtype(tag & 15, reader), tag >> 4
        borrowed = codec == BORROWED and self._version >= BORROWING
        pooled = codec == POOLED and self._version >= POOLING
        if not borrowed and not pooled and codec not in CODECS:
            raise FormatError(f"{reader.where}: codec {codec} is unknown to version {self._version}")
        dims = _read_dims(reader, reader.varint())
        if borrowed:
            lender = Place(reader.varint(), reader.varint())
            self.infos.append(LeafInfo("", dtype, dims, self._lent(lender, dtype, dims), 0, lender))
        elif pooled:
            self.infos.append(LeafInfo("", dtype, dims, None, 0, pooled=self._pooled(reader.varint(), dtype, dims)))
        else:
            self.infos.append(LeafInfo("", dtype, dims, Codec(codec), reader.varint()))
        if len(self.infos) > MAX_LEAVES:
            raise FormatError(f"{reader.where}: more than {MAX_LEAVES} leaves")
        return np.broadcast_to(np.zeros((), DTYPES[dtype]), dims)

    def _pooled(self, index: int, dtype: str, dims: tuple[int, ...]) -> Stretch:
        """The next place in a pool for a leaf of this dtype and shape."""
        where, size = f"{self._reader.where}: pool {index}", math.prod(dims)
        if index > len(self._filled) or index >= MAX_POOLS:
            raise FormatError(f"{where} comes before pool {len(self._filled)}, or is beyond the {MAX_POOLS} allowed")
        if index == len(self._filled):
            self._filled.append(_Filling(dtype))
        filling = self._filled[index]
        if filling.dtype != dtype:
            raise FormatError(f"{where} holds {filling.dtype}, not {dtype}")
        start = filling.count
        if size > MAX_POOLED or start + size > MAX_POOL:
            raise FormatError(
                f"{where}: {size} values after {start}; a leaf may have {MAX_POOLED} there, all together {MAX_POOL}"
            )
        filling.sizes.append(size)
        filling.count += size
        return Stretch(index, start)

    def _lent(self, lender: Place, dtype: str, dims: tuple[int, ...]) -> Codec | None:
        """The codec of the stream that a leaf of this dtype and shape borrows; None of a pooled leaf."""
        where = f"{self._reader.where}: borrows leaf {lender.leaf} of tensor {lender.tensor}"
        if lender.tensor >= len(self._before) or self._before[lender.tensor].tied_to is not None:
            raise FormatError(f"{where}, which does not come before it or is tied")
        entry = self._before[lender.tensor]
        if lender.leaf >= len(entry.leaves):
            raise FormatError(f"{where}, but {entry.name!r} has {len(entry.leaves)} leaves")
        leaf = entry.leaves[lender.leaf]
        if leaf.lender is not None:
            raise FormatError(f"{where}, but {entry.name!r} has borrowed it itself")
        if (leaf.dtype, leaf.shape) != (dtype, dims):
            raise FormatError(f"{where} as {dtype} {dims}; in {entry.name!r} it is {leaf.dtype} {leaf.shape}")
        return leaf.codec


def _read_dims(reader: Reader, rank: int, *, bounded: bool = True) -> tuple[int, ...]:
    if rank > MAX_RANK:
        raise FormatError(f"{reader.where}: {rank} dimensions; at most {MAX_RANK} are allowed")
    dims = tuple(reader.varint() for _ in range(rank))
    if bounded:
        _check_elements(dims, reader)
    return dims


def _check_elements(dims: tuple[int, ...], reader: Reader) -> None:
    # Without zeros in the product: an empty tensor may not smuggle in a dimension that NumPy cannot hold.
    if math.prod(max(dim, 1) for dim in dims) > MAX_ELEMENTS:
        raise FormatError(f"{reader.where}: shape {dims} has more than {MAX_ELEMENTS} elements")


def _dtype(tag: int, reader: Reader) -> str:
    if tag >= len(TAGS):
        raise FormatError(f"{reader.where}: dtype {tag} is unknown to versions up to {VERSIONS[-1]}")
    return TAGS[tag]
