"""Weights to codes, one input after another, later weights making up for the errors of earlier ones as data say.

Optimal brain quantization (Frantar et al. 2022: GPTQ) with a price on codes (Conzelmann & Bamler 2025): `compensate`
does it for a prior, this for second moments of a layer's inputs that were measured.
"""

from __future__ import annotations

import numpy as np

from codeword.kernels import native
from codeword.kernels.assign import code_dtype
from codeword.kernels.compensate import column_blocks, plain_blocks, price_tables, rising


def assign_by_moments(
    values: np.ndarray, scale: np.ndarray | None, factor: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Codes (r, c) of least e H e + penalty of the codes, greedily from left to right; e is the error of a row.

    values (r, c), each row divided by scale (r,); factor (c, c) float32: U, upper triangular, of the inverse of
    H = (U^T U)^-1 (`math.moments.factor`); codebook and penalty (k,), the codebook rising. A column's code is of least
    (w - word)**2 / U_ii**2 + penalty, its error e = (w - word) / U_ii then goes to the columns j that follow: - e U_ij.
    """
    run = assign_by_moments_numpy if native.library() is None else _assign_by_moments_native
    return run(values, scale, factor, codebook, penalty)


def assign_by_moments_numpy(
    values: np.ndarray, scale: np.ndarray | None, factor: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Reference of `assign_by_moments`."""
    codes = np.empty(values.shape, code_dtype(len(codebook)))
    words, middle, slope, gaps, _ = price_tables(codebook, penalty)
    for here, x in column_blocks(values, scale):
        for i in range(len(x)):
            own = factor[i, i]
            code = np.searchsorted(rising(middle + own * own * slope, gaps), x[i])
            error = (x[i] - words[code]) / own
            x[i + 1 :] -= factor[i, i + 1 :, None] * error
            codes[here, i] = code
    return codes


def _assign_by_moments_native(
    values: np.ndarray, scale: np.ndarray | None, factor: np.ndarray, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    rows, columns = values.shape
    if codebook.shape != penalty.shape or factor.shape != (columns, columns):
        raise ValueError(f"shapes: {codebook.shape} codewords, {penalty.shape} prices, a factor of {factor.shape}")
    if scale is not None and scale.shape != (rows,):
        raise ValueError(f"a scale of {scale.shape} for {rows} rows")
    codes = np.empty(values.shape, code_dtype(len(codebook)))
    *tables, _ = (np.ascontiguousarray(table) for table in price_tables(codebook, penalty))
    upper = np.require(factor, np.float32, ["C", "A"])
    for here, part, divisor in plain_blocks(values, scale):
        out = codes[here]
        native.call(
            "cw_assign_moments",
            *(part, *part.shape, divisor, upper, *tables, len(codebook)),
            *(native.threads(), out, out.itemsize),
        )
    return codes
