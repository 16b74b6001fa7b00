"""Weights to codes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codeword.kernels import chunks as walk
from codeword.kernels import native
from codeword.kernels.chunks import blocks, chunks, wide
from codeword.kernels.histogram import bin_keys, is_16_bit, low_bits, whole_sums_numpy

_PATTERNS = 1 << 16
_FEW = 32  # codewords up to which comparing with each threshold is faster than a table


class Parts(NamedTuple):
    """Members of each codeword but the last that lie in the histogram's bin of the threshold above it; all (k-1,)."""

    keys: np.ndarray  # int64, the bins: not every one of them is occupied
    counts: np.ndarray  # float64, number of values
    first: np.ndarray  # float64, sum of values


def assign(values: np.ndarray, scale: np.ndarray | None, thresholds: np.ndarray) -> np.ndarray:
    """Codes (r, c), the smallest unsigned dtype that holds k - 1.

    values (r, c), each row divided by scale (r,); thresholds (k-1,) rising. Code j means
    thresholds[j-1] < value <= thresholds[j].
    """
    run = assign_numpy if native.library() is None else _assign_native
    return run(values, scale, float_edges(thresholds))


def assign_parts(values: np.ndarray, scale: np.ndarray | None, thresholds: np.ndarray) -> tuple[np.ndarray, Parts]:
    """`assign`, and what of the bins that thresholds cut lies on their lower side: with the histogram of the values it
    says what the members of each codeword sum to. All values finite.
    """
    edges = float_edges(thresholds) + np.float32(0)  # without a negative zero: it has another bin than zero
    run = assign_parts_numpy if native.library() is None else _assign_parts_native
    codes, sums = run(values, scale, edges)
    keys = bin_keys(edges)
    whole = whole_sums_numpy(np.column_stack([keys, sums, np.zeros_like(keys)]))
    return codes, Parts(keys, whole.counts, whole.first)


def float_edges(thresholds: np.ndarray) -> np.ndarray:
    """Thresholds as float32, rounded down: to nearest, neighbouring floats would share a code."""
    edges = thresholds.astype(np.float32)
    return np.where(edges > thresholds, np.nextafter(edges, np.float32(-np.inf)), edges)


def assign_weighted(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Codes (r, c) that minimise importance * (value - codeword)**2 + penalty of the codeword, weight by weight.

    values and importance (r, c), scale (r,), codebook and penalty (k,). With an importance of its own for each weight
    there are no common thresholds, so every codeword is tried; ties go to the lower code.
    """
    run = assign_weighted_numpy if native.library() is None else _assign_weighted_native
    return run(values, scale, importance, codebook.astype(np.float32), penalty.astype(np.float32))


def cluster_sums(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None, codes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(count, weight, first moment) of the members of each codeword, (k,) float64, over the raw values."""
    run = cluster_sums_numpy if native.library() is None else _cluster_sums_native
    return run(values, scale, importance, codes, k)


def assign_numpy(values: np.ndarray, scale: np.ndarray | None, edges: np.ndarray) -> np.ndarray:
    """Reference of `assign`, from edges (k-1,) float32."""
    codes = np.empty(values.shape, code_dtype(len(edges) + 1))
    for where, part in chunks(values, scale):
        codes[where] = np.searchsorted(edges, part)
    return codes


def assign_parts_numpy(
    values: np.ndarray, scale: np.ndarray | None, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reference of `assign_parts`: codes, and for each of edges (k-1,) the sums (k-1, 2) of 1 and of the low bits."""
    codes = assign_numpy(values, scale, edges)
    sums = np.zeros((len(edges) + 1, 2), np.int64)
    keys = np.append(bin_keys(edges), -1)
    for where, part in chunks(values, scale):
        z = codes[where].reshape(-1)
        cut = bin_keys(part.reshape(-1)) == keys[z]
        np.add.at(sums[:, 0], z[cut], 1)
        np.add.at(sums[:, 1], z[cut], low_bits(part.reshape(-1)[cut]))
    return codes, sums[:-1]


def assign_weighted_numpy(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Reference of `assign_weighted`, from a codebook and a penalty of float32."""
    codes = np.zeros(values.shape, code_dtype(len(codebook)))
    for where, part in chunks(values, scale):
        h = importance[where].astype(np.float32)
        best = np.full(part.shape, np.inf, np.float32)
        for code, (codeword, price) in enumerate(zip(codebook, penalty, strict=True)):
            cost = h * (part - codeword) ** 2 + price
            better = cost < best
            codes[where][better] = code
            np.copyto(best, cost, where=better)
    return codes


def cluster_sums_numpy(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None, codes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference of `cluster_sums`."""
    count, weight, first = (np.zeros(k) for _ in range(3))
    for where, part in chunks(values, scale):
        z = codes[where].reshape(-1)
        members = np.bincount(z, minlength=k)
        count += members
        flat = part.reshape(-1).astype(np.float64)
        if importance is None:
            weight += members
        else:
            h = importance[where].reshape(-1).astype(np.float64)
            weight += np.bincount(z, h, k)
            flat *= h
        first += np.bincount(z, flat, k)
    return count, weight, first


def _assign_native(values: np.ndarray, scale: np.ndarray | None, edges: np.ndarray) -> np.ndarray:
    if is_16_bit(values) and scale is None and values.size > _PATTERNS:
        return _assign16(values, edges)
    return _assign_any(values, scale, edges, None)


def _assign_parts_native(
    values: np.ndarray, scale: np.ndarray | None, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    sums = np.zeros((len(edges), 2), np.int64)
    return _assign_any(values, scale, edges, sums), sums


def _assign_any(values: np.ndarray, scale: np.ndarray | None, edges: np.ndarray, sums: np.ndarray | None) -> np.ndarray:
    codes = np.empty(values.shape, code_dtype(len(edges) + 1))
    edges, threads = np.require(edges, np.float32, ["C", "A"]), native.threads()
    for where, part, divisor in blocks(values, scale):
        here = _room(codes, where)
        native.call("cw_assign", part, *part.shape, divisor, edges, len(edges) + 1, threads, here, here.itemsize, sums)
        _keep(codes, where, here)
    return codes


def _assign16(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Codes of floats of 16 bits: by comparing patterns if codewords are few, else from a table of all patterns."""
    codes, threads = np.empty(values.shape, code_dtype(len(edges) + 1)), native.threads()
    patterns = np.arange(_PATTERNS, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        table = _assign_any(patterns.view(values.dtype).astype(np.float32)[None], None, edges, None)[0]
    infinity = int(np.array(np.inf, values.dtype).view(np.uint16))
    negative = np.arange(infinity | 0x8000, 0x7FFF, -1)  # from minus infinity to minus zero
    rising = np.concatenate([table[negative], table[: infinity + 1]])
    bottom = -1 - infinity  # the key of minus infinity; that of zero is 0
    tops = (np.searchsorted(rising, np.arange(len(edges)), side="right") + (bottom - 1)).astype(np.int16)
    for where in walk.pieces(values.shape, whole=walk.is_plain(values)):
        part, here = np.ascontiguousarray(values[where]), _room(codes, where)
        if len(edges) < _FEW:
            native.call("cw_rank16", part, part.size, tops, len(edges), bottom, threads, here)
        else:
            native.call("cw_lookup16", part, part.size, table, threads, here, here.itemsize)
        _keep(codes, where, here)
    return codes


def _assign_weighted_native(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    codes = np.zeros(values.shape, code_dtype(len(codebook)))
    words, prices = np.ascontiguousarray(codebook), np.ascontiguousarray(penalty)
    _check_lengths(words, prices)
    for where, part, divisor in blocks(values, scale, importance):
        here, h = _room(codes, where), np.require(importance[where], np.float32, ["C", "A"])
        native.call(
            "cw_assign_weighted",
            *(part, *part.shape, divisor, h, words, prices, len(words)),
            *(native.threads(), here, here.itemsize),
        )
        _keep(codes, where, here)
    return codes


def _cluster_sums_native(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None, codes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count, weight, first = (np.zeros(k) for _ in range(3))
    if codes.size and int(codes.max()) >= k:
        raise ValueError(f"code {int(codes.max())} with {k} codewords")
    for where, part, divisor in blocks(values, scale, importance, codes):
        h = None if importance is None else wide(importance[where])
        z = np.require(codes[where], code_dtype(k), ["C", "A"])
        native.call(
            "cw_cluster_sums",
            *(part, *part.shape, divisor, h, 0 if h is None else h.itemsize, z, z.itemsize, k),
            *(walk.CHUNK, native.threads(), count, weight, first),
        )
    return count, weight, first


def _room(codes: np.ndarray, where: walk.Where) -> np.ndarray:
    """Where a kernel may write codes[where]: there, if that is in C order."""
    here = codes[where]
    return here if walk.is_plain(here) else np.empty(here.shape, here.dtype)


def _keep(codes: np.ndarray, where: walk.Where, here: np.ndarray) -> None:
    if here.base is not codes:
        codes[where] = here


def _check_lengths(codebook: np.ndarray, penalty: np.ndarray) -> None:
    if codebook.shape != penalty.shape:
        raise ValueError(f"codebook {codebook.shape} and penalty {penalty.shape} differ in shape")


def code_dtype(k: int) -> np.dtype:
    """Smallest unsigned dtype for codes below k."""
    return np.dtype(np.uint8 if k <= 1 << 8 else np.uint16 if k <= 1 << 16 else np.uint32)
