"""Codes by measured moments: by hand, against dense linear algebra, and what they are for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.kernels.assign import assign
from codeword.kernels.compensate import rising
from codeword.kernels.moments import assign_by_moments, assign_by_moments_numpy
from codeword.math.moments import Moments, factor

GRID = np.linspace(-3, 3, 13)
FREE = np.zeros(len(GRID))


def second(columns, seed=0):
    x = np.random.default_rng(seed).normal(size=(4 * columns, columns))
    x = x @ np.random.default_rng(seed + 1).normal(size=(columns, columns)) + 1
    return (x.T @ x / len(x)).astype(np.float32)


def weights(rows, columns, seed=2):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def test_codes_by_hand():
    """0.4 becomes 0; of the error, 0.4, half goes to the next weight, 0.6, which becomes 1; were bits dear, 0."""
    values, upper = np.full((1, 2), 0.4, np.float32), np.array([[1, -0.5], [0, 1]], np.float32)
    assert assign_by_moments(values, None, upper, np.array([0.0, 1.0]), np.zeros(2)).tolist() == [[0, 1]]
    assert assign_by_moments(values, None, upper, np.array([0.0, 1.0]), np.array([0, 0.21])).tolist() == [[0, 0]]
    assert assign_by_moments(2 * values, np.full(1, 2, np.float32), upper, np.array([0, 1]), FREE[:2]).tolist() == [
        [0, 1]
    ]


def test_a_price_weighs_less_where_later_weights_make_up_for_the_error():
    """0.6 costs 0.16 less as 1 than as 0, over U_ii**2: a price of 0.1 is too much for 2 and not for 1."""
    values, words, prices = np.full((1, 1), 0.6, np.float32), np.array([0.0, 1.0]), np.array([0, 0.1])
    for own, code in ((1.0, 1), (2.0, 0)):
        assert assign_by_moments(values, None, np.full((1, 1), own, np.float32), words, prices).tolist() == [[code]]


@pytest.mark.parametrize("columns", [1, 2, 9, 40])
def test_the_factor_is_that_of_the_damped_inverse(columns):
    h = second(columns).astype(np.float64)
    upper = factor(second(columns)).astype(np.float64)
    damped = h / np.diagonal(h).mean() + 0.01 * np.eye(columns)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(columns), atol=2e-3)
    assert np.array_equal(upper, np.triu(upper))
    assert (np.diagonal(upper) > 0).all()


def test_inputs_never_seen_and_a_scale_do_no_harm():
    h = second(6)
    h[2] = h[:, 2] = 0
    upper = factor(h)
    assert np.isfinite(upper).all()
    np.testing.assert_allclose(factor(h * np.float32(2.0**40)), upper, rtol=1e-6)
    np.testing.assert_allclose(upper[2], [0, 0, 10, 0, 0, 0], rtol=1e-6)  # 1 / sqrt(0.01): an error there is cheap


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (70, 45)])
def test_codes_equal_those_of_dense_linear_algebra(rows, columns):
    """After each code the columns left open are solved for anew: what the factor's recursion amounts to."""
    values, upper = weights(rows, columns), factor(second(columns))
    h = np.linalg.inv(upper.astype(np.float64).T @ upper)
    codes = assign_by_moments(values, None, upper, GRID, FREE)
    for row, found in zip(values.astype(np.float64), codes, strict=True):
        error = np.zeros(columns)
        for i in range(columns):
            open_, done = slice(i, columns), slice(0, i)
            wanted = row[i] - np.linalg.solve(h[open_, open_], h[open_, done] @ error[done])[0]
            nearest = np.abs(GRID - wanted)
            assert nearest[found[i]] <= nearest.min() + 1e-3
            error[i] = GRID[found[i]] - row[i]


def test_errors_cost_less_at_the_output_than_those_of_nearest_codewords():
    h, values = second(64), weights(50, 64)
    edges = ((GRID[1:] + GRID[:-1]) / 2).astype(np.float32)

    def cost(codes):
        error = GRID[codes] - values
        return float(np.einsum("ri,ij,rj->", error, h, error))

    assert cost(assign_by_moments(values, None, factor(h), GRID, FREE)) < 0.5 * cost(assign(values, None, edges))


def test_the_diagonal_of_groups():
    moments = Moments(np.stack([np.diag([1.0, 2.0]), np.diag([3.0, 4.0])]).astype(np.float32))
    assert moments.diagonal(4).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_few_vectors_are_trusted_less():
    second = np.eye(8, dtype=np.float32)[None]
    assert [Moments(second, count).damping for count in (None, 10**6, 320, 32, 4, 0)] == [
        0.01,
        0.01,
        0.01,
        pytest.approx(0.1),
        pytest.approx(0.8),
        pytest.approx(3.2),
    ]
    # U^T U is the inverse of 1 + damping: less of an error is passed on to inputs that hardly go together.
    for count, damping in ((None, 0.01), (32, 0.1)):
        (upper,) = Moments(second, count).factors
        np.testing.assert_allclose(upper, np.eye(8) / np.sqrt(1 + damping), rtol=1e-6)


@settings(deadline=None)
@given(st.integers(2, 24), st.integers(0, 2**32 - 1), st.floats(0.02, 4), st.floats(0, 3))
def test_the_cheapest_codeword_is_taken_even_where_prices_make_neighbours_useless(k, seed, own, dear):
    """Against a trial of every codeword: thresholds between neighbours may fall."""
    generator = np.random.default_rng(seed)
    words = np.unique(generator.normal(size=k).astype(np.float32)).astype(np.float64)
    prices = dear * generator.random(len(words))
    values = generator.normal(size=(200, 1)).astype(np.float32)
    cost = np.square((values - words) / own) + prices
    for run in (assign_by_moments, assign_by_moments_numpy):
        codes = run(values, None, np.full((1, 1), own, np.float32), words, prices)
        assert (np.take_along_axis(cost, codes.astype(np.intp), 1)[:, 0] <= cost.min(axis=1) * (1 + 1e-4) + 1e-6).all()


def test_rising_thresholds_by_hand():
    """From 0 to 1 at 3 and from 1 to 2 at 1: nobody takes 1, and 2 follows 0 at 2; wider gaps weigh more."""
    assert rising(np.array([3, 1], np.float32), np.ones(2, np.float32)).tolist() == [2, 2]
    assert rising(np.array([3, 1, 4], np.float32), np.array([1, 3, 1], np.float32)).tolist() == [1.5, 1.5, 4]
    assert rising(np.array([3, 2, 1], np.float32), np.ones(3, np.float32)).tolist() == [2, 2, 2]
    assert rising(np.array([1, 2, 3], np.float32), np.ones(3, np.float32)).tolist() == [1, 2, 3]


def test_an_error_costs_less_once_others_can_make_up_for_it():
    """Of two inputs that are equal but for the damping the first is free; the last costs what the diagonal says."""
    moments = Moments(np.array([[[4.0, 4], [4, 4]]], np.float32))
    first, last = moments.compensated(1)[0]
    assert first == pytest.approx(4 * (1.01 - 1 / 1.01), rel=1e-4)
    assert last == pytest.approx(4 * 1.01, rel=1e-6)
    assert moments.diagonal(1).tolist() == [[4, 4]]


def test_codewords_are_fitted_by_hand():
    """Inputs apart: a codeword is the mean of its members, by what the inputs and rows are worth."""
    moments = Moments(np.diag([1.0, 3.0]).astype(np.float32)[None], 10**9)
    values, codes = np.array([[1, 2], [3, 4]], np.float32), np.array([[0, 0], [0, 1]])
    book = moments.fitted(values, np.zeros(2, np.intp), np.array([1.0, 2]), codes, np.array([0.0, 0.0]))
    h = np.array([1, 3]) / 2 + 0.01
    want = (h[0] * 1 + h[1] * 2 + 2 * h[0] * 3) / (h[0] + h[1] + 2 * h[0])
    np.testing.assert_allclose(book, [want, 4], rtol=2e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_fitted_codewords_leave_no_better_ones(groups):
    moments = Moments(np.stack([second(6, seed) for seed in range(groups)]))
    values, generator = weights(8, 6), np.random.default_rng(0)
    codes, worth = generator.integers(0, 3, values.shape), generator.random(8) + 0.1

    def cost(book):
        error = book[codes] - values
        total = 0.0
        for row, owner, share in zip(error, moments.owners(8), worth, strict=True):
            h = moments.second[owner].astype(np.float64)
            total += share * row @ (h / np.diagonal(h).mean() + moments.damping * np.eye(6)) @ row
        return total

    book = moments.fitted(values, moments.owners(8), worth, codes, np.zeros(3))
    for step in np.vstack([np.eye(3), -np.eye(3)]) * 0.01:
        assert cost(book) < cost(book + step)
    # a codeword that nobody uses stays
    assert moments.fitted(values, moments.owners(8), worth, codes, np.array([0.0, 0, 0, 7]))[3] == pytest.approx(7)
    assert moments.fitted(values[:0], moments.owners(0), worth[:0], codes[:0], np.ones(2)).tolist() == [1, 1]


def test_the_group_of_each_row():
    moments = Moments(np.ones((3, 1, 1), np.float32))
    assert moments.owners(6).tolist() == [0, 0, 1, 1, 2, 2]


def test_of_many_rows_some_tell_the_codewords():
    """Rows that are all alike: whichever are read, the codewords are the same."""
    moments, row = Moments(second(400)[None]), weights(1, 400)
    values, codes = np.repeat(row, 4000, axis=0), np.repeat((row > 0).astype(int), 4000, axis=0)
    few, many = (moments.fitted(values[:n], moments.owners(n), np.ones(n), codes[:n], np.zeros(2)) for n in (64, 4000))
    np.testing.assert_allclose(many, few, rtol=1e-5)
