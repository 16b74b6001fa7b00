"""A header to bytes, piece by piece."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence

from codeword.artifact.layout import (
    AFFINE,
    APART,
    BORROWED,
    FIXED,
    LOOKUP,
    MAGIC,
    MAX_HEADER,
    MAX_METADATA,
    MAX_NAME,
    MAX_RANK,
    MAX_TERMS,
    PERMUTE,
    POOLED,
    POOLING,
    RAW,
    RESHAPE,
    SCATTER,
    SUM,
    TAGS,
    TIED,
    Place,
)
from codeword.coding import Codec
from codeword.coding.varint import put_varint
from codeword.errors import ExprError, FormatError
from codeword.expr import Affine, Expr, Lookup, Permute, Raw, Reshape, Scatter, Sum


def encode_nodes(expr: Expr) -> tuple[bytes, ...]:
    """The expression's nodes, cut where a leaf's entry stands: one part more than leaves, in the order of `leaves`."""
    parts = [bytearray()]

    def leaf() -> None:
        parts.append(bytearray())

    def node(expr: Expr) -> None:
        match expr:
            case Raw():
                parts[-1].append(RAW)
                leaf()
            case Lookup():
                parts[-1].append(LOOKUP)
                leaf()
                leaf()
            case Affine(inner, scale, offset):
                parts[-1].extend((AFFINE, (scale is not None) | (offset is not None) << 1))
                node(inner)
                for array in (scale, offset):
                    if array is not None:
                        leaf()
            case Sum(terms):
                if len(terms) > MAX_TERMS:
                    raise ExprError(f"a sum of {len(terms)} terms; the format holds at most {MAX_TERMS}")
                parts[-1].extend((SUM, len(terms)))
                for term in terms:
                    node(term)
            case Scatter(size, _, inner):
                parts[-1].extend(bytes([SCATTER]) + put_varint(size))
                leaf()
                node(inner)
            case Permute(inner, order):
                parts[-1].extend(bytes([PERMUTE]) + _dims(order))
                node(inner)
            case Reshape(inner, new):
                parts[-1].extend(bytes([RESHAPE]) + _dims(new))
                node(inner)

    node(expr)
    return tuple(map(bytes, parts))


def encode_own(dtype: str, dims: tuple[int, ...], codec: Codec, nbytes: int) -> bytes:
    """The entry of a leaf whose stream of that many bytes is in its tensor's payload."""
    return bytes([TAGS.index(dtype) | codec << 4]) + _dims(dims) + put_varint(nbytes)


def encode_borrowed(dtype: str, dims: tuple[int, ...], lender: Place) -> bytes:
    """The entry of a leaf whose stream is another's."""
    return bytes([TAGS.index(dtype) | BORROWED << 4]) + _dims(dims) + b"".join(map(put_varint, lender))


def encode_pooled(dtype: str, dims: tuple[int, ...], pool: int) -> bytes:
    """The entry of a leaf whose values are the next of that pool."""
    return bytes([TAGS.index(dtype) | POOLED << 4]) + _dims(dims) + put_varint(pool)


def encode_pool(codec: Codec | None, nbytes: int) -> bytes:
    """The entry of a pool; codec None: of leaves that are coded one by one."""
    return bytes([APART if codec is None else codec]) + put_varint(nbytes)


def encode_start(dtype: str, dims: tuple[int, ...]) -> bytes:
    """What stands before a tensor's tree: dtype and rank in one byte, then the dimensions."""
    if len(dims) > MAX_RANK:
        raise ExprError(f"{len(dims)} dimensions; the format holds at most {MAX_RANK}")
    return bytes([TAGS.index(dtype) | len(dims) << 4]) + b"".join(map(put_varint, dims))


def encode_tied(target: int) -> bytes:
    """The tree of a tensor that is the tensor of header index `target`."""
    return bytes([TIED]) + put_varint(target)


def encode_header(
    names: Sequence[str],
    trees: Sequence[bytes],
    metadata: dict[str, str],
    version: int,
    pools: Sequence[bytes] = (),
) -> bytes:
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
    listed_pools = put_varint(len(pools)) + b"".join(pools) if version >= POOLING else b""
    plain = put_varint(len(names)) + listed + b"".join(trees) + listed_pools + extra
    if len(plain) > MAX_HEADER:
        raise FormatError(f"the header takes {len(plain)} bytes; the format holds at most {MAX_HEADER}")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    header = deflate.compress(plain) + deflate.flush()
    fixed = FIXED.pack(version, len(header))
    return MAGIC + fixed + struct.pack("<I", zlib.crc32(fixed + header)) + header


def _dims(dims: Sequence[int]) -> bytes:
    return put_varint(len(dims)) + b"".join(map(put_varint, dims))
