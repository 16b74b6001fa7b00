"""Rate-aware clustering on top of another method: the cost falls, the form stays, the codes are the cheapest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.artifact import code_tensor
from codeword.errors import PlanError
from codeword.expr import Affine, Lookup, Permute, Raw, Reshape, Scatter, Sum, decode, leaves, shape
from codeword.math.ecsq import code_prices
from codeword.math.ecvq import compact, constrained_codes, ecvq, squared_error
from codeword.math.moments import Moments
from codeword.methods import (
    Birch,
    DensityKMeans,
    KernelTemplates,
    KMeans,
    Lloyd,
    ProductQuantization,
    RateAware,
    RowScaled,
)
from codeword.methods.constrain import Constraint
from codeword.plan import Plan, Rule, parse_method

STARTS = [
    KMeans(8),
    KMeans(8, granularity="row"),
    KMeans(8, zero=True),
    KMeans(8, group_size=4),
    KMeans(8, group_size=1, codebook_dtype="float16"),
    Lloyd(8),
    DensityKMeans(8),
    DensityKMeans(lam=0.02),
    Birch(sqnr_db=15.0),
    RowScaled(8),
    ProductQuantization(3, 16),
    ProductQuantization(3, 16, granularity="row", codebook_dtype="float32"),
    ProductQuantization(3, 8, residual_stages=1),
    ProductQuantization(3, 8, group_size=4),
    KernelTemplates(8),
]


def weights(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.laplace(size=(12, 8, 3, 3)) * generator.uniform(0.2, 2, size=(12, 1, 1, 1))).astype(np.float32)


def made(method, weight: np.ndarray, importance: np.ndarray | None = None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def error(expr, weight: np.ndarray, h: np.ndarray | float = 1.0) -> float:
    return float(np.sum(h * np.square(decode(expr).astype(np.float64) - weight)))


def bits(expr) -> float:
    total = 0.0
    for path, codes in leaves(expr):
        if path.endswith("codes"):
            members = np.bincount(codes.reshape(-1))
            total += float(members @ code_prices(members))
    return total


@pytest.mark.parametrize("start", STARTS, ids=repr)
@pytest.mark.parametrize("lam", [0.01, 0.1])
def test_the_cost_falls_and_the_shape_stays(start, lam):
    weight = weights()
    before = made(start, weight)
    after = made(RateAware(lam, granularity="tensor", codebook="free", compensate=False, start=start), weight)
    worth = lam * float(np.mean(np.square(weight, dtype=np.float64)))
    assert shape(after) == weight.shape
    assert error(after, weight) + worth * bits(after) <= (error(before, weight) + worth * bits(before)) * (1 + 1e-4)
    if lam > 0.05:
        assert bits(after) < bits(before)


def test_relative_to_rows_the_cost_falls_too():
    weight = weights()
    unit = np.mean(np.square(weight, dtype=np.float64), axis=(1, 2, 3), keepdims=True)
    before = made(KMeans(16, granularity="row"), weight)
    after = made(RateAware(0.05, codebook="free", compensate=False, start=KMeans(16, granularity="row")), weight)
    # Row scales have two bits of mantissa, so the units agree to an eighth.
    assert error(after, weight, 1 / unit) + 0.05 * bits(after) < 0.97 * (
        error(before, weight, 1 / unit) + 0.05 * bits(before)
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_codes_are_the_cheapest(seed, k, d, weighted):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(2, 20, d)).astype(np.float32)
    book = generator.normal(size=(2, k, d)).round(1)
    penalty = generator.uniform(0, 0.5, size=k)
    h = generator.uniform(0.1, 2, size=vectors.shape).astype(np.float32) if weighted else None
    codes = constrained_codes(vectors, h, book, penalty)
    distance = np.square(vectors[:, :, None] - book[:, None])
    cost = (distance if h is None else distance * h[:, :, None]).sum(axis=3) + penalty
    taken = np.take_along_axis(cost, codes[:, :, None].astype(int), axis=2)[:, :, 0]
    np.testing.assert_allclose(taken, cost.min(axis=2), rtol=1e-4, atol=1e-5)


def test_by_hand():
    # Codes 1 and 2 have three members and one: 1.415 and 3 bits. At 0.1 a bit, 1.1 joins the others for an error of
    # 0.01; their codeword moves to the mean, 1.025, and the error is 3 * 0.025**2 + 0.075**2.
    vectors = np.array([0, 0, 0, 0, 1, 1, 1, 1.1], np.float32).reshape(1, 8, 1)
    start = np.array([[0, 0, 0, 0, 1, 1, 1, 2]], np.uint8)
    found = ecvq(vectors, None, start, np.array([0, 1, 1.1]).reshape(1, 3, 1), 0.1)
    codes, book = compact(found.codes, found.codebook)
    np.testing.assert_allclose(book, [[[0], [1.025]]], rtol=1e-6)
    assert codes.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert squared_error(vectors, None, codes, book) == pytest.approx(0.0075, rel=1e-5)


def test_nothing_moves_where_bits_are_worth_next_to_nothing():
    weight = weights()
    same = RateAware(1e-9, granularity="tensor", codebook="free", compensate=False, start=KMeans(16))
    before, after = (made(method, weight) for method in (KMeans(16), same))
    assert error(after, weight) == pytest.approx(error(before, weight), rel=1e-3)


@pytest.mark.parametrize("codebook", ["grid", "free"])
@pytest.mark.parametrize("start", [KMeans(32), KMeans(32, group_size=3), RowScaled(16), Lloyd(32, granularity="row")])
def test_compensated_errors_cancel_within_kernels(start, codebook):
    weight = weights()
    plain, compensated = (
        decode(made(RateAware(0.03, codebook=codebook, compensate=cancel, start=start), weight)) - weight
        for cancel in (False, True)
    )
    sums = [float(np.square(delta.sum(axis=(2, 3))).sum()) for delta in (plain, compensated)]
    assert sums[1] < 0.5 * sums[0]


def test_a_grid_is_stored_in_whole_numbers_and_costs_next_to_nothing():
    weight = weights()
    free, grid = (
        made(RateAware(0.01, codebook=kind, compensate=False, start=KMeans(32)), weight) for kind in ("free", "grid")
    )
    books = [dict(leaves(expr)) for expr in (free, grid)]
    kinds = [next(array.dtype.kind for path, array in book.items() if path.endswith("codebook")) for book in books]
    assert kinds == ["f", "i"]
    assert error(grid, weight) < 1.02 * error(free, weight)
    sizes = [code_tensor("w", "float32", weight.shape, expr).nbytes for expr in (free, grid)]
    assert sizes[1] < sizes[0]


def test_importance_decides_where_errors_go():
    weight = weights()
    importance = np.ones_like(weight)
    importance[:6] = 100
    expr = made(RateAware(0.1, granularity="tensor", start=KMeans(16)), weight, importance)
    plain = made(RateAware(0.1, granularity="tensor", start=KMeans(16)), weight)
    assert error(expr, weight, importance) < error(plain, weight, importance)


def test_every_node_is_undone():
    generator = np.random.default_rng(0)
    lookup = Lookup(generator.integers(0, 8, size=(1, 4, 6)).astype(np.uint8), generator.normal(size=(1, 8, 1)))
    inner = Reshape(lookup, (6, 4))
    positions = np.sort(generator.choice(40, 24, replace=False)).astype(np.uint8)
    for expr in (
        Permute(inner, (1, 0)),
        Affine(inner, np.full((6, 1), -2, np.float32), np.arange(4, dtype=np.float32)),
        Affine(inner, (generator.random((6, 4)) < 0.5).astype(np.float32)),
        Sum((Raw(np.ones((6, 4), np.float32)), inner)),
        Scatter(40, positions, inner),
    ):
        target = decode(expr).astype(np.float32)
        found = Constraint(1e-6, False, None).apply(expr, target, np.ones((1,) * target.ndim, np.float32))
        np.testing.assert_allclose(decode(found), target, atol=1e-3)


def test_a_plan_holds_a_method_within_a_method(tmp_path):
    plan = Plan((Rule("*", RateAware(0.1, start=ProductQuantization(4, residual_stages=1))),))
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("kmeans:n_clusters=16", KMeans(16)),
        ("kmeans: n_clusters = 4, zero = true", KMeans(4, zero=True)),
        ("density-kmeans", DensityKMeans()),
        ("lloyd:n_clusters=8,start=kmeans++", Lloyd(8, "kmeans++")),
        ("rate-aware:lam=0.1,start=kmeans,start.n_clusters=16", RateAware(0.1, start=KMeans(16))),
        ("rate-aware:lam=0.1,start=density-kmeans", RateAware(0.1, start=DensityKMeans())),
        ("rate-aware:start.method=product,start.cluster_dim=4,lam=1", RateAware(1, start=ProductQuantization(4))),
    ],
)
def test_a_method_in_one_line(text, method):
    assert parse_method(text) == method


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kmean", "'kmean' is no method; did you mean 'kmeans'?"),
        ("kmeans:n_cluster=4", "n_cluster: unknown field; did you mean 'n_clusters'?"),
        ("kmeans:n_clusters=x", "n_clusters: Expected `int`, got `str`"),
        ("kmeans:16", "'16' is no option=value"),
        ("kmeans:n_clusters=", "'n_clusters=' is no option=value"),
        ("kmeans", "missing required field `n_clusters`"),
        ("rate-aware:lam=0.1,start=keep", "'keep' is no method that can stand here"),
        ("rate-aware:lam=0.1,start.n_clusters=1", "start.method: None is no method"),
        ("rate-aware:lam=0.1,start=kmeans,start.n_clusters=0", "start: kmeans: n_clusters must lie in 1..65536, got 0"),
        ("rate-aware:lam=0.1,start=3", "start: must be a method's name or table, got 3"),
        ("rate-aware:lam=1,start=product,start.cluster_dim=4,start.shared=a", "start shares codebooks as 'a'"),
        ("rate-aware:lam=1,lam.x=3", "lam is 1 and can have no option 'x'"),
    ],
)
def test_mistakes_in_one_line_say_what_and_where(text, what):
    with pytest.raises(PlanError) as caught:
        parse_method(text)
    assert what in str(caught.value)


# -- by moments ---------------------------------------------------------------------------------------------------


def moments_of(columns: int, groups: int = 1, seed: int = 0) -> Moments:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(groups, 6 * columns, columns)) @ generator.normal(size=(columns, columns)) + 1
    return Moments((np.swapaxes(x, 1, 2) @ x / x.shape[1]).astype(np.float32))


def output_error(expr, weight: np.ndarray, moments: Moments) -> float:
    rows = (decode(expr).astype(np.float64) - weight).reshape(len(weight), -1)
    return sum(
        float(row @ moments.second[owner] @ row) for row, owner in zip(rows, moments.owners(len(rows)), strict=True)
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "start",
    [KMeans(8), KMeans(8, granularity="row"), KMeans(8, group_size=4), Birch(15.0), Birch(15.0, granularity="row")],
    ids=str,
)
def test_errors_of_scalars_cancel_as_measured(start, groups):
    """At about as many bits the outputs are much nearer than by the diagonal alone."""
    weight, moments = weights(), moments_of(72, groups)
    method = RateAware(0.02, start=start)
    generator = np.random.default_rng(0)
    found = method.compress_by_moments(weight, moments, generator=generator)
    apart = made(method, weight, moments.diagonal(len(weight)).reshape(weight.shape))
    assert output_error(found, weight, moments) < 0.7 * output_error(apart, weight, moments)
    assert bits(found) < 1.1 * bits(apart)
    assert found.__class__ is apart.__class__


def test_rows_are_made_alike_whatever_they_are_worth():
    """Rows a power of two apart get the same codes, though each has a price of its own."""
    weight = weights()
    weight[6:] = weight[:6] * 1024
    method = RateAware(0.02, start=KMeans(8, granularity="row"))
    expr = method.compress_by_moments(weight, moments_of(72), generator=np.random.default_rng(0))
    codes = next(array for path, array in leaves(expr) if path.endswith("codes")).reshape(12, -1)
    assert (codes[:6] == codes[6:]).all()


def test_vectors_count_by_the_diagonal():
    weight, moments = weights(), moments_of(72)
    method = RateAware(0.05, start=ProductQuantization(3, 16))
    found = method.compress_by_moments(weight, moments, generator=np.random.default_rng(0))
    assert (decode(found) == decode(made(method, weight, moments.diagonal(12).reshape(weight.shape)))).all()


def test_inputs_that_were_never_there_and_weights_of_zero():
    for second, weight in ((0.0, weights()), (1.0, 0 * weights())):
        moments = Moments(np.full((1, 72, 72), second, np.float32))
        expr = RateAware(0.02, start=KMeans(8)).compress_by_moments(weight, moments, generator=np.random.default_rng(0))
        assert np.isfinite(decode(expr)).all()
