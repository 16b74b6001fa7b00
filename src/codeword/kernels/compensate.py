"""Weights to codes, one input after another, each taking up the error that those before it left in the output.

Optimal brain quantization (Frantar et al. 2022: GPTQ) needs H, the second moments of a layer's inputs. Without data a
prior does most of it, because images and activations after a ReLU have two habits: neighbours in space are alike, and
means are not zero. So H = I + NEAR * (same kernel) + FAR * (all), the three levels of SQuant (Guo et al. 2022): errors
should cancel within a kernel and within a row. For this H the update of GPTQ has a closed form, two running sums a row,
so the cost is one pass over the weights, whatever the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from codeword.kernels import native
from codeword.kernels.assign import code_dtype
from codeword.kernels.chunks import is_plain

# Chosen on training images of MNIST and CIFAR-10 (LeNet-5, ResNet-20 and -56 at 9x to 40x; divergence of the outputs):
# anything from (1, 0.05) to (4, 1) is within a third of the best, none at all several times worse.
NEAR = 4.0
FAR = 0.5
_Index = TypeVar("_Index", float, np.ndarray)
_BLOCK = 1 << 22  # weights worked on at once


def assign_compensated(
    values: np.ndarray,
    scale: np.ndarray | None,
    importance: np.ndarray | None,
    kernel: int,
    codebook: np.ndarray,
    penalty: np.ndarray,
) -> np.ndarray:
    """Codes (r, c) of least e H e + penalty of the codes, greedily from left to right; e is the error of a row.

    values (r, c), each row divided by scale (r,); importance (r, c) multiplies the squared errors; kernel: how many
    neighbouring columns are one kernel, c a multiple of it; codebook and penalty (k,), the codebook rising.
    """
    run = assign_compensated_numpy if native.library() is None else _assign_compensated_native
    return run(values, scale, importance, kernel, codebook, penalty)


def assign_compensated_numpy(
    values: np.ndarray,
    scale: np.ndarray | None,
    importance: np.ndarray | None,
    kernel: int,
    codebook: np.ndarray,
    penalty: np.ndarray,
) -> np.ndarray:
    """Reference of `assign_compensated`."""
    codes = np.empty(values.shape, code_dtype(len(codebook)))
    for here, part in column_blocks(values, scale):
        root = None if importance is None else np.sqrt(importance[here].T.astype(np.float32))
        codes[here] = _columns(part, root, kernel, codebook, penalty).T
    return codes


def _columns(
    columns: np.ndarray, root: np.ndarray | None, kernel: int, codebook: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Codes (c, r) of columns (c, r); root (c, r) is the square root of the importance."""
    count, rows = columns.shape
    codes = np.empty(columns.shape, code_dtype(len(codebook)))
    words, middle, slope, gaps, prices = price_tables(codebook, penalty)
    in_kernel, in_row = np.zeros(rows, np.float32), np.zeros(rows, np.float32)  # errors so far, times root
    for i in range(count):
        if i % kernel == 0:
            in_kernel[:] = 0
        shift_kernel, shift_row, gain = _step(i, count, kernel)
        shift = shift_kernel * in_kernel + shift_row * in_row
        if root is None:
            wanted = columns[i] - shift
            code = np.searchsorted(rising(middle + np.float32(gain) * slope, gaps), wanted)
            error = words[code] - columns[i]
        else:
            weight = np.maximum(root[i], np.float32(1e-12))
            wanted = columns[i] - shift / weight
            distance = (weight[:, None] * (wanted[:, None] - words)) ** 2
            code = np.argmin(distance + np.float32(gain) * prices, axis=1)
            error = weight * (words[code] - columns[i])
        codes[i] = code
        in_kernel += error
        in_row += error
    return codes


def price_tables(codebook: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, ...]:
    """Words (k,), middle, slope, gaps (k-1,), prices (k,) float32; thresholds: middle + gain * slope, made to rise."""
    words, gaps = codebook.astype(np.float32), np.diff(codebook)
    slope = np.diff(penalty) / (2 * gaps)
    tables = words, (words[1:] + words[:-1]) / 2, slope, gaps, penalty
    return tuple(table.astype(np.float32) for table in tables)


def rising(thresholds: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Where the cheapest codeword hands over to the next that is cheapest somewhere, of (k-1,) between neighbours.

    Where thresholds fall, the codewords between are nowhere cheapest: the cheapest are the corners of the lower convex
    hull of word**2 + gain * price over word, whose slopes are those between neighbours pooled, by the words' gaps.
    `math.ecsq.envelope` finds the same for one gain, and leaves codewords out; here each column has its own.
    """
    if (thresholds[1:] >= thresholds[:-1]).all():
        return thresholds
    pools: list[tuple[np.float32, np.float32, np.float32, int]] = []  # threshold, its sum, gaps, how many
    for value, gap in zip(thresholds, gaps, strict=True):
        total, count = value * gap, 1
        while pools and pools[-1][0] > value:
            _, other, width, members = pools.pop()
            total, gap, count = other + total, width + gap, members + count
            value = total / gap
        pools.append((value, total, gap, count))
    return np.repeat(np.array([pool[0] for pool in pools], np.float32), [pool[3] for pool in pools])


def _assign_compensated_native(
    values: np.ndarray,
    scale: np.ndarray | None,
    importance: np.ndarray | None,
    kernel: int,
    codebook: np.ndarray,
    penalty: np.ndarray,
) -> np.ndarray:
    rows, columns = values.shape
    if codebook.shape != penalty.shape or (importance is not None and importance.shape != values.shape):
        raise ValueError(f"shapes: {codebook.shape} codewords, {penalty.shape} prices, {values.shape} values")
    if scale is not None and scale.shape != (rows,):
        raise ValueError(f"a scale of {scale.shape} for {rows} rows")
    codes = np.empty(values.shape, code_dtype(len(codebook)))
    tables = [np.ascontiguousarray(table) for table in price_tables(codebook, penalty)]
    steps = np.stack(_step(np.arange(columns), columns, kernel), axis=1).astype(np.float32)
    for here, part, divisor in plain_blocks(values, scale):
        h = None if importance is None else np.require(importance[here], np.float32, ["C", "A"])
        out = codes[here]
        native.call(
            "cw_assign_compensated",
            *(part, *part.shape, divisor, h, kernel, steps, *tables, len(codebook)),
            *(native.threads(), out, out.itemsize),
        )
    return codes


def column_blocks(values: np.ndarray, scale: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray]]:
    """(which rows, they as contiguous columns (c, rows of the block) float32) of values (r, c) over scale (r,)."""
    rows, columns = values.shape
    block = max(1, _BLOCK // max(columns, 1))
    for at in range(0, rows, block):
        here = slice(at, at + block)
        part = values[here].T.astype(np.float32)
        if scale is not None:
            part /= scale[here]
        yield here, part


def plain_blocks(values: np.ndarray, scale: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """(which rows, they as float32 in C order, their scale or None if they are divided by it) of values (r, c)."""
    rows, columns = values.shape
    whole = values.dtype == np.float32 and is_plain(values) and (scale is None or scale.dtype == np.float32)
    block = max(1, rows if whole else _BLOCK // max(columns, 1))
    for at in range(0, rows, block):
        here = slice(at, at + block)
        part, divisor = values[here], None if scale is None else np.ascontiguousarray(scale[here])
        if not whole:
            part = np.array(part, np.float32, order="C")
            if divisor is not None:
                part /= divisor[:, None]
                divisor = None
        yield here, part, divisor


def _step(i: _Index, count: int, kernel: int) -> tuple[_Index, _Index, _Index]:
    """(a, b, gain) of column i: its weight should move by -(a * errors of its kernel + b * errors of its row), and an
    error there, once all later weights have made up for it, costs error**2 / gain.

    From H_RR x = H_RF e for the columns R still open and F done, which Sherman and Morrison solve twice: for the part
    of the kernel that is open (m columns), and for the row (the open part, and q whole kernels).
    """
    m = kernel - i % kernel
    q = (count - i - m) // kernel
    own = 1 + NEAR * m
    open_kernel, open_row = m / own, m / own + q * kernel / (1 + NEAR * kernel)
    far = FAR / (1 + FAR * open_row)
    shift_kernel = (NEAR - far * open_kernel * NEAR) / own
    return shift_kernel, far / own, 1 - NEAR / own - far / own**2
