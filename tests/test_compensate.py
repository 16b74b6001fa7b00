"""Error compensation: the closed form is linear algebra, the codes are those of a plain GPTQ with dense matrices."""

import numpy as np
import pytest

from codeword.kernels import compensate
from codeword.kernels.assign import assign, assign_weighted
from codeword.kernels.compensate import FAR, NEAR, assign_compensated

GRID = np.arange(-4, 5) * 0.6
NOTHING = np.zeros(len(GRID))
PRICES = 0.05 * np.array([7, 6, 4, 2.5, 1, 2.5, 4, 6, 7])


def hessian(count, kernel):
    return np.eye(count) + FAR + NEAR * np.kron(np.eye(count // kernel), np.ones((kernel, kernel)))


def weights(rows, columns, seed=0):
    return np.random.default_rng(seed).laplace(size=(rows, columns)).astype(np.float32)


def importances(rows, columns, seed=1):
    return np.random.default_rng(seed).lognormal(sigma=1.5, size=(rows, columns)).astype(np.float32)


def gptq(values, scale, importance, kernel, codebook, penalty):
    """Frantar et al. 2022 as it is written down: the Cholesky factor of the inverse, row by row, in float64."""
    codes = np.empty(values.shape, np.int64)
    for r, row in enumerate(values.astype(np.float64)):
        w = row if scale is None else row / float(scale[r])
        h = hessian(len(w), kernel)
        if importance is not None:
            root = np.sqrt(importance[r].astype(np.float64))
            h = root[:, None] * h * root
        upper = np.linalg.cholesky(np.linalg.inv(h)).T  # upper.T @ upper is the inverse
        w = w.copy()
        for i in range(len(w)):
            d = upper[i, i]
            codes[r, i] = np.argmin((w[i] - codebook) ** 2 / d**2 + penalty)
            w[i:] -= (w[i] - codebook[codes[r, i]]) / d * upper[i, i:]
    return codes


def cost(values, codes, kernel, importance=None, codebook=GRID, penalty=NOTHING):
    """Sum over rows of e H e, and of the penalties."""
    e = codebook[codes] - values.astype(np.float64)
    if importance is not None:
        e = e * np.sqrt(importance)
    return np.einsum("ri,ij,rj->", e, hessian(values.shape[1], kernel), e) + penalty[codes].sum()


@pytest.mark.parametrize(
    ("count", "kernel"),
    [(1, 1), (2, 1), (2, 2), (7, 1), (7, 7), (6, 2), (6, 3), (18, 9), (27, 9), (50, 25), (40, 1), (24, 8)],
)
def test_the_closed_form_equals_dense_linear_algebra(count, kernel):
    h = hessian(count, kernel)
    errors = np.random.default_rng(count + kernel).normal(size=count)
    for i in range(count):
        open_, done = slice(i, count), slice(0, i)
        moved = -np.linalg.solve(h[open_, open_], h[open_, done] @ errors[done])[0]
        left = np.linalg.inv(h[open_, open_])[0, 0]
        by_kernel, by_row, gain = compensate._step(i, count, kernel)
        start = i - i % kernel
        assert -(by_kernel * errors[start:i].sum() + by_row * errors[:i].sum()) == pytest.approx(moved, abs=1e-12)
        assert gain == pytest.approx(left, rel=1e-12)


def test_codes_by_hand():
    # H = 5 I + 0.5 J. With n columns open each weight takes up 0.5 / (5 + 0.5 n) of the errors so far:
    # 0.42 -> 0 | 0.42 + 0.42 / 14 = 0.45 -> 0 | 0.42 + 0.84 / 13 = 0.485 -> 0 | 0.42 + 1.26 / 12 = 0.525 -> 1 |
    # 0.42 + (1.26 - 0.58) / 11 = 0.482 -> 0
    values = np.full((1, 5), 0.42, np.float32)
    codes = assign_compensated(values, None, None, 1, np.array([0.0, 1.0]), np.zeros(2))
    assert codes.tolist() == [[0, 0, 0, 1, 0]]
    assert codes.dtype == np.uint8


def test_a_last_column_takes_its_nearest_codeword_after_all_shifts():
    # Two columns of one kernel: the second is shifted by (NEAR + FAR) / (1 + NEAR + FAR) of the first's error.
    values = np.array([[0.3, 0.1]], np.float32)
    wanted = 0.1 + 0.3 * (NEAR + FAR) / (1 + NEAR + FAR)
    assert wanted == pytest.approx(0.345, abs=1e-3)
    for word, code in ((0.68, 1), (0.70, 0)):  # 0.345 lies above half of 0.68 and below half of 0.70
        codes = assign_compensated(values, None, None, 2, np.array([0.0, word]), np.zeros(2))
        assert codes.tolist() == [[0, code]]


@pytest.mark.parametrize("penalty", [NOTHING, PRICES], ids=["free", "priced"])
@pytest.mark.parametrize(("columns", "kernel"), [(1, 1), (12, 1), (12, 4), (9, 9), (45, 9), (50, 25)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_codes_are_those_of_gptq(columns, kernel, penalty, weighted, scaled):
    values = weights(11, columns, seed=columns)
    scale = np.linspace(0.5, 2, 11).astype(np.float32) if scaled else None
    h = importances(11, columns) if weighted else None
    expected = gptq(values, scale, h, kernel, GRID, penalty)
    found = assign_compensated(values, scale, h, kernel, GRID, penalty)
    np.testing.assert_array_equal(found, expected)
    if columns > 9:  # and compensation does something: the same greedy choice without it differs
        ones = np.ones(values.shape, np.float32)
        plain = assign_weighted(values, scale, ones if h is None else h, GRID, penalty)
        assert np.mean(found != plain) > 0.02


def test_codes_are_those_of_gptq_for_an_uneven_codebook():
    codebook = np.array([-2.0, -0.7, 0.0, 0.1, 1.5])
    values = weights(9, 30, seed=5)
    found = assign_compensated(values, None, None, 3, codebook, np.zeros(5))
    np.testing.assert_array_equal(found, gptq(values, None, None, 3, codebook, np.zeros(5)))


def test_equal_importance_changes_nothing():
    values = weights(8, 36)
    ones = np.ones(values.shape, np.float32)
    plain = assign_compensated(values, None, None, 9, GRID, PRICES)
    np.testing.assert_array_equal(assign_compensated(values, None, ones, 9, GRID, PRICES), plain)


@pytest.mark.parametrize(("columns", "kernel", "share"), [(64, 1, 0.99), (72, 9, 0.5), (100, 25, 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_output_errors_fall_below_those_of_nearest_codewords(columns, kernel, share, seed):
    values, h = np.clip(weights(40, columns, seed), -2.4, 2.4), importances(40, columns, seed + 9)
    nearest = assign(values, None, (GRID[1:] + GRID[:-1]) / 2)
    found = assign_compensated(values, None, None, kernel, GRID, NOTHING)
    assert cost(values, found, kernel) < share * cost(values, nearest, kernel)
    found = assign_compensated(values, None, h, kernel, GRID, NOTHING)
    assert cost(values, found, kernel, h) < share * cost(values, nearest, kernel, h)


def test_the_price_of_codes_counts():
    values, penalty = weights(40, 72), 5 * PRICES
    free = assign_compensated(values, None, None, 9, GRID, NOTHING)
    priced = assign_compensated(values, None, None, 9, GRID, penalty)
    assert penalty[priced].sum() < 0.9 * penalty[free].sum()
    assert cost(values, priced, 9, penalty=penalty) < cost(values, free, 9, penalty=penalty)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 18, 40, 90])  # weights: one row, one row exactly, two rows, five
def test_blocks_of_rows_do_not_matter(block, weighted, monkeypatch):
    values, scale = weights(13, 18), np.linspace(0.5, 2, 13).astype(np.float32)
    h = importances(13, 18) if weighted else None
    whole = assign_compensated(values, scale, h, 9, GRID, PRICES)
    monkeypatch.setattr(compensate, "_BLOCK", block)
    np.testing.assert_array_equal(assign_compensated(values, scale, h, 9, GRID, PRICES), whole)


def test_rows_do_not_see_each_other():
    values = weights(6, 24)
    whole = assign_compensated(values, None, None, 4, GRID, PRICES)
    for row in range(6):
        alone = assign_compensated(values[row : row + 1], None, None, 4, GRID, PRICES)
        np.testing.assert_array_equal(alone, whole[row : row + 1])


def test_one_column_has_nobody_to_take_up_its_error():
    values = weights(200, 1)
    nearest = assign(values, None, (GRID[1:] + GRID[:-1]) / 2)
    np.testing.assert_array_equal(assign_compensated(values, None, None, 1, GRID, NOTHING), nearest)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_input_is_only_read(dtype):
    values, h = weights(5, 18).astype(dtype), importances(5, 18)
    scale = np.ones(5, np.float32)
    before = [array.copy() for array in (values, h, scale)]
    for array in (values, h, scale):
        array.flags.writeable = False
    codes = assign_compensated(values, scale, h, 9, GRID, PRICES)
    assert codes.flags.writeable
    for array, kept in zip((values, h, scale), before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_weights_of_no_importance_leave_the_others_alone():
    values = weights(4, 20)
    h = np.ones(values.shape, np.float32)
    h[:, 10:] = 0
    codes = assign_compensated(values, None, h, 1, GRID, NOTHING)
    assert codes.max() < len(GRID)
    part = assign_compensated(values[:, :10], None, None, 1, GRID, NOTHING)
    assert np.mean(codes[:, :10] == part) > 0.8  # not all: zeros at the end could take up errors for nothing


@pytest.mark.parametrize(("k", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_codes_take_the_smallest_type(k, dtype):
    codes = assign_compensated(weights(3, 8), None, None, 1, np.linspace(-8, 8, k), np.zeros(k))
    assert codes.dtype == dtype


def test_no_rows_are_no_codes():
    assert assign_compensated(np.zeros((0, 4), np.float32), None, None, 2, GRID, NOTHING).shape == (0, 4)
