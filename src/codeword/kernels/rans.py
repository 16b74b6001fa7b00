"""Interleaved rANS with an order-0 model that adapts from block to block, integers only.

The coder (Duda 2013) keeps `lanes` states of 32 bits. Symbol i belongs to lane i % lanes, all lanes share one stream of
16-bit words, so a vector unit decodes a row of lanes in one go. The model needs no tables in the stream: symbols come
in blocks, a block is coded with the counts of the blocks before it, and both sides count alike. Blocks double in size
up to 2**14, so a short leaf learns at once and a long one adapts for ever. When the counts pass `limit` they are
halved: a small limit follows statistics that drift along the tensor, a large one averages over all of it.

Everything is integer arithmetic, hence the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from codeword.errors import FormatError
from codeword.kernels import native

PRECISION = 14
MAX_ALPHABET = 1 << 12  # leaves three quarters of the 2**14 slots to the statistics
MAX_LANES = 1 << 12
_SLOTS = 1 << PRECISION
_LOWER = 1 << 16  # states live in [2**16, 2**32)
_FIRST_BLOCK = 32
_LAST_BLOCK = 1 << 14
_WEIGHT = 2  # of one occurrence against a prior count of 1: the Krichevsky-Trofimov half
# What a symbol of frequency f costs, in whole 2**-20 bits, so that a sum of them is the same in any order.
_BIT = 1 << 20
_PRICE = np.rint(_BIT * (PRECISION - np.log2(np.maximum(np.arange(_SLOTS + 1), 1)))).astype(np.int64)


def block_ends(n: int, lanes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block of n symbols; every block but the last is a multiple of `lanes`."""
    start, size = 0, max(_FIRST_BLOCK, lanes)
    while start < n:
        yield start, min(start + size, n)
        start += size
        size = min(max(size, start), _LAST_BLOCK)


class AdaptiveModel:
    """Counts of the symbols seen so far, and the frequencies they give the next block."""

    def __init__(self, alphabet: int, limit: int) -> None:
        self.counts = np.ones(alphabet, np.int64)
        self.limit = limit

    def frequencies(self) -> np.ndarray:
        """(alphabet,) int64, each at least 1, sum 2**PRECISION; what rounding leaves goes to the most frequent."""
        total = int(self.counts.sum())
        freq = 1 + self.counts * (_SLOTS - len(self.counts)) // total
        freq[np.argmax(self.counts)] += _SLOTS - int(freq.sum())
        return freq

    def update(self, symbols: np.ndarray) -> None:
        """Count one block."""
        self.counts += _WEIGHT * np.bincount(symbols, minlength=len(self.counts))
        while int(self.counts.sum()) > max(self.limit, 2 * len(self.counts)):
            self.counts = (self.counts + 1) >> 1


def adaptive_cost(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> float:
    """Bits that `rans_encode` spends on symbols (n,), to a fraction of a percent, the states not counted."""
    run = adaptive_cost_numpy if native.library() is None else _adaptive_cost_native
    return run(symbols, alphabet, lanes, limit)


def rans_encode(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Code symbols (n,), each below `alphabet`. Returns states (lanes,) uint32 and words (m,) uint16, as decoded."""
    run = rans_encode_numpy if native.library() is None else _rans_encode_native
    return run(symbols, alphabet, lanes, limit)


def rans_decode(
    states: np.ndarray, words: np.ndarray, n: int, alphabet: int, limit: int, dtype: np.dtype
) -> np.ndarray:
    """Inverse of `rans_encode`: (n,) symbols of `dtype`. FormatError unless the stream ends exactly where it must."""
    run = rans_decode_numpy if native.library() is None else _rans_decode_native
    return run(states, words, n, alphabet, limit, dtype)


def adaptive_cost_numpy(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> float:
    """Reference of `adaptive_cost`."""
    model, cost = AdaptiveModel(alphabet, limit), 0
    for start, end in block_ends(len(symbols), lanes):
        histogram = np.bincount(symbols[start:end], minlength=alphabet)
        cost += int(histogram @ _PRICE[model.frequencies()])
        model.update(symbols[start:end])
    return cost / _BIT


def rans_encode_numpy(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference of `rans_encode`."""
    model = AdaptiveModel(alphabet, limit)
    blocks = []
    for start, end in block_ends(len(symbols), lanes):
        blocks.append((start, end, model.frequencies().astype(np.uint64)))
        model.update(symbols[start:end])
    states = np.full(lanes, _LOWER, np.uint64)
    words: list[np.ndarray] = []
    shift, word = np.uint64(PRECISION), np.uint64(16)
    room = np.uint64(32 - PRECISION)
    for start, end, freq in reversed(blocks):
        begin = np.concatenate([np.zeros(1, np.uint64), np.cumsum(freq)[:-1]])
        block = symbols[start:end]
        for at in range((end - start - 1) // lanes * lanes, -1, -lanes):
            row = block[at : at + lanes]
            f, x = freq[row], states[: len(row)]
            full = x >= (f << room)
            if full.any():
                words.append(x[full].astype(np.uint16))
                x = np.where(full, x >> word, x)
            quotient, remainder = np.divmod(x, f)
            states[: len(row)] = (quotient << shift) + remainder + begin[row]
    stream = np.concatenate(words[::-1]) if words else np.empty(0, np.uint16)
    return states.astype(np.uint32), stream


def rans_decode_numpy(
    states: np.ndarray, words: np.ndarray, n: int, alphabet: int, limit: int, dtype: np.dtype
) -> np.ndarray:
    """Reference of `rans_decode`."""
    lanes = len(states)
    model = AdaptiveModel(alphabet, limit)
    x = states.astype(np.uint64)
    words = words.astype(np.uint64)
    out = np.empty(n, dtype)
    shift, word, mask = np.uint64(PRECISION), np.uint64(16), np.uint64(_SLOTS - 1)
    at_word = 0
    for start, end in block_ends(n, lanes):
        freq = model.frequencies()
        symbol_of = np.repeat(np.arange(alphabet, dtype=dtype), freq)  # (2**PRECISION,)
        freq_of = np.repeat(freq, freq).astype(np.uint64)
        offset_of = (np.arange(_SLOTS) - np.repeat(np.cumsum(freq) - freq, freq)).astype(np.uint64)
        for at in range(start, end, lanes):
            count = min(lanes, end - at)
            row = x[:count]
            slot = row & mask
            out[at : at + count] = symbol_of[slot]
            row = freq_of[slot] * (row >> shift) + offset_of[slot]
            (low,) = np.nonzero(row < _LOWER)
            if len(low):
                fresh = words[at_word : at_word + len(low)]
                if len(fresh) < len(low):
                    raise _ends_early(len(words), at, n)
                row[low] = (row[low] << word) | fresh
                at_word += len(low)
            x[:count] = row
        model.update(out[start:end])
    if at_word != len(words) or np.any(x != _LOWER):
        raise _ends_late(n, len(words) - at_word)
    return out


def _adaptive_cost_native(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> float:
    small = _small(symbols, alphabet)
    return native.call("cw_rans_cost", small, small.itemsize, len(small), alphabet, lanes, limit, _PRICE) / _BIT


def _rans_encode_native(symbols: np.ndarray, alphabet: int, lanes: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    small = _small(symbols, alphabet)
    states, words = np.empty(lanes, np.uint32), np.empty(len(small), np.uint16)
    count = native.call("cw_rans_encode", small, small.itemsize, len(small), alphabet, lanes, limit, states, words)
    return states, words[len(words) - count :].copy()


def _rans_decode_native(
    states: np.ndarray, words: np.ndarray, n: int, alphabet: int, limit: int, dtype: np.dtype
) -> np.ndarray:
    _check_alphabet(alphabet)
    out = np.empty(n, np.uint8 if dtype == np.uint8 and alphabet <= 256 else np.uint16)
    now, words, left = states.astype(np.uint32), np.require(words, np.uint16, ["C", "A"]), np.empty(1, np.int64)
    early = native.call("cw_rans_decode", now, len(now), words, len(words), out, out.itemsize, n, alphabet, limit, left)
    if early:
        raise _ends_early(len(words), early - 1, n)
    if left[0] or np.any(now != _LOWER):
        raise _ends_late(n, int(left[0]))
    return out.astype(dtype, copy=False)


def _small(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    """Symbols (n,) as the core takes them: 8 or 16 bits, all below alphabet."""
    _check_alphabet(alphabet)
    if len(symbols) and int(symbols.max()) >= alphabet:
        raise ValueError(f"rans: symbol {int(symbols.max())} in an alphabet of {alphabet}")
    return np.require(symbols, np.uint8 if symbols.dtype == np.uint8 else np.uint16, ["C", "A"])


def _check_alphabet(alphabet: int) -> None:
    if not 1 <= alphabet <= MAX_ALPHABET:
        raise ValueError(f"rans: an alphabet of {alphabet} symbols, must be 1..{MAX_ALPHABET}")


def _ends_early(words: int, at: int, n: int) -> FormatError:
    return FormatError(f"rans: the stream of {words} words ends at symbol {at} of {n}")


def _ends_late(n: int, left: int) -> FormatError:
    return FormatError(f"rans: after {n} symbols {left} words are left, or states not at the start")
