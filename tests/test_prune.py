"""Pruning: which weights stay, that zeros come back as zeros under every method, and what the file pays for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import codeword
from codeword.artifact import code_tensor
from codeword.errors import PlanError
from codeword.expr import Lookup, Reshape, Scatter, decode, shape
from codeword.math.masks import block_mask, n_of_m_mask, top_mask
from codeword.methods import (
    Birch,
    DensityKMeans,
    Keep,
    KernelTemplates,
    KMeans,
    Lloyd,
    ProductQuantization,
    Prune,
    RateAware,
    RowScaled,
)
from codeword.plan import Plan, Rule, parse_method

WEIGHT = np.random.default_rng(0).normal(size=(12, 8, 3, 3)).astype(np.float32)
THEN = [
    Keep(),
    Keep(3),
    KMeans(8),
    KMeans(8, "row"),
    KMeans(8, group_size=3),
    RateAware(0.05),
    RateAware(0.05, granularity="tensor", compensate=False),
    RateAware(0.05, start=KMeans(8)),
    Lloyd(8),
    DensityKMeans(8),
    Birch(15.0),
    RowScaled(8),
    ProductQuantization(3, 32),
    KernelTemplates(8),
]


def made(method, weight=WEIGHT, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(-1, 45))
@settings(deadline=None)
def test_the_largest_stay_and_of_equals_the_first(values, keep):
    scores = np.array(values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = np.zeros(len(values), bool)
    expected[order[: max(keep, 0)]] = True
    np.testing.assert_array_equal(top_mask(scores, keep), expected)


def test_two_of_four_by_hand():
    scores = np.array([[4, 3, 2, 1, 1, 1, 1, 1, 5, 6], [0, 1, 0, 2, 9, 8, 7, 6, 1, 0]])
    expected = [[1, 1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0, 0, 1, 0]]  # of two left over one
    np.testing.assert_array_equal(n_of_m_mask(scores, 2, 4), np.array(expected, bool))


def test_blocks_by_hand():
    scores = np.array([[1, 1, 9], [1, 1, 0], [5, 5, 4]])
    # Means of blocks of 2 x 2 and what the edge cuts off: 1, 4.5; 5, 4. Five weights at least: 2 + 2 + 1.
    expected = [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
    np.testing.assert_array_equal(block_mask(scores, (2, 2), 5), np.array(expected, bool))
    assert block_mask(scores, (2, 2), 9).all()
    assert not block_mask(scores, (2, 2), 0).any()


@pytest.mark.parametrize("then", THEN, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_zeros_are_zeros_under_every_method(then, sparsity):
    expr = made(Prune(sparsity, then))
    decoded = decode(expr).reshape(WEIGHT.shape)
    kept = Prune(sparsity).mask(WEIGHT, None)
    assert shape(expr) == WEIGHT.shape
    assert kept.sum() == WEIGHT.size - round(sparsity * WEIGHT.size)
    assert np.abs(WEIGHT[~kept]).max() <= np.abs(WEIGHT[kept]).min()
    assert not decoded[~kept].any()
    if isinstance(then, Keep) and then.mantissa_bits is None:
        np.testing.assert_array_equal(decoded[kept], WEIGHT[kept])
    if not isinstance(then, KernelTemplates):
        assert np.sum(np.square(decoded - WEIGHT)[kept]) < 0.3 * np.sum(np.square(WEIGHT[kept]))


def test_what_stays_is_scattered():
    expr = made(Prune(0.9, KMeans(4)))
    assert isinstance(expr, Reshape)
    assert isinstance(expr.inner, Scatter)
    assert expr.inner.positions.dtype == np.uint16


def test_where_zero_has_a_code_there_is_no_mask():
    expr = made(Prune(0.9, RateAware(0.01)))
    masks = [node for node in _nodes(expr) if isinstance(node, Scatter)]
    assert not masks
    assert sum(isinstance(node, Lookup) for node in _nodes(expr)) == 1


def test_zeros_that_are_there_stay_and_are_all():
    weight = np.where(np.abs(WEIGHT) > 1.5, WEIGHT, 0).astype(np.float32)
    decoded = decode(made(Prune(then=KMeans(8)), weight))
    np.testing.assert_array_equal(decoded.reshape(WEIGHT.shape) == 0, weight == 0)


def test_importance_decides_who_stays():
    importance = np.ones_like(WEIGHT)
    importance[:6] = 1e6
    mask = Prune(0.5).mask(WEIGHT, importance)
    assert mask[:6].all()
    assert not mask[6:].any()


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("2:4", 0.5), ("1:4", 0.75), ("block 4x1", 0.5)])
def test_patterns(pattern, sparsity):
    rows = decode(made(Prune(sparsity, pattern=pattern))).reshape(12, 72)
    if pattern.startswith("block"):
        blocks = (rows != 0).reshape(3, 4, 72)
        assert (blocks.all(axis=1) | ~blocks.any(axis=1)).all()
        assert (rows != 0).mean() == pytest.approx(0.5)
    else:
        n, m = map(int, pattern.split(":"))
        assert ((rows.reshape(12, -1, m) != 0).sum(axis=2) == n).all()


@pytest.mark.parametrize("empty", [np.zeros((0, 3), np.float32), np.zeros((4, 3), np.float32), np.float32(2)])
def test_nothing_and_next_to_nothing(empty):
    weight = np.asarray(empty)
    np.testing.assert_array_equal(decode(made(Prune(0.5 if weight.size != 1 else 0.0, KMeans(2)), weight)), weight)


def test_nine_of_ten_pruned_cost_little_more_than_their_entropy():
    weight = np.random.default_rng(1).normal(size=(200, 500)).astype(np.float32)
    expr = made(Prune(0.9, KMeans(8)), weight)
    nbytes = code_tensor("w", "float32", weight.shape, expr).nbytes
    kept = 0.1
    mask_bits = -(kept * np.log2(kept) + (1 - kept) * np.log2(1 - kept))
    values = decode(expr)[decode(expr) != 0]
    share = np.unique(values, return_counts=True)[1] / len(values)
    bits = mask_bits + kept * -(share @ np.log2(share))
    assert 8 * nbytes / weight.size < 1.02 * bits


def test_through_a_plan_and_a_file(tmp_path):
    plan = Plan((Rule("*", Prune(0.8, then=RateAware(0.1, start=KMeans(8)))),))
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    assert parse_method(
        "prune:sparsity=0.8,then=rate-aware,then.lam=0.1,then.start=kmeans,then.start.n_clusters=8"
    ) == (plan.rules[0].method)
    artifact = codeword.compress({"w": WEIGHT}, plan=plan)
    artifact.save(tmp_path / "w.cw")
    decoded = codeword.load(tmp_path / "w.cw").decode("w")
    assert (decoded == 0).sum() >= round(0.8 * WEIGHT.size)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in 0..1, below 1, got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"pattern": "4:2"}, "got '4:2'"),
        ({"pattern": "block 4"}, "got 'block 4'"),
        ({"pattern": "block 0x4", "sparsity": 0.5}, "got 'block 0x4'"),
        ({"pattern": "two"}, "got 'two'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "is a sparsity of 0.5, not 0.6"),
        ({"pattern": "block 4x1"}, "needs a sparsity"),
    ],
)
def test_wrong_options_say_what_and_how(options, what):
    with pytest.raises(PlanError) as caught:
        Prune(**options)
    assert what in str(caught.value)


def _nodes(expr):
    yield expr
    for name in ("inner", "terms"):
        child = getattr(expr, name, ())
        for node in child if isinstance(child, tuple) else (child,):
            yield from _nodes(node)
