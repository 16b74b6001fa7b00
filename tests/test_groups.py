"""Codebooks of groups: the optimum for each, the same bits natively, and rows of a tensor that share a codebook."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import codeword
from codeword import Keep, KMeans, Plan, Rule
from codeword.errors import PlanError
from codeword.expr import DTYPES, decode, lookups, shape
from codeword.kernels import chunks, groups, native
from codeword.kernels.groups import cluster_groups, cluster_groups_numpy
from codeword.math.bins import make_bins
from codeword.math.kmeans import kmeans
from codeword.methods import scalar

NATIVE = native.load() is not None and os.environ.get("CODEWORD_KERNELS") != "numpy"
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.integers(-6, 6).map(float)


def both(values, importance, k, *, zero=False):
    """The reference's result, which the core's equals bit by bit."""
    expected = cluster_groups_numpy(values, importance, k, zero)
    if NATIVE:
        found = groups._cluster_groups_native(values, importance, k, zero)
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tobytes() == b.tobytes()
    return expected


def checked(values, importance, k, *, zero=False):
    """The result, after a look at all that is promised of any."""
    found = both(values, importance, k, zero=zero)
    assert found.codebooks.shape == (len(values), k)
    assert found.codes.dtype == (np.uint8 if k <= 256 else np.uint16)
    for g, row in enumerate(values.astype(np.float32).astype(np.float64)):
        words, codes = found.codebooks[g], found.codes[g]
        assert np.all(np.diff(words) >= 0)
        h = np.ones(len(row)) if importance is None or not importance[g].any() else importance[g].astype(np.float64)
        used = len(np.unique(words))
        assert codes.max() < used or used == 0
        assert float(h @ (row - words[codes]) ** 2) == pytest.approx(found.sse[g], rel=1e-9, abs=1e-300)
        nearest = np.min((row[:, None] - np.unique(words)) ** 2, axis=1)
        scale = np.abs(row).max() ** 2
        np.testing.assert_allclose((row - words[codes]) ** 2, nearest, rtol=1e-6, atol=1e-12 * scale)
        assert not zero or 0 in words
    return found


def brute(values, weights, k):
    """Smallest SSE over all clusterings into at most k intervals."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)

    def cost(i, j):
        mass = w[i:j].sum()
        return float(w[i:j] @ (x[i:j] - w[i:j] @ x[i:j] / mass) ** 2) if mass > 0 else 0.0

    n = len(x)
    return min(
        sum(cost(i, j) for i, j in itertools.pairwise((0, *inner, n)))
        for count in range(min(k, n))
        for inner in itertools.combinations(range(1, n), count)
    )


# -- the optimum --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(hnp.arrays(np.float32, (2, 8), elements=SMALL | st.floats(-3, 3, width=32)), st.integers(1, 9))
def test_no_clustering_is_better(values, k):
    found = checked(values, None, k)
    for g, row in enumerate(values):
        assert found.sse[g] == pytest.approx(brute(row, np.ones(8), k), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (1, 7), elements=SMALL),
    hnp.arrays(np.float32, (1, 7), elements=st.sampled_from([0, 0.5, 1, 9])),
    st.integers(1, 5),
)
def test_no_clustering_is_better_with_importance(values, importance, k):
    found = checked(values, importance, k)
    weights = importance[0] if importance.any() else np.ones(7)
    assert found.sse[0] == pytest.approx(brute(values[0], weights, k), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3, 7, 16, 50, 200])
@pytest.mark.parametrize("kind", ["normal", "t", "whole", "pruned", "bfloat16", "offset"])
def test_as_good_as_the_dynamic_program_over_all_layers(kind, k):
    generator = np.random.default_rng(k)
    values = generator.standard_t(2, (2, 700)) if kind == "t" else generator.normal(size=(2, 700))
    values = {
        "whole": np.rint(values * 40),
        "pruned": np.where(np.abs(values) < 1.3, 0, values),
        "bfloat16": values.astype(DTYPES["bfloat16"]),
        "offset": values / 50 + 1000,
    }.get(kind, values)
    found = checked(values, None, k)
    for g, row in enumerate(values.astype(np.float32).astype(np.float64)):
        best = kmeans(make_bins(row[None] - np.median(row)), k).sse
        assert found.sse[g] == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [400, 3000])
def test_many_codewords_for_a_whole_tensor(n):
    values = np.random.default_rng(n).standard_t(3, (1, n)).astype(np.float32)
    weights = np.abs(values).astype(np.float64)
    for h in (None, np.where(weights > 0.1, weights, 0)):
        bins = make_bins(values, importance=h)
        clusters = kmeans(bins, 300)
        assert len(clusters.codebook) == 300
        assert clusters.sse == pytest.approx(cluster_groups(values, h, 300).sse[0], rel=1e-6)
        if NATIVE:
            edges = groups._best_edges_native(bins.prefix, bins.values, 300)
            np.testing.assert_array_equal(edges, groups.best_edges_numpy(bins.prefix, bins.values, 300))


def test_edges_of_what_does_not_fit_are_refused():
    for k, m in ((1, 5), (5, 5), (3, 6)):
        with pytest.raises(ValueError, match=rf"{k} clusters of values \(5,\) with prefix sums \(3, {m + 1}\)"):
            groups.best_edges(np.zeros((3, m + 1)), np.arange(5.0), k)


def test_even_spacing_has_many_optima_and_one_is_found():
    values = np.arange(600, dtype=np.float32)[None]  # the error is linear in k between 300 and 600 codewords
    for k in (5, 199, 200, 300, 301, 417, 599):
        runs, longer = divmod(600, k)
        best = (k - longer) * runs * (runs**2 - 1) / 12 + longer * (runs + 1) * ((runs + 1) ** 2 - 1) / 12
        assert checked(values, None, k).sse[0] == pytest.approx(best, rel=1e-12)


def test_by_hand():
    found = checked(np.array([[1, 9, 0, 10, 0, 0]], np.float32), None, 2)
    assert found.codebooks.tolist() == [[0.25, 9.5]]
    assert found.codes.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert found.sse.tolist() == [1.25]
    weighted = checked(np.array([[0, 1, 3]], np.float32), np.array([[1, 1, 8]]), 2)
    assert weighted.codebooks.tolist() == [[0.5, 3]]


# -- what is hard -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=FLOATS),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_whatever_the_values(values, k, zero, data):
    elements = st.floats(0, 1e6, width=32, allow_subnormal=True)
    importance = data.draw(st.none() | hnp.arrays(np.float32, values.shape, elements=elements))
    with np.errstate(over="ignore", under="ignore"):
        found = both(values, importance, k, zero=zero)
    assert np.isfinite(found.codebooks).all()
    assert np.all(np.diff(found.codebooks) >= 0)
    assert found.codes.max() < k


def test_fewer_values_than_codewords_are_kept_and_the_last_codeword_repeats():
    found = checked(np.array([[3, 1, 3, 1], [5, 5, 5, 5], [-0.0, 0, 0, -0.0]], np.float32), None, 3)
    assert found.codebooks.tolist() == [[1, 3, 3], [5, 5, 5], [0, 0, 0]]
    assert found.codes.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not found.sse.any()
    assert checked(np.array([[7.5]], np.float32), None, 1).codebooks.tolist() == [[7.5]]
    assert checked(np.array([[7.5]], np.float32), None, 300).codes.dtype == np.uint16


def test_importance_that_is_no_number_counts_as_none():
    values, nan = np.array([[1, 1, 4]], np.float32), np.nan
    assert both(values, np.array([[nan, 1, nan]]), 2).codebooks.tolist() == [[1, 1]]
    assert both(values, np.array([[nan, nan, nan]]), 2).codebooks.tolist() == [[1, 4]]


def test_sums_beyond_the_range_are_clustered_alike():
    values = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    with np.errstate(all="ignore"):
        both(values, np.full((1, 40), 1e307), 3)


@pytest.mark.parametrize("outliers", [(1e30,), (-1e30,), (1e30, -1e30), (3e38, 1e30, -3e38)])
def test_outliers_do_not_disturb_the_rest(outliers):
    rest = np.random.default_rng(0).normal(size=300).astype(np.float32) * np.float32(1e-3)
    values = np.append(rest, np.array(outliers, np.float32))[None]
    found = checked(values, None, 8 + len(outliers))
    alone = checked(rest[None], None, 8)
    error = (values[0] - found.codebooks[0, found.codes[0]])[: len(rest)]
    assert float(error @ error) == pytest.approx(alone.sse[0], rel=1e-6)


def test_denormals():
    steps = np.array([[1, 2, 3, 100, 101, 102]], np.float32)
    found = checked(steps * np.float32(1e-45), None, 2)
    assert found.codes.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_values_without_importance_take_the_nearest_codeword():
    values = np.array([[0, 1, 2, 9, 10, 4.9, 5.6, 50], [1, 2, 3, 4, 5, 6, 7, 8]], np.float32)
    importance = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8], np.float32)
    found = checked(values, importance, 2)
    assert found.codebooks.tolist() == [[1, 9.5], [2.5, 6.5]]  # a group of none: as if all mattered alike
    assert found.codes.tolist() == [[0, 0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_zero_is_a_codeword():
    values = np.array([[0, 0, 0, 0, 5, 6, -3, -3], [1, 1, 2, 2, 3, 3, 3, 3], [-1, -2, -3, -4, -5, -6, -7, -8]])
    found = checked(values, None, 4, zero=True)
    assert found.codebooks[0].tolist() == [-3, 0, 5, 6]  # it was one
    assert found.codebooks[1].tolist() == [0, 1, 2, 3]  # there was room
    assert found.codebooks[2].tolist() == [-7.5, -5.5, -3, 0]  # -1.5 and -3.5 without
    assert found.codes[2].tolist() == [3, 2, 2, 2, 1, 1, 0, 0]
    assert found.sse.tolist() == [0, 0, 4]
    assert checked(values, None, 1, zero=True).codebooks.tolist() == [[0], [0], [0]]


# -- the choice of input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, DTYPES["bfloat16"]], ids=str)
def test_any_dtype_and_layout(dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 100)  # more than one call of the core
    generator = np.random.default_rng(3)
    values = generator.normal(size=(7, 40)).astype(dtype)
    h = generator.random((7, 40)).astype(dtype)
    expected = checked(values, h, 5)
    wide = np.zeros((14, 80), dtype)
    wide[::2, ::2] = values
    for here in (np.asfortranarray(values), wide[::2, ::2]):
        found = both(here, np.asfortranarray(h), 5)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    assert cluster_groups(values[:0], None, 3).codebooks.shape == (0, 3)


def test_float64_beyond_float32_takes_its_ends():
    most = float(np.finfo(np.float32).max)
    assert both(np.array([[1e300, -1e300, 0]]), None, 3).codebooks.tolist() == [[-most, 0, most]]


@pytest.mark.skipif(not NATIVE, reason="no native core, or not wanted")
def test_the_number_of_threads_changes_nothing(monkeypatch):
    values = np.random.default_rng(5).standard_t(3, (40, 300)).astype(np.float32)
    found = set()
    for threads in (1, 2, 3, 50):
        monkeypatch.setenv("CODEWORD_THREADS", str(threads))
        found.add(b"".join(part.tobytes() for part in groups._cluster_groups_native(values, None, 9, False)))
    assert len(found) == 1


@pytest.mark.skipif(not NATIVE, reason="no native core, or not wanted")
def test_the_largest_group():
    values = np.random.default_rng(6).normal(size=(1, groups.LARGEST)).astype(np.float32)
    found = groups._cluster_groups_native(values, None, 300, False)
    assert found.sse[0] == pytest.approx(kmeans(make_bins(values), 300).sse, rel=2e-4)
    assert found.sse[0] <= kmeans(make_bins(values), 300).sse * (1 + 1e-9)


def test_groups_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"m and k in 1\.\.65536"):
        cluster_groups(np.zeros((3, 0), np.float32), None, 2)
    with pytest.raises(ValueError, match="k = 0"):
        cluster_groups(np.zeros((3, 2), np.float32), None, 0)
    with pytest.raises(ValueError, match="differ in shape"):
        cluster_groups(np.zeros((3, 2), np.float32), np.ones((3, 3)), 2)


# -- the method ---------------------------------------------------------------------------------------------------


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def normal(*dims):
    return np.random.default_rng(7).normal(size=dims).astype(np.float32)


def error(expr, weight):
    return float(np.sum((decode(expr).astype(np.float64) - weight.astype(np.float64)) ** 2))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("size", [1, 2, 4, 12])
@pytest.mark.parametrize("dims", [(12, 30), (12, 5, 3, 3)])
def test_rows_share_codebooks(dims, size, granularity, dtype):
    weight = normal(*dims) * np.geomspace(0.1, 9, 12, dtype=np.float32).reshape(12, *[1] * (len(dims) - 1))
    method = KMeans(5, granularity=granularity, group_size=size, codebook_dtype=dtype)
    expr = compress(method, weight)
    (lookup,) = lookups(expr)
    assert lookup.codes.shape == (12 // size, size, weight[0].size)
    assert lookup.codebook.shape == (12 // size, 5, 1)
    assert lookup.codebook.dtype == DTYPES[dtype]
    assert decode(expr).shape == dims
    alone = [compress(KMeans(5), rows) for rows in np.split(weight, 12 // size)]
    best = sum(error(one, rows) for one, rows in zip(alone, np.split(weight, 12 // size), strict=True))
    if granularity == "tensor" or size == 1:  # a scale in common changes nothing
        assert error(expr, weight) == pytest.approx(best, rel=1e-3)


def test_a_codebook_for_each_row_has_less_error_than_one_for_all():
    weight = normal(64, 200)
    errors = [error(compress(KMeans(8, group_size=size), weight), weight) for size in (1, 4, 16, 64, None)]
    assert errors == sorted(errors)
    assert errors[3] == errors[4]
    assert errors[0] < 0.95 * errors[4]


def test_importance_and_zero_go_to_the_groups():
    weight = np.where(np.abs(normal(6, 50)) < 0.7, 0, normal(6, 50)).astype(np.float32)
    found = decode(compress(KMeans(4, group_size=2, zero=True), weight))
    assert not found[weight == 0].any()
    importance = np.ones((6, 50), np.float32)
    importance[:, 7] = 1e6
    heavy = decode(compress(KMeans(4, group_size=1), weight, importance))
    np.testing.assert_allclose(heavy[:, 7], weight[:, 7], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1, 3])
def test_groups_too_large_to_sort_are_clustered_on_bins(size, monkeypatch):
    weight = normal(6, 40)
    expected = compress(KMeans(4, group_size=size), weight)
    monkeypatch.setattr(scalar, "LARGEST", 39)
    found = compress(KMeans(4, group_size=size), weight)
    assert error(found, weight) == pytest.approx(error(expected, weight), rel=1e-9)
    constant = np.repeat(np.arange(6, dtype=np.float32), 40).reshape(6, 40)
    np.testing.assert_array_equal(decode(compress(KMeans(4, group_size=size), constant)), constant)


def test_many_groups_come_in_parts(monkeypatch):
    weight = normal(9, 20)
    for granularity in ("tensor", "row"):
        method = KMeans(3, granularity=granularity, group_size=1)
        expected = decode(compress(method, weight, np.abs(weight)))
        with monkeypatch.context() as patch:
            patch.setattr(scalar, "_AT_ONCE", 50)
            np.testing.assert_array_equal(decode(compress(method, weight, np.abs(weight))), expected)


def test_small_groups_take_no_room_for_codewords_they_cannot_have():
    weight = normal(2000, 3)
    tracemalloc.start()
    found = compress(KMeans(1 << 16, group_size=1), weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(decode(found), weight)
    assert peak < 1 << 24


def test_codewords_that_no_group_uses_are_not_stored():
    weight = np.tile(np.arange(3, dtype=np.float32), (4, 5))
    (lookup,) = lookups(compress(KMeans(16, group_size=1), weight))
    assert lookup.codebook.tolist() == [[[0], [1], [2]]] * 4
    assert lookup.codes.dtype == np.uint8


@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30, 1e-44])
def test_float16_codebooks_hold_any_scale(scale):
    weight = (normal(4, 100) * scale).astype(np.float32)
    found = decode(compress(KMeans(8, group_size=2, codebook_dtype="float16"), weight))
    wide = decode(compress(KMeans(8, group_size=2), weight))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wide, rtol=2e-3, atol=1e-44)


def test_vectors_have_one_codebook():
    for dims in ((), (1,), (17,)):
        assert shape(compress(KMeans(4, group_size=8), normal(*dims))) == dims
    assert shape(compress(KMeans(4, group_size=8), normal(0, 3))) == (0, 3)


@pytest.mark.parametrize(
    ("rows", "size", "near"), [(10, 4, "2 and 5 do"), (64, 48, "32 and 64 do"), (7, 3, "1 and 7 do"), (5, 8, "5 does")]
)
def test_a_group_size_that_does_not_divide_the_rows(rows, size, near):
    with pytest.raises(PlanError, match=rf"group_size {size} does not divide the {rows} rows of shape .*; {near}"):
        compress(KMeans(4, group_size=size), normal(rows, 6))


def test_options_that_are_wrong():
    with pytest.raises(PlanError, match="group_size must be at least 1, got 0"):
        KMeans(4, group_size=0)
    with pytest.raises(PlanError, match="codebook_dtype"):
        Plan.from_dict({"rule": [{"tensors": "*", "method": "kmeans", "n_clusters": 4, "codebook_dtype": "int8"}]})


# -- all the way --------------------------------------------------------------------------------------------------


def test_the_torch_twin_of_groups():
    pytest.importorskip("torch")
    from codeword.nn import TorchExpr

    for granularity in ("tensor", "row"):
        expr = compress(KMeans(5, granularity=granularity, group_size=3, codebook_dtype="float16"), normal(12, 5, 3, 3))
        twin = TorchExpr(expr)
        np.testing.assert_array_equal(twin().detach().numpy(), decode(expr))
        np.testing.assert_array_equal(decode(twin.to_expr()), decode(expr))


def test_lenet5_with_a_codebook_for_each_row(tmp_path):
    torch = pytest.importorskip("torch")
    from codeword.nn import load_into, swap
    from codeword.zoo import digits, lenet5, lenet5_trained

    plan = Plan((Rule("*.weight", KMeans(8, group_size=1, codebook_dtype="float16")), Rule("*", Keep())))
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    model = lenet5_trained()
    codeword.compress(model, plan=plan).save(tmp_path / "model.cw")
    with codeword.load(tmp_path / "model.cw") as artifact:
        found = {tensor.name: tensor for tensor in codeword.inspect(artifact).tensors}
        assert found["conv2.weight"].method == "shared, a codebook per row"
        assert found["conv2.weight"].n_clusters == 8
        x, y = digits()
        images = torch.from_numpy(x)
        swapped = swap(model, artifact).eval()
        load_into(dense := lenet5(), artifact)
        with torch.no_grad():
            torch.testing.assert_close(swapped(images), dense.eval()(images), rtol=0, atol=0)
            right = swapped(images).argmax(1).numpy() == y
    assert right.mean() >= 0.98
