"""A matrix of shared values times vectors, in factored form (Wu et al. 2019; methods A4).

y_r = s_r * sum_j c_j * (sum of the x_i whose code is j): k + 1 multiplications an output instead of n, and as many
additions. In NumPy it shows what is computed, not how fast it can be; no dense matrix is made.
"""

from __future__ import annotations

import numpy as np

from codeword.errors import ExprError
from codeword.expr import Affine, Expr, Lookup, Reshape, shape


def product(expr: Expr, x: np.ndarray) -> np.ndarray:
    """(b, r) float64, x (b, n) times the transpose of the matrix (r, n) that an expression decodes to.

    expr: a Lookup of single values, under any Affines that have one scale and offset a row or in all, under Reshapes
    that change no row. Raises ExprError for any other, and if x does not fit.
    """
    rows, columns = _matrix(expr)
    if x.ndim != 2 or x.shape[1] != columns:
        raise ExprError(f"factored product: x must be (b, {columns}), got {x.shape}")
    return _product(expr, rows, x)


def multiplications(expr: Expr) -> int:
    """Multiplications for one vector x: one for each codeword and scale of each output, against r * n dense."""
    match expr:
        case Lookup(codes, codebook):
            return codes.shape[0] * codes.shape[1] * codebook.shape[1]
        case Affine(inner, scale, offset):
            return multiplications(inner) + _matrix(expr)[0] * ((scale is not None) + (offset is not None))
        case Reshape(inner):
            return multiplications(inner)
        case _:
            raise ExprError(f"factored product: no {type(expr).__name__} in it")


def _product(expr: Expr, rows: int, x: np.ndarray) -> np.ndarray:
    match expr:
        case Lookup(codes, codebook) if codebook.shape[2] == 1:
            k = codebook.shape[1]
            if codes.size and int(codes.max()) >= k:
                raise ExprError(f"Lookup: code {int(codes.max())} in a codebook of {k} codewords")
            places = codes.reshape(rows, -1).astype(np.int64) + k * np.arange(rows)[:, None]
            words = np.repeat(codebook[:, :, 0].astype(np.float64), codes.shape[1], axis=0)  # (r, k)
            out = np.empty((len(x), rows))
            for index, vector in enumerate(x.astype(np.float64)):
                tiled = np.broadcast_to(vector, places.shape).reshape(-1)
                sums = np.bincount(places.reshape(-1), tiled, rows * k).reshape(rows, k)
                out[index] = np.sum(sums * words, axis=1)
            return out
        case Affine(inner, scale, offset):
            out = _product(inner, rows, x)
            if scale is not None:
                out *= _per_row(scale, rows)
            if offset is not None:
                out += x.sum(axis=1, dtype=np.float64)[:, None] * _per_row(offset, rows)
            return out
        case Reshape(inner):
            return _product(inner, rows, x)
        case _:
            raise ExprError(f"factored product: no {type(expr).__name__} of {shape(expr)} in it")


def _per_row(array: np.ndarray, rows: int) -> np.ndarray:
    """(r,) or (1,) values of a scale or offset that broadcasts along the columns."""
    if array.size not in (1, rows) or (array.size > 1 and array.shape[0] != rows):
        raise ExprError(f"factored product: one scale and offset a row or in all, got {array.shape} for {rows} rows")
    return array.reshape(-1).astype(np.float64)


def _matrix(expr: Expr) -> tuple[int, int]:
    """(rows, columns) of an expression whose rows are its first axis."""
    dims = shape(expr)
    inner = expr
    while isinstance(inner, Affine | Reshape):
        inner = inner.inner
        if not dims or not shape(inner) or shape(inner)[0] != dims[0]:
            raise ExprError(f"factored product: rows are the first axis, got {shape(inner)} reshaped to {dims}")
    return dims[0], int(np.prod(dims[1:]))
