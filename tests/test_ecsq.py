"""Rate-aware clustering: better than k-means plus entropy coding at the same price of a bit, and optimal in itself."""

import numpy as np
import pytest

from codeword.math.bins import make_bins
from codeword.math.ecsq import MAX_CODEWORDS, ecsq
from codeword.math.kmeans import kmeans, midpoints

LAMBDAS = [0.003, 0.02, 0.1, 0.4]


def laplacian(n=40_000, seed=0):
    return np.random.default_rng(seed).laplace(scale=np.sqrt(0.5), size=(1, n)).astype(np.float32)


@pytest.fixture(scope="module")
def values():
    return laplacian()


@pytest.fixture(scope="module")
def bins(values):
    return make_bins(values)


def codes_of(values, thresholds):
    return np.searchsorted(thresholds, np.asarray(values, np.float64).reshape(-1))


def entropy_bits(codes):
    counts = np.bincount(codes)
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(codes) / counts))


def measured(values, codewords, thresholds):
    """(sse, empirical entropy in bits) of what the thresholds assign."""
    codes = codes_of(values, thresholds)
    return float(np.sum((values.reshape(-1) - codewords[codes]) ** 2)), entropy_bits(codes)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_never_worse_than_kmeans_at_the_same_price_of_a_bit(values, bins, lam, free):
    found = ecsq(bins, lam, free=free)
    sse, bits = measured(values, found.codewords, found.thresholds)
    ours = sse + lam * bits
    for k in (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 64):
        codebook = kmeans(bins, k).codebook
        sse, bits = measured(values, codebook, midpoints(codebook))
        assert ours <= (sse + lam * bits) * 1.001, k


def test_saves_what_the_paper_says(values, bins):
    # Wiedemann et al. 2019: 0.3 to 1.2 bits a weight against fixed-length k-means of the same error.
    codebook = kmeans(bins, 16).codebook
    sse, _ = measured(values, codebook, midpoints(codebook))
    lam = min(np.logspace(-3, -1, 40), key=lambda lam: abs(ecsq(bins, lam, free=True).sse - sse))
    assert 4 - ecsq(bins, lam, free=True).bits / values.size > 0.3


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_what_it_says_of_itself_is_so(values, bins, lam, free):
    found = ecsq(bins, lam, free=free)
    assert np.all(np.diff(found.codewords) > 0)
    assert np.all(np.diff(found.thresholds) >= 0)
    assert np.sum(found.codewords == 0) == 1
    sse, bits = measured(values, found.codewords, found.thresholds)
    assert found.sse + lam * found.bits == pytest.approx(sse + lam * bits, rel=1e-3)
    # Prices are what an adaptive coder charges for the codes that are assigned.
    codes = codes_of(values, found.thresholds)
    share = np.bincount(codes, minlength=len(found.codewords)) / values.size
    common = share > 0.01
    np.testing.assert_allclose(found.prices[common], -np.log2(share[common]), atol=0.1)
    assert float(found.prices[codes].sum()) == pytest.approx(bits, rel=2e-3)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_every_value_has_its_cheapest_codeword(values, bins, lam, free):
    found = ecsq(bins, lam, free=free)
    some = values.reshape(-1)[::20].astype(np.float64)
    cost = (some[:, None] - found.codewords) ** 2 + lam * found.prices
    chosen = cost[np.arange(len(some)), codes_of(some, found.thresholds)]
    np.testing.assert_allclose(chosen, cost.min(axis=1), atol=1e-9)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_codewords_are_multiples_of_a_grid_or_means(values, bins, lam):
    grid = ecsq(bins, lam, free=False)
    steps = grid.codewords / grid.grid
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)
    free = ecsq(bins, lam, free=True)
    assert free.grid is None
    codes, flat = codes_of(values, free.thresholds), values.reshape(-1).astype(np.float64)
    means = np.bincount(codes, flat) / np.bincount(codes)
    common = (np.bincount(codes) > 500) & (free.codewords != 0)
    np.testing.assert_allclose(free.codewords[common], means[common], rtol=0.03)


def test_a_dearer_bit_means_fewer_bits_and_more_error(bins):
    found = [ecsq(bins, lam, free=False) for lam in np.logspace(-4, 0.5, 25)]
    bits, sse = (np.array([getattr(book, part) for book in found]) for part in ("bits", "sse"))
    assert np.all(np.diff(bits) <= 1e-3 * bits[:-1])
    assert np.all(np.diff(sse) >= -1e-3 * sse[:-1])
    assert bits[-1] < 0.05 * bits[0]


def test_at_a_great_price_all_is_zero(bins):
    found = ecsq(bins, 1e6, free=True)
    assert found.codewords.tolist() == [0]
    assert found.bits == 0
    assert found.sse == pytest.approx(bins.energy)


def test_a_tiny_input_by_hand():
    # At this price 100 zeros and one 8: 8 costs log2(101) + 100 log2(101/100) = 8.1 bits more than to drop it, 64.
    bins = make_bins(np.array([[0.0] * 100 + [8.0]]))
    kept, dropped = ecsq(bins, 5, free=True), ecsq(bins, 10, free=True)
    assert kept.codewords.tolist() == [0, 8]
    assert kept.bits == pytest.approx(np.log2(101) + 100 * np.log2(1.01))
    assert kept.prices == pytest.approx([np.log2(1.01), np.log2(101)])
    assert dropped.codewords.tolist() == [0]
    assert dropped.sse == 64


def test_importance_moves_codewords():
    # Two values of equal number: the free codeword that they share is their mean, weighted by importance.
    rows = np.array([[5.0] * 50 + [5.2] * 50 + [0.0] * 50])
    weights = np.array([[9.0] * 50 + [1.0] * 50 + [5.0] * 50])
    assert ecsq(make_bins(rows), 0.05, free=True).codewords == pytest.approx([0, 5.1])
    assert ecsq(make_bins(rows, None, weights), 0.5, free=True).codewords == pytest.approx([0, 5.02])


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 16, MAX_CODEWORDS])
@pytest.mark.parametrize("free", [True, False])
def test_no_more_codewords_than_allowed_and_they_reach_over_the_range(bins, most, free):
    found = ecsq(bins, 1e-9, free=free, max_codewords=most)
    assert len(found.codewords) <= most
    assert 0 in found.codewords
    if most > 2:
        assert found.codewords[0] < -1
        assert found.codewords[-1] > 1
        assert found.sse < bins.energy


@pytest.mark.parametrize("values", [[0.0], [0.0] * 9, [3.5], [-2.0] * 4, [1e-30, -1e-30], [1e30, 1e-3]])
@pytest.mark.parametrize("free", [True, False])
def test_degenerate_input(values, free):
    bins = make_bins(np.array([values]))
    found = ecsq(bins, 0.01 * bins.energy / len(values), free=free)
    assert np.isfinite(found.codewords).all()
    assert 0 in found.codewords
    sse, _ = measured(np.array(values), found.codewords, found.thresholds)
    assert sse <= 0.1 * bins.energy
