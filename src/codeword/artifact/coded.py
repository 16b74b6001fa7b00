"""One tensor, coded: what a worker returns and the writer lays down."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from codeword.artifact.header_writer import encode_nodes, encode_own, encode_start, encode_tied
from codeword.coding import Codec, encode_leaf
from codeword.errors import ExprError
from codeword.expr import DTYPES, Expr, Reshape, dtype_name, fits_dtype, leaves, result_dtype, shape


class CodedLeaf(NamedTuple):
    """A leaf as its tensor would store it alone."""

    dtype: str
    dims: tuple[int, ...]
    codec: Codec
    stream: bytes
    role: str  # in its expression: the last word of its path

    @property
    def entry(self) -> bytes:
        """Its part of the tree."""
        return encode_own(self.dtype, self.dims, self.codec, len(self.stream))


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor's part of the header, cut where the entries of its leaves stand, and its leaves; a tied one has none."""

    name: str
    parts: tuple[bytes, ...]
    leaves: tuple[CodedLeaf, ...] = ()

    @property
    def tree(self) -> bytes:
        """Its part of the header if it borrows nothing."""
        return self.tree_of([leaf.entry for leaf in self.leaves])

    def tree_of(self, entries: Sequence[bytes]) -> bytes:
        """Its part of the header with these entries of its leaves."""
        return self.parts[0] + b"".join(map(bytes.__add__, entries, self.parts[1:]))

    @property
    def payload(self) -> bytes:
        """Its part of the payload if it borrows nothing."""
        return sealed([leaf.stream for leaf in self.leaves]) if self.leaves else b""

    @property
    def nbytes(self) -> int:
        """Bytes of that payload, checksum included."""
        return len(self.payload)


def sealed(streams: Sequence[bytes]) -> bytes:
    """The streams of a tensor and their checksum."""
    data = b"".join(streams)
    return data + struct.pack("<I", zlib.crc32(data))


def code_tensor(name: str, dtype: str, dims: tuple[int, ...], expr: Expr) -> CodedTensor:
    """Code the leaves of an expression for a tensor of this dtype and shape. A pure function: no clock, no randomness.

    Raises ExprError if the expression has another number of elements than the tensor, or a dtype that does not fit it.
    """
    if dtype not in DTYPES:
        raise ExprError(f"{name}: dtype {dtype} cannot be stored; the format knows {', '.join(DTYPES)}")
    if isinstance(expr, Reshape) and expr.shape == dims:
        expr = expr.inner  # the reader gives every expression its tensor's shape: no need to say it twice
    if math.prod(shape(expr)) != math.prod(dims):
        raise ExprError(f"{name}: an expression of shape {shape(expr)} for a tensor of shape {dims}")
    if not fits_dtype(expr, DTYPES[dtype]):
        raise ExprError(f"{name}: an expression of {result_dtype(expr)} for a tensor of {dtype}")
    first, *rest = encode_nodes(expr)
    coded = (
        CodedLeaf(dtype_name(array.dtype), array.shape, *encode_leaf(array), path.rpartition(".")[2])
        for path, array in leaves(expr)
    )
    return CodedTensor(name, (encode_start(dtype, dims) + first, *rest), tuple(coded))


def tied_tensor(name: str, dtype: str, dims: tuple[int, ...], target: int) -> CodedTensor:
    """A second name for the tensor of header index `target`."""
    return CodedTensor(name, (encode_start(dtype, dims) + encode_tied(target),))
