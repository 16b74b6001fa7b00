"""Weights to codes."""

from __future__ import annotations

import numpy as np

from codeword.kernels import chunks as walk
from codeword.kernels import native
from codeword.kernels.chunks import blocks, chunks, wide

_PATTERNS = 1 << 16


def assign(values: np.ndarray, scale: np.ndarray | None, thresholds: np.ndarray) -> np.ndarray:
    """Codes (r, c), the smallest unsigned dtype that holds k - 1.

    values (r, c), each row divided by scale (r,); thresholds (k-1,) rising. Code j means
    thresholds[j-1] < value <= thresholds[j].
    """
    # Rounded down, which leaves every float32 on its side: rounded to nearest, neighbouring floats would share a code.
    edges = thresholds.astype(np.float32)
    edges = np.where(edges > thresholds, np.nextafter(edges, np.float32(-np.inf)), edges)
    run = assign_numpy if native.library() is None else _assign_native
    return run(values, scale, edges)


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
    codes = np.empty(values.shape, code_dtype(len(edges) + 1))
    edges, threads = np.require(edges, np.float32, ["C", "A"]), native.threads()
    if values.itemsize == 2 and values.dtype.kind not in "iu" and scale is None and values.size > _PATTERNS:
        every = np.arange(_PATTERNS, dtype=np.uint16).view(values.dtype).astype(np.float32)
        with np.errstate(invalid="ignore"):
            table = _assign_native(every[None], None, edges)
        for where in walk.pieces(values.shape, whole=walk.is_plain(values)):
            part, here = np.ascontiguousarray(values[where]), _room(codes, where)
            native.call("cw_lookup16", part, part.size, table, threads, here, here.itemsize)
            _keep(codes, where, here)
        return codes
    for where, part, divisor in blocks(values, scale):
        here = _room(codes, where)
        native.call("cw_assign", part, *part.shape, divisor, edges, len(edges) + 1, threads, here, here.itemsize)
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
