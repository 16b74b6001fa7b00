"""Lloyd's algorithm from its starts, and clustering by the distribution: by hand, against the optimum, on hard data."""

from importlib import resources

import msgspec
import numpy as np
import pytest

from codeword.errors import PlanError
from codeword.expr import DTYPES, decode, lookups, shape
from codeword.math.bins import make_bins
from codeword.math.density import density_kmeans, density_start
from codeword.math.kmeans import kmeans
from codeword.math.starts import linear_start, lloyd, plus_plus, plus_plus_start, random_start
from codeword.methods import BuiltIn, DensityKMeans, KMeans, Lloyd
from codeword.plan import Plan
from codeword.safetensors_file import read_header, read_tensor
from round_trip import error, restored

LENET5 = resources.files("codeword") / "zoo" / "lenet5.safetensors"
STARTS = ["linear", "random", "kmeans++", "density"]
METHODS = [
    *(Lloyd(4, start) for start in STARTS),
    Lloyd(4, granularity="row"),
    DensityKMeans(4),
    DensityKMeans(4, granularity="row"),
    DensityKMeans(lam=0.02),
    DensityKMeans(lam=0.02, granularity="row"),
]


def bins_of(values, importance=None):
    rows = np.asarray(values, np.float64).reshape(1, -1)
    return make_bins(rows, None, None if importance is None else np.asarray(importance, np.float64).reshape(1, -1))


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def laplacian(*dims, seed=0):
    return np.random.default_rng(seed).laplace(size=dims).astype(np.float32)


# -- by hand ------------------------------------------------------------------------------------------------------


def test_lloyd_by_hand():
    # 0 1 | 10 11 12 from 0 and 1: borders at 0.5, then means 0 and 8.5, then 0.5 and 11, then no more gain
    found = lloyd(bins_of([0, 1, 10, 11, 12]), np.array([0.0, 1]))
    assert found.codebook.tolist() == [0.5, 11]
    assert found.edges.tolist() == [0, 2, 5]
    assert (found.sse, found.iterations) == (2.5, 3)


def test_lloyd_weighs_by_importance_and_drops_codewords_without_members():
    found = lloyd(bins_of([0, 1, 10], [1.0, 3, 1]), np.array([0.0, 5, 5.1, 10]))
    assert found.codebook.tolist() == [0.75, 10]
    assert found.sse == pytest.approx(0.75)


def test_linear_is_even_and_random_is_from_the_weights():
    bins = bins_of([0, 1, 2, 8])
    assert linear_start(bins, 5).tolist() == [0, 2, 4, 6, 8]
    drawn = random_start(bins_of([0, 1, 2, 8], [1.0, 0, 1, 1]), 3, np.random.default_rng(0))
    assert sorted(drawn) == [0, 2, 8]


def test_plus_plus_prefers_what_is_far_and_stops_when_nothing_is():
    points, weight = np.array([0.0, 0.1, 100]), np.array([10.0, 10, 1])
    for seed in range(5):
        assert 100 in plus_plus(points, weight, 2, np.random.default_rng(seed))
        assert sorted(plus_plus(points, weight, 9, np.random.default_rng(seed))) == [0, 0.1, 100]


def test_density_start_of_even_weights_is_even():
    values = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_allclose(density_start(bins_of(values), 8), (np.arange(8) + 0.5) / 8, atol=0.01)


def test_density_start_leaves_a_gap_empty():
    values = np.concatenate([np.linspace(-2, -1, 1000), np.linspace(1, 2, 1000)])
    codebook = density_start(bins_of(values), 32)
    assert np.sum(np.abs(codebook) < 0.9) == 0
    assert 14 <= np.sum(codebook < 0) <= 18


def test_a_codeword_moves_to_where_it_is_missed():
    # Four far groups of which Lloyd, started with three codewords in one of them, leaves two together.
    values = np.concatenate([at + np.linspace(0, 1, 50) for at in (0, 100, 200, 300)])
    stuck = lloyd(bins_of(values), np.array([0.2, 0.5, 0.8, 200]))
    assert stuck.sse > 1000
    assert density_kmeans(bins_of(values), 4).sse == pytest.approx(kmeans(bins_of(values), 4).sse)


# -- against the optimum and the other starts ---------------------------------------------------------------------


def distributions():
    generator = np.random.default_rng(0)
    normal = generator.normal(size=4_000_000)
    return {
        "gaussian": normal[:1_000_000],
        "laplacian": generator.laplace(size=1_000_000),
        "bimodal": normal[np.abs(normal) > 1.15],
        "fc1": read_tensor(LENET5, read_header(LENET5).entries["fc1.weight"]),
    }


@pytest.fixture(scope="module")
def histograms():
    return {name: make_bins(values.astype(np.float32).reshape(1, -1)) for name, values in distributions().items()}


@pytest.mark.parametrize("k", [16, 64, 256])
@pytest.mark.parametrize("name", ["gaussian", "laplacian", "bimodal", "fc1"])
def test_the_density_leads_lower_than_every_other_start_and_near_the_optimum(histograms, name, k):
    bins = histograms[name]
    found, best = density_kmeans(bins, k), kmeans(bins, k).sse
    assert len(found.codebook) == k
    assert best * (1 - 1e-9) <= found.sse <= best * (1.06 if (name, k) == ("bimodal", 256) else 1.02)
    for start in STARTS:
        other = Lloyd(k, start).cluster(bins, np.random.default_rng(1))
        assert found.sse < other.sse, start
        if start in ("linear", "random") and other.sse < 2 * best:  # one that gave up early is quick, and useless
            assert found.iterations < other.iterations


def test_the_number_of_codewords_is_found(histograms):
    for bins in histograms.values():
        numbers = []
        for lam in (1e-3, 1e-2, 1e-1):
            found = density_kmeans(bins, lam=lam)
            k = len(found.codebook)
            cost, near = (
                it.sse / bins.energy + lam * entropy(bins, it.edges)
                for it in (found, min((kmeans(bins, j) for j in (k // 2, k, 2 * k)), key=lambda it: it.sse))
            )
            assert cost < near
            assert found.sse < 2 * lam * bins.energy
            numbers.append(k)
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] > 2 * numbers[2]


def entropy(bins, edges):
    share = np.diff(bins.counts[edges]) / bins.n
    return float(-share[share > 0] @ np.log2(share[share > 0]))


# -- the methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(), (1,), (17,), (4, 6), (1, 9), (9, 1), (3, 2, 3, 3), (0,), (0, 3), (2, 0, 3, 3)])
def test_the_shape_comes_back_from_a_file(method, dims):
    weight = laplacian(*dims)
    expr = compress(method, weight)
    assert shape(expr) == dims
    np.testing.assert_array_equal(restored(expr, weight), decode(expr))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_floating_dtype(method, dtype):
    weight = laplacian(20, 30).astype(DTYPES[dtype])
    assert error(decode(compress(method, weight)), weight) < 0.3


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, 3e38, 1e-40])
def test_constants_come_back(method, value):
    weight = np.full((4, 5), value, np.float32)
    found = decode(compress(method, weight))
    np.testing.assert_allclose(found, weight, rtol=1e-6, atol=2e-45)
    assert not np.signbit(found).any() or value < 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hard_values_stay_finite(method):
    outlier = laplacian(30, 30) * np.float32(1e-3)
    outlier[7, 9] = 1e30
    lone = np.zeros((2, 3000), np.float32)
    lone[0, 0] = 1e-45
    denormal = (laplacian(20, 20).astype(np.float64) * 1e-40).astype(np.float32)
    for weight in (outlier, lone, denormal):
        for h in (None, np.ones(weight.shape, np.float32), np.zeros(weight.shape, np.float32)):
            assert np.isfinite(decode(compress(method, weight, h))).all()
    assert decode(compress(method, outlier))[7, 9] == pytest.approx(1e30, rel=1e-4)


@pytest.mark.parametrize("method", [Lloyd(300, start) for start in STARTS] + [DensityKMeans(300)], ids=str)
def test_fewer_distinct_values_than_codewords_are_held_exactly(method):
    weight = np.array([[1.5, -2, 1.5, 1e-3]], np.float32)
    np.testing.assert_array_equal(decode(compress(method, weight)), weight)
    one = np.array([3.0], np.float32)
    np.testing.assert_array_equal(decode(compress(method, one)), one)


@pytest.mark.parametrize("method", [it for it in METHODS if it.n_clusters], ids=str)
def test_importance_moves_error_to_where_it_costs_less(method):
    weight, importance = laplacian(40, 40), np.ones((40, 40), np.float32)
    importance[:, :4] = 100
    plain, weighted = (decode(compress(method, weight, h)) for h in (None, importance))
    assert error(weighted[:, :4], weight[:, :4]) < error(plain[:, :4], weight[:, :4])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_is_a_pure_function_and_data(method):
    weight = laplacian(10, 12)
    before = weight.copy()
    np.testing.assert_array_equal(decode(compress(method, weight)), decode(compress(method, weight)))
    np.testing.assert_array_equal(weight, before)
    assert msgspec.convert(msgspec.to_builtins(method), BuiltIn) == method


def test_random_starts_follow_the_generator():
    weight = laplacian(60, 60)
    method = Lloyd(16, "random")
    first, second = (decode(method.compress(weight, None, generator=np.random.default_rng(s))) for s in (1, 2))
    assert np.any(first != second)


def test_few_weights_leave_the_density_a_little_above_the_optimum():
    weight = laplacian(100, 100)
    best = error(decode(compress(KMeans(16), weight)), weight)
    assert error(decode(compress(DensityKMeans(16), weight)), weight) < 1.05 * best
    (lookup,) = lookups(compress(DensityKMeans(16), weight))
    assert lookup.codebook.shape == (1, 16, 1)


def test_plus_plus_looks_at_super_bins_only():
    bins = bins_of(np.random.default_rng(0).normal(size=20_000))
    assert len(np.unique(plus_plus_start(bins, 40, np.random.default_rng(0)))) == 40


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "lloyd", "n_clusters": 0}, "lloyd: n_clusters must lie in 1..65536, got 0"),
        ({"method": "lloyd", "n_clusters": 4, "start": "sorted"}, "start: Invalid enum value 'sorted'"),
        (
            {"method": "lloyd", "n_clusters": 4097, "start": "kmeans++"},
            "kmeans++ takes n_clusters up to 4096, got",
        ),
        ({"method": "density-kmeans", "n_clusters": 65537}, "got 65537"),
        ({"method": "density-kmeans", "lam": 0.0}, "lam must be a positive number, got 0"),
        ({"method": "density-kmeans", "lam": float("nan")}, "nan"),
    ],
)
def test_wrong_options_are_plan_errors(fields, says):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({"rule": [{"tensors": "*"} | fields]})
    assert says in str(caught.value)


def test_plans_name_them(tmp_path):
    text = """
[[rule]]
tensors = "fc*"
method = "lloyd"
n_clusters = 16
start = "kmeans++"

[[rule]]
tensors = "*"
method = "density-kmeans"
lam = 0.05
granularity = "row"
"""
    path = tmp_path / "plan.toml"
    path.write_text(text)
    plan = Plan.load(path)
    assert [rule.method for rule in plan.rules] == [Lloyd(16, "kmeans++"), DensityKMeans(lam=0.05, granularity="row")]
    plan.save(path)
    assert Plan.load(path) == plan
