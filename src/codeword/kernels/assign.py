"""Weights to codes."""

from __future__ import annotations

import numpy as np

from codeword.kernels.chunks import chunks


def assign(values: np.ndarray, scale: np.ndarray | None, thresholds: np.ndarray) -> np.ndarray:
    """Codes (r, c), the smallest unsigned dtype that holds k - 1.

    values (r, c), each row divided by scale (r,); thresholds (k-1,) rising. Code j means
    thresholds[j-1] < value <= thresholds[j].
    """
    dtype = code_dtype(len(thresholds) + 1)
    codes = np.empty(values.shape, dtype)
    # Rounded down, which leaves every float32 on its side: rounded to nearest, neighbouring floats would share a code.
    edges = thresholds.astype(np.float32)
    edges = np.where(edges > thresholds, np.nextafter(edges, np.float32(-np.inf)), edges)
    for where, part in chunks(values, scale):
        codes[where] = np.searchsorted(edges, part)
    return codes


def assign_weighted(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Codes (r, c) that minimise importance * (value - codeword)**2 + penalty of the codeword, weight by weight.

    values and importance (r, c), scale (r,), codebook and penalty (k,). With an importance of its own for each weight
    there are no common thresholds, so every codeword is tried; ties go to the lower code.
    """
    codes = np.zeros(values.shape, code_dtype(len(codebook)))
    for where, part in chunks(values, scale):
        h = importance[where].astype(np.float32)
        best = np.full(part.shape, np.inf, np.float32)
        for code, (codeword, price) in enumerate(zip(codebook, penalty, strict=True)):
            cost = h * (part - np.float32(codeword)) ** 2 + np.float32(price)
            better = cost < best
            codes[where][better] = code
            np.copyto(best, cost, where=better)
    return codes


def cluster_sums(
    values: np.ndarray, scale: np.ndarray | None, importance: np.ndarray | None, codes: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(count, weight, first moment) of the members of each codeword, (k,) float64, over the raw values."""
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


def code_dtype(k: int) -> np.dtype:
    """Smallest unsigned dtype for codes below k."""
    return np.dtype(np.uint8 if k <= 1 << 8 else np.uint16 if k <= 1 << 16 else np.uint32)
