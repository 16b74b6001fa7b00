"""Codebooks of groups: the optimum for each, the same bits natively, and rows of a tensor that share a codebook."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codeword.expr import DTYPES
from codeword.kernels import chunks, groups, native
from codeword.kernels.groups import cluster_groups, cluster_groups_numpy
from codeword.math.bins import make_bins
from codeword.math.kmeans import kmeans

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.integers(-6, 6).map(float)


def both(values, importance, k, *, zero=False):
    """The reference's result, which the core's equals bit by bit."""
    expected = cluster_groups_numpy(values, importance, k, zero)
    if native.load() is not None:
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


@pytest.mark.skipif(native.load() is None, reason="no native core")
def test_the_number_of_threads_changes_nothing(monkeypatch):
    values = np.random.default_rng(5).standard_t(3, (40, 300)).astype(np.float32)
    found = set()
    for threads in (1, 2, 3, 50):
        monkeypatch.setenv("CODEWORD_THREADS", str(threads))
        found.add(b"".join(part.tobytes() for part in groups._cluster_groups_native(values, None, 9, False)))
    assert len(found) == 1


@pytest.mark.skipif(native.load() is None, reason="no native core")
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
