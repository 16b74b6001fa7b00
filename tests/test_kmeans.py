"""Exact one-dimensional k-means: against brute force, against kmeans1d, and on data that trips up others."""

from importlib import resources

import kmeans1d
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.kernels.assign import assign, assign_weighted, cluster_sums, code_dtype
from codeword.kernels.histogram import histogram
from codeword.kernels.partition import best_partition, best_path, interval_cost
from codeword.math.bins import assign_members, make_bins
from codeword.math.kmeans import kmeans, midpoints, sse_curve
from codeword.safetensors_file import read_header, read_tensor

LENET5 = resources.files("codeword") / "zoo" / "lenet5.safetensors"  # not by codeword.zoo, which needs torch


def bins_of(values, importance=None):
    rows = np.asarray(values, np.float64).reshape(1, -1)
    return make_bins(rows, None, None if importance is None else np.asarray(importance).reshape(1, -1))


def partitions(items, k):
    """All ways to put items into at most k groups, whether or not they are intervals."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:], k):
        for at in range(len(rest)):
            yield [*rest[:at], [items[0], *rest[at]], *rest[at + 1 :]]
        if len(rest) < k:
            yield [*rest, [items[0]]]


def brute(values, weights, k):
    """Smallest SSE over all partitions."""

    def cost(group):
        w, x = weights[group], values[group]
        mean = np.average(x, weights=w) if w.sum() > 0 else 0.0
        return float(w @ (x - mean) ** 2)

    return min(sum(cost(group) for group in groups) for groups in partitions(list(range(len(values))), k))


def measured(values, codebook, weights=None):
    """SSE of nearest-codeword assignment."""
    values = np.asarray(values, np.float64).reshape(-1)
    error = (values - codebook[np.searchsorted(midpoints(codebook), values)]) ** 2
    return float(error.sum() if weights is None else error @ np.asarray(weights).reshape(-1))


# -- against brute force ------------------------------------------------------------------------------------------

SMALL = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=7)


@settings(deadline=None)
@given(SMALL, st.integers(1, 8))
def test_no_partition_is_better(values, k):
    values = np.array(values)
    found = kmeans(bins_of(values), k)
    best = brute(values, np.ones(len(values)), k)
    assert found.sse == pytest.approx(best, abs=1e-9)
    assert measured(values, found.codebook) == pytest.approx(best, abs=1e-9)
    assert len(found.codebook) == min(k, len(np.unique(values)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 9)), min_size=1, max_size=7), st.integers(1, 4))
def test_no_partition_is_better_with_importance(pairs, k):
    values, weights = np.array(pairs).T
    found = kmeans(bins_of(values, weights), k)
    best = brute(values, weights, k)
    assert found.sse == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert measured(values, found.codebook, weights) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_by_hand():
    found = kmeans(bins_of([0, 1, 10, 11, 12]), 2)
    assert found.codebook.tolist() == [0.5, 11]
    assert found.edges.tolist() == [0, 2, 5]
    assert found.sse == 2.5
    assert kmeans(bins_of([0, 1, 3]), 2).edges.tolist() == [0, 2, 3]
    assert kmeans(bins_of([0, 1, 3], [100.0, 100, 1]), 2).edges.tolist() == [0, 1, 3]


def test_zero_can_be_a_codeword():
    values = [-4.0, -3, 0.2, 0.4, 5]
    assert kmeans(bins_of(values), 3).codebook.tolist() == pytest.approx([-3.5, 0.3, 5])
    found = kmeans(bins_of(values), 3, zero=True)
    assert found.codebook.tolist() == [-3.5, 0, 5]
    assert found.sse == pytest.approx(0.5 + 0.04 + 0.16)
    assert kmeans(bins_of([3.0, 3.5]), 1, zero=True).codebook.tolist() == [0]


# -- degenerate data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.0] * 5, [7.25] * 5, [-3.0], [1e-40, 1e-40], [-0.0, 0.0]])
@pytest.mark.parametrize("k", [1, 2, 300])
def test_one_distinct_value_is_one_codeword(values, k):
    found = kmeans(bins_of(values), k)
    assert found.codebook.tolist() == [values[0]]
    assert found.sse == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("k", [3, 4, 100])
def test_fewer_distinct_values_than_codewords_are_held_exactly(k):
    found = kmeans(bins_of([1.5, -2, 1.5, 1e-3]), k)
    assert found.codebook.tolist() == [-2, 1e-3, 1.5]


@pytest.mark.parametrize("outlier", [1e30, -1e30])
def test_an_outlier_spoils_nothing(outlier):
    small = np.array([1e-3, 1.1e-3, 2e-3, 2.1e-3, -5e-3])
    found = kmeans(bins_of([*small, outlier]), 4)
    assert sorted(found.codebook, key=abs) == pytest.approx([1.05e-3, 2.05e-3, -5e-3, outlier])


def test_denormals_are_clustered():
    values = np.array([1e-40, 1.1e-40, 3e-40, -2e-40], np.float32)
    found = kmeans(bins_of(values), 3)
    assert found.codebook == pytest.approx([-2e-40, 1.05e-40, 3e-40], rel=1e-4)


def test_values_without_importance_do_not_matter():
    found = kmeans(bins_of([0, 1, 2, 50], [1.0, 1, 1, 0]), 2)
    assert found.sse == pytest.approx(0.5)
    assert np.isfinite(kmeans(bins_of([1, 2, 3], [0.0, 0, 0]), 2).codebook).all()


# -- against kmeans1d on real weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    return read_tensor(LENET5, read_header(LENET5).entries["fc1.weight"])


def reference(values, k):
    clusters, centroids = kmeans1d.cluster(values.astype(np.float64).tolist(), k)
    return float(np.sum((values - np.array(centroids)[np.array(clusters)]) ** 2))


@pytest.mark.parametrize("k", [4, 16, 64])
def test_as_good_as_kmeans1d(weights, k):
    values = weights.reshape(-1)[:100_000]
    found = kmeans(make_bins(values.reshape(1, -1)), k)
    best = reference(values, k)
    assert best * (1 - 1e-9) <= measured(values, found.codebook) <= best * 1.0002
    assert found.sse == pytest.approx(measured(values, found.codebook), rel=1e-6)


def test_as_good_as_kmeans1d_on_the_histogram(weights):
    assert weights.size > 1 << 18  # so many that bins are not distinct values
    found = kmeans(make_bins(weights), 16)
    assert measured(weights, found.codebook) <= reference(weights.reshape(-1), 16) * 1.0002


@pytest.mark.parametrize(("spread", "k"), [("normal", 48), ("laplace", 90), ("standard_t", 100), ("bimodal", 64)])
def test_no_other_clustering_of_the_bins_is_better(spread, k):
    generator = np.random.default_rng(7)
    draw = {
        "normal": generator.normal,
        "laplace": generator.laplace,
        "standard_t": lambda size: generator.standard_t(3, size),
        "bimodal": lambda size: generator.choice([-1, 1], size) * generator.normal(1, 0.3, size),
    }[spread]
    bins = make_bins(draw(size=(1, 300_000)).astype(np.float32))
    assert kmeans(bins, k).sse <= best_partition(bins.prefix, k)[0][-1] * 1.0001


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows_scaled", [False, True])
def test_members_need_no_second_pass(dtype, rows_scaled):
    generator = np.random.default_rng(3)
    values = generator.standard_t(3, (300, 1000))
    values[::2] = generator.integers(-20, 20, (150, 1000)) / 8  # many equal, and equal to thresholds
    values[::3] *= generator.choice([-0.0, 0.0, 1.0], (100, 1000))
    values = values.astype(dtype)
    scale = np.linspace(0.5, 2, 300, dtype=np.float32) if rows_scaled else None
    bins = make_bins(values, scale)
    near = 0.5 + np.arange(5) * 1e-6  # more than one threshold in a bin
    for thresholds in ([], [0.0], [-0.0, 0.0], near, np.sort(generator.normal(size=300)), [-99.0, 99, 1e6]):
        thresholds = np.array(thresholds, np.float64)
        codes, mass, first = assign_members(bins, values, scale, None, thresholds)
        expected = assign(values, scale, thresholds)
        _, count, moment = cluster_sums(values, scale, None, expected, len(thresholds) + 1)
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(mass, count)
        np.testing.assert_allclose(first, moment, rtol=1e-9, atol=1e-9)


def test_the_curve_falls_and_is_what_kmeans_reaches(weights):
    bins = make_bins(weights)
    curve = sse_curve(bins, 64)
    assert len(curve) == 64
    assert np.all(np.diff(curve) <= 0)
    for k in (1, 2, 3, 8, 30, 64):
        assert curve[k - 1] == pytest.approx(kmeans(bins, k).sse, rel=0.01)


def test_row_scales_divide_before_clustering():
    values = np.array([[1, 2, 1, 2], [10, 20, 20, 10]], np.float32)
    found = kmeans(make_bins(values, np.array([1, 10], np.float32)), 2)
    assert found.codebook.tolist() == [1, 2]


# -- kernels ------------------------------------------------------------------------------------------------------


def test_the_histogram_keeps_all_sums():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 50)).astype(np.float32) * np.logspace(-30, 30, 50, dtype=np.float32)
    h = generator.random((30, 50))
    scale = generator.random(30).astype(np.float32) + 1
    sums = histogram(values, scale, h)
    scaled = (values / scale[:, None]).astype(np.float64)
    assert sums[0].sum() == 1500
    for found, power in zip(sums[1:], range(3), strict=True):
        np.testing.assert_allclose(np.abs(found).sum(), np.abs(h * scaled**power).sum(), rtol=1e-9)
    means = sums.first / sums.weight
    assert np.all(np.diff(means) > 0)
    spread = np.sqrt(np.maximum(sums.second / sums.weight - means**2, 0))
    assert np.all(spread <= 2.0**-11 * np.abs(means))


def test_best_partition_is_the_dynamic_program():
    generator = np.random.default_rng(0)
    x = np.sort(generator.normal(size=40))
    prefix = np.stack([np.concatenate([[0], np.cumsum(x**power)]) for power in range(3)])
    layer = interval_cost(prefix, np.zeros(1, np.int64), np.arange(41))
    expected = [layer[-1]]
    for _ in range(4):
        table = np.array([[layer[i] + interval_cost(prefix, np.array([i]), np.array([j]))[0] for i in range(j + 1)]
                          + [np.inf] * (40 - j) for j in range(41)])  # fmt: skip
        layer = table.min(axis=1)
        expected.append(layer[-1])
    curve, edges = best_partition(prefix, 5)
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    assert interval_cost(prefix, edges[:-1], edges[1:]).sum() == pytest.approx(expected[-1])
    assert (edges[0], edges[-1]) == (0, 40)


def test_best_path_tries_every_combination():
    x = np.array([0.0, 1, 5, 6, 20, 21])
    prefix = np.stack([np.concatenate([[0], np.cumsum(x**power)]) for power in range(3)])
    candidates = np.array([[1, 2, 3], [3, 4, 5]])
    assert best_path(candidates, prefix).tolist() == [2, 4]


def test_assignment_at_a_threshold_goes_down_and_neighbouring_floats_stay_apart():
    values = np.array([[0.0, 0.5, 0.50001, 1]], np.float32)
    assert assign(values, None, np.array([0.5])).tolist() == [[0, 0, 1, 1]]
    one = np.float32(1)
    ulps = np.array([[one, np.nextafter(one, 2 * one), np.nextafter(np.nextafter(one, 2 * one), 2 * one)]])
    assert assign(ulps, None, midpoints(ulps[0])).tolist() == [[0, 1, 2]]


def test_weighted_assignment_by_hand():
    # 0.6 to 0 or 1, where 1 costs 0.3: 0.36 h against 0.16 h + 0.3, equal at h = 1.5
    values, h = np.full((1, 3), 0.6, np.float32), np.array([[0, 1.4, 1.6]])
    assert assign_weighted(values, None, h, np.array([0.0, 1]), np.array([0, 0.3])).tolist() == [[0, 0, 1]]


def test_cluster_sums_by_hand():
    values = np.array([[1, 2], [30, 40]], np.float32)
    codes, h = np.array([[0, 1], [1, 1]], np.uint8), np.array([[1.0, 2], [3, 4]])
    count, weight, first = cluster_sums(values, np.array([1, 10], np.float32), h, codes, 3)
    assert (count.tolist(), weight.tolist(), first.tolist()) == ([1, 3, 0], [1, 9, 0], [1, 4 + 9 + 16, 0])


def test_codes_take_the_smallest_dtype():
    assert [code_dtype(k).itemsize for k in (1, 256, 257, 65536, 65537)] == [1, 1, 2, 2, 4]
