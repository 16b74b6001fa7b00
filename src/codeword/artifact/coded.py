"""One tensor, coded: what a worker returns and the writer lays down."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

from codeword.artifact.layout import encode_start, encode_tied, encode_tree
from codeword.coding import encode_leaf
from codeword.errors import ExprError
from codeword.expr import DTYPES, Expr, Reshape, fits_dtype, leaves, result_dtype, shape


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor's part of the header and its part of the payload."""

    name: str
    tree: bytes
    payload: bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the payload, checksum included."""
        return len(self.payload)


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
    coded = [encode_leaf(array) for _, array in leaves(expr)]
    streams = b"".join(data for _, data in coded)
    checksum = struct.pack("<I", zlib.crc32(streams))
    return CodedTensor(name, encode_start(dtype, dims) + encode_tree(expr, coded), streams + checksum)


def tied_tensor(name: str, dtype: str, dims: tuple[int, ...], target: int) -> CodedTensor:
    """A second name for the tensor of header index `target`."""
    return CodedTensor(name, encode_start(dtype, dims) + encode_tied(target), b"")
