"""What stands in the header of a .cw file. docs/design/format.md is the normative text.

    magic 8 | version 1 | header length 4 | CRC-32 4 | header (deflated) | payload

The CRC covers the version, the length and the deflated header. The payload holds, for each tensor in header order, its
leaves' streams in the order of the tree and a CRC-32 of them; lengths stand in the header, offsets follow from them.
Version 2 is version 1 and borrowed leaves: the stream of an equal leaf of an earlier tensor stands for theirs.
Version 3 is version 2 and pooled leaves: small leaves of one kind, of all tensors, in one stream behind the tensors.
`header_writer` and `header_reader` turn it to bytes and back.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from codeword.coding import Codec
from codeword.expr import DTYPES, Expr, dense_nbytes

# As PNG's: a byte above 127, CR LF, ctrl-Z, LF: what a text-mode transfer breaks, breaks here first.
MAGIC = b"\x89CW\r\n\x1a\n\x00"
PLAIN, BORROWING, POOLING = VERSIONS = (1, 2, 3)
FIXED = struct.Struct("<BI")  # version, header length
PREFIX_NBYTES = len(MAGIC) + FIXED.size + 4
CRC_NBYTES = 4  # of each tensor, behind its streams, and of all pools, behind theirs

# Caps on what a header may claim, checked before anything is allocated.
MAX_HEADER = 1 << 22
MAX_NAME = 1 << 10
MAX_METADATA = 1 << 16
MAX_RANK = 15
MAX_ELEMENTS = 1 << 40
MAX_DEPTH = 8
MAX_TERMS = 16
MAX_LEAVES = 256
MAX_POOLED = 1 << 12  # values of a leaf
MAX_POOL = 1 << 20  # values of a pool
MAX_POOLS = 256

TAGS = tuple(DTYPES)  # the index is the tag in the file: only ever append to expr.DTYPES
RAW, LOOKUP, AFFINE, SUM, SCATTER, PERMUTE, RESHAPE, TIED = range(8)
IN_POOLS = frozenset(map(int, Codec))
CODECS = IN_POOLS - {int(Codec.SPACED)}
BORROWED, POOLED = 5, 6  # where a leaf's codec stands
APART = 7  # where a pool's codec stands: its leaves are coded one by one


class Place(NamedTuple):
    """Where a leaf stands: the tensor, and the number of the leaf in the order of its tree."""

    tensor: int
    leaf: int


class Stretch(NamedTuple):
    """Where a leaf stands in a pool: the pool, and how many values are before it there."""

    pool: int
    start: int


@dataclass(frozen=True, slots=True)
class LeafInfo:
    """How one leaf is stored."""

    path: str  # in the expression
    dtype: str
    shape: tuple[int, ...]
    codec: Codec | None  # of the lender, if borrowed; None in a pool
    nbytes: int  # of its stream in its tensor's payload, or its share of a pool's by values; 0 if borrowed
    lender: Place | None = None  # whose stream this leaf borrows
    pooled: Stretch | None = None

    @property
    def stored_nbytes(self) -> int:
        """Bytes of its own stream."""
        return 0 if self.pooled is not None else self.nbytes


@dataclass(frozen=True, slots=True)
class Pool:
    """Leaves of one dtype, of several tensors, in one stream."""

    dtype: str
    sizes: tuple[int, ...]  # values of each leaf, in header order
    codec: Codec | None  # of all values one after another; None: each leaf has a codec and a stream of its own
    nbytes: int


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
        """Bytes in the file: streams, their checksum, shares of pools; 0 if tied."""
        return self.stored_nbytes + sum(leaf.nbytes for leaf in self.leaves if leaf.pooled is not None)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of its streams and their checksum in the payload; a tensor of nothing but pooled leaves has none."""
        sealed = not self.leaves or any(leaf.pooled is None for leaf in self.leaves)
        checksum = CRC_NBYTES if self.tied_to is None and sealed else 0
        return sum(leaf.stored_nbytes for leaf in self.leaves) + checksum

    @property
    def dense_nbytes(self) -> int:
        """Bytes uncompressed, as `expr.dense_nbytes` counts; 0 if tied."""
        return dense_nbytes(self.dtype, self.size) if self.tied_to is None else 0
