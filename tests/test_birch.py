"""BIRCH on a line: by hand, against scikit-learn, and the error target with the k that exact k-means needs for it."""

import numpy as np
import pytest

from codeword.errors import PlanError
from codeword.expr import decode, lookups
from codeword.math.bins import make_bins
from codeword.math.birch import birch, scan, sweep, threshold_of
from codeword.math.kmeans import kmeans
from codeword.math.starts import lloyd
from codeword.methods import Birch
from codeword.plan import Plan

METHODS = [Birch(20.0), Birch(20.0, "raw")]


def bins_of(values):
    return make_bins(np.asarray(values, np.float64).reshape(1, -1))


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def sqnr(weight, found, h=1.0):
    wide = weight.astype(np.float64)
    return 10 * np.log10(np.sum(h * wide**2) / np.sum(h * (found.astype(np.float64) - wide) ** 2))


# -- the scan -----------------------------------------------------------------------------------------------------


def test_scan_by_hand():
    # 0 and 2 make a radius of 1; 5 founds its own; 3.5 is nearer to 5 than to 1; 1 is a mean; 9 is far
    leaves = scan(np.array([0.0, 2, 5, 3.5, 1, 9]), 1.0)
    assert leaves.weight.tolist() == [3, 2, 1]
    assert leaves.first.tolist() == [3, 8.5, 9]
    assert leaves.second.tolist() == [5, 37.25, 81]
    assert leaves.means.tolist() == [1, 4.25, 9]


def test_scan_weighs_by_importance_and_skips_what_has_none():
    leaves = scan(np.array([0.0, 100, 1]), 1.0, np.array([3.0, 0, 1]))
    assert (leaves.weight.tolist(), leaves.means.tolist()) == ([4], [0.25])


def test_sweep_by_hand():
    assert sweep(bins_of([0, 1, 2, 10, 11, 30]), 1.0).means.tolist() == [1, 10.5, 30]
    assert sweep(bins_of([0, 1, 2]), 0.0).means.tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.02, 0.004])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])  # with fewer bits there are ties, which its order decides
def test_raw_scan_finds_the_clusters_of_scikit_learn(threshold, dtype):
    cluster = pytest.importorskip("sklearn.cluster")
    values = np.random.default_rng(3).normal(size=12_000).astype(dtype)
    peer = cluster.Birch(threshold=threshold, branching_factor=10_000, n_clusters=None)
    peer.fit(values[:, None].astype(np.float64))
    leaves = scan(values, threshold)
    order = np.argsort(peer.subcluster_centers_[:, 0])
    np.testing.assert_allclose(leaves.means, peer.subcluster_centers_[order, 0], rtol=0, atol=1e-12)
    counts = [sub.n_samples_ for sub in peer.root_.subclusters_]
    assert leaves.weight.tolist() == [counts[at] for at in order]


def test_scan_takes_values_of_any_shape_in_the_order_of_their_memory():
    values = np.random.default_rng(0).normal(size=(30, 40))
    flat = scan(values.reshape(-1), 0.1)
    for here in (values, np.asfortranarray(values), values.reshape(3, 10, 40)):
        np.testing.assert_array_equal(scan(here, 0.1), flat)
    assert scan(values[:0], 0.1).weight.shape == (0,)
    assert scan(values, 0.1, np.zeros(values.shape)).means.shape == (0,)


def test_a_threshold_of_nothing_leaves_what_is_equal_together():
    values = np.random.default_rng(0).integers(-1500, 1500, 9000) / 8
    distinct, counts = np.unique(values, return_counts=True)
    leaves = scan(values, 0.0)
    np.testing.assert_array_equal(leaves.means, distinct)
    np.testing.assert_array_equal(leaves.weight, counts)


@pytest.mark.parametrize("threshold", [0.5, 0.05, 0.005])
def test_leaves_hold_everything_and_stay_within_the_radius(threshold):
    values = np.random.default_rng(0).laplace(size=5000)
    for leaves in (scan(values, threshold), sweep(bins_of(values), threshold)):
        assert leaves.weight.sum() == 5000
        assert leaves.first.sum() == pytest.approx(values.sum())
        assert leaves.second.sum() == pytest.approx((values**2).sum())
        assert np.all(np.diff(leaves.means) > 0)
        assert np.all(leaves.second / leaves.weight - leaves.means**2 <= threshold**2 * (1 + 1e-6))


# -- the number of codewords --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("db", [6, 15, 25, 40])
@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_the_target_is_met_by_hardly_more_codewords_than_the_optimum_needs(draw, db, raw):
    values = getattr(np.random.default_rng(1), draw)(size=(1, 20_000)).astype(np.float32)
    bins = make_bins(values)
    target = bins.energy * 10 ** (-db / 10)
    threshold = threshold_of(bins, target)
    leaves = scan(values, threshold) if raw else sweep(bins, threshold)
    found = birch(bins, leaves, target, np.random.default_rng(0))
    k = len(found.codebook)
    assert found.sse <= target
    assert kmeans(bins, int(k / 1.06) - 1).sse > target
    assert lloyd(bins, found.codebook).sse == pytest.approx(found.sse, rel=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_file_holds_meets_the_target(method):
    weight = np.random.default_rng(2).laplace(size=(70, 90)).astype(np.float32)
    for h in (None, np.random.default_rng(0).random(weight.shape).astype(np.float32)):
        expr = compress(method, weight, h)
        assert sqnr(weight, decode(expr), 1.0 if h is None else h) >= 20
        (lookup,) = lookups(expr)
        assert 12 <= lookup.codebook.shape[1] <= 28


@pytest.mark.parametrize("scan", ["bins", "raw"])
def test_small_rows_are_not_rounded_away_by_large_ones(scan):
    """By the tensor the target is that of the large rows; by rows it holds for each row over its size."""
    weight = np.random.default_rng(2).normal(size=(40, 90)).astype(np.float32)
    weight[::2] *= np.float32(1e-3)
    by_tensor, by_row = (compress(Birch(20.0, scan, granularity), weight) for granularity in ("tensor", "row"))
    assert sqnr(weight[::2], decode(by_tensor)[::2]) < 5
    assert sqnr(weight[::2], decode(by_row)[::2]) == pytest.approx(sqnr(weight[1::2], decode(by_row)[1::2]), abs=1)
    size = np.sqrt(np.mean(np.square(weight), axis=1, keepdims=True))
    assert sqnr(weight / size, decode(by_row) / size) > 19.8  # sizes are stored to two bits of mantissa
    assert next(lookups(by_row)).codebook.shape[1] <= 1.3 * next(lookups(by_tensor)).codebook.shape[1]


def test_more_decibels_take_more_codewords_and_sixty_are_reached():
    weight = np.random.default_rng(2).normal(size=(60, 80)).astype(np.float32)
    sizes = []
    for db in (1.0, 10.0, 30.0, 60.0):
        (lookup,) = lookups(expr := compress(Birch(db), weight))
        assert sqnr(weight, decode(expr)) >= db
        sizes.append(lookup.codebook.shape[1])
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 2


# -- hard data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(), (1,), (5,), (3, 4), (2, 3, 3, 3)])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, 3e38, 1e-40])
def test_constants_take_one_codeword(method, dims, value):
    weight = np.full(dims, value, np.float32)
    expr = compress(method, weight)
    np.testing.assert_allclose(decode(expr), weight, rtol=1e-6, atol=2e-45)
    assert next(lookups(expr)).codebook.shape[1] == 1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hard_values(method):
    generator = np.random.default_rng(0)
    outlier = (generator.normal(size=(30, 30)) * 1e-3).astype(np.float32)
    outlier[7, 9] = 1e30
    found = decode(compress(method, outlier))
    assert found[7, 9] == pytest.approx(1e30, rel=1e-6)
    assert np.abs(found).min() < 1
    denormal = (generator.normal(size=(20, 20)) * 1e-40).astype(np.float32)
    assert sqnr(denormal, decode(compress(method, denormal))) > 19
    for weight in (outlier, denormal):
        assert np.isfinite(decode(compress(method, weight, np.zeros(weight.shape, np.float32)))).all()
    assert decode(compress(method, np.zeros((0, 3), np.float32))).shape == (0, 3)


@pytest.mark.parametrize("db", [0.0, -1.0, 60.5, float("nan"), float("inf")])
def test_wrong_targets_are_plan_errors(db):
    with pytest.raises(PlanError, match="birch: sqnr_db must lie above 0 and up to 60"):
        Birch(db)


def test_plans_name_it():
    rule = {"tensors": "*", "method": "birch", "sqnr_db": 25, "scan": "raw"}
    plan = Plan.from_dict({"rule": [rule]})
    assert plan.rules[0].method == Birch(25.0, "raw")
    assert Plan.from_dict(plan.to_dict()) == plan
