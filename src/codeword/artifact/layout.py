"""The header of a .cw file to and from bytes. docs/design/format.md is the normative text.

    magic 8 | version 1 | header length 4 | CRC-32 4 | header (deflated) | payload

The CRC covers the version, the length and the deflated header. The payload holds, for each tensor in header order, its
leaves' streams in the order of the tree and a CRC-32 of them; lengths stand in the header, offsets follow from them.
Version 2 is version 1 and borrowed leaves: the stream of an equal leaf of an earlier tensor stands for theirs.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from codeword.coding import Codec
from codeword.coding.varint import Reader, put_varint
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
    dense_nbytes,
    fits_dtype,
    leaves,
    result_dtype,
    shape,
)

# As PNG's: a byte above 127, CR LF, ctrl-Z, LF: what a text-mode transfer breaks, breaks here first.
MAGIC = b"\x89CW\r\n\x1a\n\x00"
PLAIN, BORROWING = VERSIONS = (1, 2)
_FIXED = struct.Struct("<BI")  # version, header length
PREFIX_NBYTES = len(MAGIC) + _FIXED.size + 4
CRC_NBYTES = 4  # of each tensor, behind its streams

# Caps on what a header may claim, checked before anything is allocated.
MAX_HEADER = 1 << 22
MAX_NAME = 1 << 10
MAX_METADATA = 1 << 16
MAX_RANK = 15
MAX_ELEMENTS = 1 << 40
MAX_DEPTH = 8
MAX_TERMS = 16
MAX_LEAVES = 256

_DTYPES = tuple(DTYPES)  # the index is the tag in the file: only ever append to expr.DTYPES
_RAW, _LOOKUP, _AFFINE, _SUM, _SCATTER, _PERMUTE, _RESHAPE, _TIED = range(8)
_CODECS = frozenset(map(int, Codec))
_BORROWED = 5  # where a leaf's codec stands


class Place(NamedTuple):
    """Where a leaf stands: the tensor, and the number of the leaf in the order of its tree."""

    tensor: int
    leaf: int


@dataclass(frozen=True, slots=True)
class LeafInfo:
    """How one leaf is stored."""

    path: str  # in the expression
    dtype: str
    shape: tuple[int, ...]
    codec: Codec  # of the lender, if borrowed
    nbytes: int  # of its stream in its tensor's payload; 0 if borrowed
    lender: Place | None = None  # whose stream this leaf borrows


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, as the header tells it; nothing of the payload is read for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    # The expression over leaves of the right dtype and shape that hold no data; None if tied.
    skeleton: Expr | None = field(repr=False)
    leaves: tuple[LeafInfo, ...]
    tied_to: str | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its streams and their checksum in the file; 0 if tied."""
        return sum(leaf.nbytes for leaf in self.leaves) + (CRC_NBYTES if self.tied_to is None else 0)

    @property
    def dense_nbytes(self) -> int:
        """Bytes uncompressed, as `expr.dense_nbytes` counts; 0 if tied."""
        return dense_nbytes(self.dtype, self.size) if self.tied_to is None else 0


def encode_nodes(expr: Expr) -> tuple[bytes, ...]:
    """The expression's nodes, cut where a leaf's entry stands: one part more than leaves, in the order of `leaves`."""
    parts = [bytearray()]

    def leaf() -> None:
        parts.append(bytearray())

    def node(expr: Expr) -> None:
        match expr:
            case Raw():
                parts[-1].append(_RAW)
                leaf()
            case Lookup():
                parts[-1].append(_LOOKUP)
                leaf()
                leaf()
            case Affine(inner, scale, offset):
                parts[-1].extend((_AFFINE, (scale is not None) | (offset is not None) << 1))
                node(inner)
                for array in (scale, offset):
                    if array is not None:
                        leaf()
            case Sum(terms):
                if len(terms) > MAX_TERMS:
                    raise ExprError(f"a sum of {len(terms)} terms; the format holds at most {MAX_TERMS}")
                parts[-1].extend((_SUM, len(terms)))
                for term in terms:
                    node(term)
            case Scatter(size, _, inner):
                parts[-1].extend(bytes([_SCATTER]) + put_varint(size))
                leaf()
                node(inner)
            case Permute(inner, order):
                parts[-1].extend(bytes([_PERMUTE]) + _dims(order))
                node(inner)
            case Reshape(inner, new):
                parts[-1].extend(bytes([_RESHAPE]) + _dims(new))
                node(inner)

    node(expr)
    return tuple(map(bytes, parts))


def encode_own(dtype: str, dims: tuple[int, ...], codec: Codec, nbytes: int) -> bytes:
    """The entry of a leaf whose stream of that many bytes is in its tensor's payload."""
    return bytes([_DTYPES.index(dtype) | codec << 4]) + _dims(dims) + put_varint(nbytes)


def encode_borrowed(dtype: str, dims: tuple[int, ...], lender: Place) -> bytes:
    """The entry of a leaf whose stream is another's."""
    return bytes([_DTYPES.index(dtype) | _BORROWED << 4]) + _dims(dims) + b"".join(map(put_varint, lender))


def encode_start(dtype: str, dims: tuple[int, ...]) -> bytes:
    """What stands before a tensor's tree: dtype and rank in one byte, then the dimensions."""
    if len(dims) > MAX_RANK:
        raise ExprError(f"{len(dims)} dimensions; the format holds at most {MAX_RANK}")
    return bytes([_DTYPES.index(dtype) | len(dims) << 4]) + b"".join(map(put_varint, dims))


def encode_tied(target: int) -> bytes:
    """The tree of a tensor that is the tensor of header index `target`."""
    return bytes([_TIED]) + put_varint(target)


def encode_header(names: Sequence[str], trees: Sequence[bytes], metadata: dict[str, str], version: int) -> bytes:
    """Magic, version, length, CRC and deflated header. `trees[i]` is start and tree of tensor `names[i]`."""
    extra = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode() if metadata else b""
    if len(extra) > MAX_METADATA:
        raise FormatError(f"metadata takes {len(extra)} bytes; the format holds at most {MAX_METADATA}")
    for name in names:
        if not name or len(name.encode(errors="replace")) > MAX_NAME or "\0" in name:
            raise FormatError(f"tensor name {name[:80]!r} must have 1 to {MAX_NAME} bytes and no zero byte")
    try:
        listed = b"".join(name.encode() + b"\0" for name in names)
    except UnicodeEncodeError as error:
        raise FormatError(f"a tensor name is not Unicode text: {error}") from None
    plain = put_varint(len(names)) + listed + b"".join(trees) + extra
    if len(plain) > MAX_HEADER:
        raise FormatError(f"the header takes {len(plain)} bytes; the format holds at most {MAX_HEADER}")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    header = deflate.compress(plain) + deflate.flush()
    fixed = _FIXED.pack(version, len(header))
    return MAGIC + fixed + struct.pack("<I", zlib.crc32(fixed + header)) + header


def header_nbytes(prefix: bytes, where: str) -> int:
    """Bytes of the deflated header, from the first PREFIX_NBYTES bytes of a file."""
    if not prefix:
        raise FormatError(f"{where}: the file is empty")
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)]:
        raise FormatError(f"{where}: not a .cw file (it begins with {prefix[:8]!r}); `codeword compress` makes one")
    if len(prefix) < PREFIX_NBYTES:
        raise FormatError(f"{where}: truncated: {len(prefix)} bytes, a .cw file begins with {PREFIX_NBYTES}")
    version, length = _FIXED.unpack_from(prefix, len(MAGIC))
    if version not in VERSIONS:
        raise FormatError(f"{where}: format version {version}; this Codeword reads versions "
                          f"{' and '.join(map(str, VERSIONS))} (upgrade, or the file is corrupted)")  # fmt: skip
    if length > MAX_HEADER:
        raise FormatError(f"{where}: a header of {length} bytes; at most {MAX_HEADER} are allowed")
    return length


def decode_header(prefix: bytes, deflated: bytes, where: str) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Entries and metadata of a header. Raises FormatError naming the file and the tensor's path."""
    fixed = prefix[len(MAGIC) : len(MAGIC) + _FIXED.size]
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


def _parse(reader: Reader, version: int) -> tuple[tuple[Entry, ...], dict[str, str]]:
    where = reader.where
    count = reader.varint()
    if count > reader.left:  # a name takes two bytes at least: no list is made longer than the header itself
        raise FormatError(f"{where}: {count} tensors in a header of {reader.left} bytes")
    names = [_name(reader) for _ in range(count)]
    if len(set(names)) != count:
        raise FormatError(f"{where}: a tensor name stands twice")
    entries: list[Entry] = []
    for name in names:
        reader.where = f"{where}: tensor {name!r}"
        entries.append(_entry(name, reader, version, entries))
    reader.where = f"{where}: metadata"
    return tuple(entries), _metadata(reader)


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


def _entry(name: str, reader: Reader, version: int, before: list[Entry]) -> Entry:
    tag = reader.byte()
    dtype, dims = _dtype(tag & 15, reader), _read_dims(reader, tag >> 4)
    if reader.data[reader.at : reader.at + 1] == bytes([_TIED]):
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
    tree = _Tree(reader, version, before)
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

    def __init__(self, reader: Reader, version: int, before: Sequence[Entry]) -> None:
        self.infos: list[LeafInfo] = []  # paths are not known while reading
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
        borrowed = codec == _BORROWED and self._version >= BORROWING
        if not borrowed and codec not in _CODECS:
            raise FormatError(f"{reader.where}: codec {codec} is unknown to version {self._version}")
        dims = _read_dims(reader, reader.varint())
        if borrowed:
            lender = Place(reader.varint(), reader.varint())
            self.infos.append(LeafInfo("", dtype, dims, self._lent(lender, dtype, dims), 0, lender))
        else:
            self.infos.append(LeafInfo("", dtype, dims, Codec(codec), reader.varint()))
        if len(self.infos) > MAX_LEAVES:
            raise FormatError(f"{reader.where}: more than {MAX_LEAVES} leaves")
        return np.broadcast_to(np.zeros((), DTYPES[dtype]), dims)

    def _lent(self, lender: Place, dtype: str, dims: tuple[int, ...]) -> Codec:
        """The codec of the stream that a leaf of this dtype and shape borrows."""
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


def _dims(dims: Sequence[int]) -> bytes:
    return put_varint(len(dims)) + b"".join(map(put_varint, dims))


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
    if tag >= len(_DTYPES):
        raise FormatError(f"{reader.where}: dtype {tag} is unknown to versions up to {VERSIONS[-1]}")
    return _DTYPES[tag]
