"""One codebook for all rows, each row with its own scale and sign (Wu et al. 2019; methods A4).

Minimises sum h (w - s_r c_z)**2 over codewords c, codes z and scales s_r. With scales given, that is exact k-means of
w / s_r weighted by h s_r**2; with codes given, s_r = <w, c_z> / <c_z, c_z>. The two take turns while they gain.

That is the least error for k codewords, not for a number of bytes: it spends as many bits on rows of small weights as
on others, which an entropy coder would have had nearly free. Scales half way to none, the square roots of the rows'
sizes, are then better on most layers, and on some none are best.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codeword.kernels.assign import assign
from codeword.math.bins import make_bins, weighted_means
from codeword.math.kmeans import kmeans, midpoints
from codeword.math.starts import TOLERANCE

_ROUNDS = 30
_LEAST = 2.0**-14  # of the largest weight, about: float16 holds it in full, and rows below it are next to nothing
_MOST = 60_000.0  # float16 ends at 65,504
_UNITS = (2.0**-112, 2.0**112)  # so that the least scale is a normal float32, and the largest codeword finite


class ScaledRows(NamedTuple):
    """Rows of weights as unit * scale * codeword."""

    codes: np.ndarray  # (r, c) unsigned
    codebook: np.ndarray  # (k,) float64, rising
    scales: np.ndarray  # (r,) of either sign, none of them zero, 2**-14 at least
    unit: float  # a power of 2
    sse: float  # sum of importance * (weight / unit - scale * codeword)**2


def row_scaled(
    rows: np.ndarray, importance: np.ndarray | None, k: int, dtype: np.dtype, *, coded: bool = False
) -> ScaledRows:
    """Codes, codewords and scales (rounded to dtype, a float of 16 bits or more) of rows (r, c), not empty, finite.

    importance (r, c) >= 0 weighs the squared errors; None for all alike. coded: the scales are those for which the
    error is least at equal bytes, codes at their entropy: fitted, square roots with a sign or without, or all 1.
    """
    top = float(np.abs(rows).max())
    unit = min(max(2.0 ** math.floor(math.log2(top)), _UNITS[0]), _UNITS[1]) if top > 0 else 1.0
    wide = rows.astype(np.float64) / unit
    h = np.ones_like(wide) if importance is None else importance.astype(np.float64)
    # A row and its negative are one shape: turn all rows to lean the same way, so that they share codewords.
    size = np.sqrt(np.mean(np.square(wide), axis=1))
    lean = np.where(np.sum(h * wide**3, axis=1) < 0, -1.0, 1.0)
    best = min((_fit(wide, h, _bounded(start), unit, k) for start in (lean * size, size)), key=lambda it: it.sse)
    for _ in range(_ROUNDS):
        found = _fit(wide, h, _bounded(_closed_form(wide, h, best)), unit, k)
        gain = best.sse - found.sse
        best = found if gain > 0 else best
        if not gain > TOLERANCE * found.sse:
            break
    starts = (best.scales, lean * np.sqrt(size), np.sqrt(size), np.ones(len(rows))) if coded else (best.scales,)
    rounded = (_bounded(it).astype(dtype).astype(np.float64) for it in starts)
    return min((_fit(wide, h, it, unit, k) for it in rounded), key=lambda it: _price(it, 8 * dtype.itemsize))


def _price(found: ScaledRows, scale_bits: int) -> float:
    """Bits of codes and scales, and what the error is worth in bits: one a weight for each factor of 4 (6 dB)."""
    count = np.bincount(found.codes.reshape(-1))
    count = count[count > 0]
    scales = 0 if np.all(found.scales == found.scales[0]) else scale_bits * len(found.scales)
    error = found.codes.size * math.log2(max(found.sse, 1e-300)) / 2
    return float(count @ np.log2(found.codes.size / count)) + scales + error


def _fit(wide: np.ndarray, h: np.ndarray, scales: np.ndarray, unit: float, k: int) -> ScaledRows:
    """The best codes and codewords for scales (r,)."""
    scaled = (wide / scales[:, None]).astype(np.float32)
    weight = h * np.square(scales)[:, None]
    codebook = kmeans(make_bins(scaled, None, weight), k).codebook
    codes = assign(scaled, None, midpoints(codebook))
    flat = codes.reshape(-1)
    mass = np.bincount(flat, weight.reshape(-1), len(codebook))
    first = np.bincount(flat, (weight * scaled).reshape(-1), len(codebook))
    codebook = weighted_means(first, mass, codebook)
    error = wide - scales[:, None] * codebook[codes]
    return ScaledRows(codes, codebook, scales, unit, float(np.sum(h * np.square(error))))


def _closed_form(wide: np.ndarray, h: np.ndarray, found: ScaledRows) -> np.ndarray:
    """(r,) the scales that fit codes and codewords best; those at hand where nothing decides."""
    picked = found.codebook[found.codes]
    weighted = h * picked
    over, under = np.sum(weighted * wide, axis=1), np.sum(weighted * picked, axis=1)
    return np.where((under > 0) & (over != 0), over / np.where(under > 0, under, 1), found.scales)


def _bounded(scales: np.ndarray) -> np.ndarray:
    """Scales of a size that divides safely, their sign kept."""
    return np.copysign(np.clip(np.abs(scales), _LEAST, _MOST), scales)
