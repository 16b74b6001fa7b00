"""Pools: small leaves of several tensors in one stream, all values one after another, or leaf by leaf if shorter."""

from __future__ import annotations

import numpy as np

from codeword.artifact.coded import CodedLeaf
from codeword.artifact.layout import Pool
from codeword.coding import Codec, decode_leaf, encode_leaf
from codeword.coding.codecs import read_codec
from codeword.coding.varint import Reader, put_varint
from codeword.expr import DTYPES


class Filling:
    """A pool while leaves, all of one dtype, are put into it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.count = 0  # values
        self._arrays: list[np.ndarray] = []
        self._apart: list[bytes] = []

    def add(self, leaf: CodedLeaf) -> None:
        """Append a leaf."""
        self._arrays.append(decode_leaf(leaf.codec, leaf.stream, DTYPES[leaf.dtype], leaf.dims).reshape(-1))
        self._apart.append(bytes([leaf.codec]) + put_varint(len(leaf.stream)) + leaf.stream)
        self.count += self._arrays[-1].size

    def coded(self) -> tuple[Codec | None, bytes]:
        """The codec of all values together and their stream, or None and the leaves' own ones if those are shorter."""
        together, apart = encode_leaf(np.concatenate(self._arrays), spaced=True), b"".join(self._apart)
        return together if len(together[1]) <= len(apart) else (None, apart)


def decode_pool(pool: Pool, stream: bytes, where: str) -> np.ndarray:
    """All values of a pool. Raises FormatError if the stream is not exactly one coding of them."""
    dtype = DTYPES[pool.dtype]
    if pool.codec is not None:
        return decode_leaf(pool.codec, stream, dtype, (sum(pool.sizes),), where, spaced=True)
    reader, found = Reader(stream, where), []
    for size in pool.sizes:
        codec = read_codec(reader)
        found.append(decode_leaf(codec, reader.take(reader.varint()), dtype, (size,), where))
    reader.finish()
    return np.concatenate(found)
