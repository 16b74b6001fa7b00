"""A scale and sign for each row: by hand, against plain clustering at equal bytes, and the factored product."""

from importlib import resources

import numpy as np
import pytest

from codeword.artifact import code_tensor
from codeword.errors import ExprError, PlanError
from codeword.expr import DTYPES, Affine, Lookup, Permute, Raw, Reshape, decode, shape
from codeword.math.factored import multiplications, product
from codeword.math.row_scaled import row_scaled
from codeword.methods import KMeans, RateAware, RowScaled
from codeword.plan import Plan
from codeword.safetensors_file import read_header, read_tensor
from round_trip import restored

LENET5 = resources.files("codeword") / "zoo" / "lenet5.safetensors"
BF16 = DTYPES["bfloat16"]
METHODS = [RowScaled(4), RowScaled(4, "bfloat16", "fitted"), RowScaled(4, "float16", "fitted")]


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def squared(weight, expr):
    return float(np.sum((decode(expr).astype(np.float64) - weight) ** 2))


def size(weight, expr):
    return code_tensor("w", "float32", weight.shape, expr).nbytes


def uneven_rows(draw="laplace", rows=64, columns=300):
    """Rows of unequal scale, half of them turned over."""
    generator = np.random.default_rng(0)
    scale = np.exp(0.7 * generator.normal(size=(rows, 1))) * generator.choice([-1, 1], size=(rows, 1))
    return (getattr(generator, draw)(size=(rows, columns)) * scale).astype(np.float32)


# -- the fit ------------------------------------------------------------------------------------------------------


def test_rows_that_are_multiples_share_one_shape_exactly():
    shape_of_all = np.array([1.0, 5, 7, 7, 5, 1])
    scales = np.array([[1.0], [-2], [0.5], [-0.25]])
    weight = (scales * shape_of_all).astype(np.float32)
    found = row_scaled(weight, None, 3, BF16)
    assert found.sse < 1e-9
    assert len(found.codebook) == 3
    assert np.all(np.sign(found.scales) == np.sign(scales[:, 0]) * np.sign(found.scales[0]))
    assert np.all(found.codes == found.codes[0])
    assert squared(weight, compress(KMeans(3), weight)) > 1


def test_one_codeword_is_the_mean_of_each_row():
    weight = np.array([[1, 3], [-4, -8], [10, 10]], np.float32)
    found = row_scaled(weight, None, 1, np.dtype(np.float32))
    np.testing.assert_allclose(found.unit * found.scales * found.codebook[0], [2, -6, 10], rtol=1e-4)
    weighted = row_scaled(weight, np.array([[3, 1], [1, 1], [1, 1]]), 1, np.dtype(np.float32))
    np.testing.assert_allclose(weighted.unit * weighted.scales * weighted.codebook[0], [1.5, -6, 10], rtol=1e-4)


@pytest.mark.parametrize("importance", [False, True])
def test_the_error_told_is_the_error_made_and_scales_are_of_their_dtype(importance):
    weight = uneven_rows()
    h = np.random.default_rng(1).random(weight.shape) if importance else None
    found = row_scaled(weight, h, 8, BF16)
    np.testing.assert_array_equal(found.scales, found.scales.astype(BF16).astype(np.float64))
    decoded = found.unit * found.scales[:, None] * found.codebook[found.codes]
    error = np.sum((1 if h is None else h) * (weight - decoded) ** 2)
    assert found.sse * found.unit**2 == pytest.approx(error, rel=1e-6)
    assert np.all(np.diff(found.codebook) > 0)


def test_the_expression_is_an_affine_of_a_lookup():
    match compress(RowScaled(8, scales="fitted"), uneven_rows()):
        case Reshape(Affine(Lookup(codes, codebook), scale, None), dims):
            assert (codes.shape, codebook.shape, scale.shape, dims) == ((1, 64, 300), (1, 8, 1), (64, 1, 1), (64, 300))
            assert scale.dtype == BF16
            assert np.any(scale.astype(float) < 0)
            assert np.any(scale.astype(float) > 0)
        case other:
            pytest.fail(f"another expression: {other}")


# -- against plain clustering at equal bytes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k"),
    # Not so with rows of symmetric Laplacian weights: there plain codes of small rows are cheap enough to be more.
    [("fc1", 4), ("fc1", 16), ("fc2", 4), ("fc2", 16), ("normal", 4), ("normal", 16), ("gumbel", 4), ("gumbel", 16)],
)
def test_less_error_than_plain_clustering_that_takes_as_many_bytes(name, k):
    if name.startswith("fc"):
        weight = read_tensor(LENET5, read_header(LENET5).entries[f"{name}.weight"])
    else:
        weight = uneven_rows(name)
    expr = compress(RowScaled(k, scales="fitted"), weight)
    fits, more = None, k  # the largest plain codebook whose file is no larger
    while size(weight, plain := compress(KMeans(more), weight)) <= size(weight, expr):
        fits, more = plain, more + 1
    assert fits is not None
    assert squared(weight, expr) < squared(weight, fits)


@pytest.mark.parametrize("k", [4, 16, 64])
def test_less_error_than_with_as_many_codewords_and_no_scale_or_one_that_is_not_fitted(k):
    weight = uneven_rows()
    fitted = compress(RowScaled(k, scales="fitted"), weight)
    assert squared(weight, fitted) < 0.7 * squared(weight, compress(KMeans(k), weight))
    assert squared(weight, fitted) < squared(weight, compress(KMeans(k, "row"), weight))


def test_the_sign_pays_where_rows_lean():
    weight = uneven_rows("gumbel")
    upright = np.where(np.sum(weight.astype(float) ** 3, axis=1, keepdims=True) < 0, -weight, weight)
    turned, straight = (squared(it, compress(RowScaled(8, scales="fitted"), it)) for it in (weight, upright))
    assert turned == pytest.approx(straight, rel=1e-3)
    assert turned < 0.7 * squared(weight, compress(KMeans(8, granularity="row"), weight))


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("name", ["fc1", "fc2", "normal", "laplace", "gumbel"])
def test_coded_scales_are_worth_their_bytes_or_are_none(name, k):
    if name.startswith("fc"):
        weight = read_tensor(LENET5, read_header(LENET5).entries[f"{name}.weight"])
    else:
        weight = uneven_rows(name)
    plain, expr = compress(KMeans(k), weight), compress(RowScaled(k), weight)
    # A bit a weight is worth a factor of 4 in the error: so much better, or the very same.
    saved = 8 * (size(weight, plain) - size(weight, expr)) / weight.size
    assert squared(weight, expr) <= squared(weight, plain) * 4**saved * (1 + 1e-3)
    if (name, k) in {("fc2", 4), ("fc2", 16), ("laplace", 4)}:  # few or short rows, and a coarse codebook
        assert isinstance(expr, Reshape)
        assert isinstance(expr.inner, Lookup)
    else:
        assert squared(weight, expr) < 0.975 * squared(weight, plain) * 4**saved


# -- hard data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(), (1,), (17,), (4, 6), (1, 9), (9, 1), (3, 2, 3, 3), (0,), (0, 3), (2, 0, 3, 3)])
def test_the_shape_comes_back_from_a_file(method, dims):
    weight = np.random.default_rng(0).laplace(size=dims).astype(np.float32)
    expr = compress(method, weight)
    assert shape(expr) == dims
    np.testing.assert_array_equal(restored(expr, weight), decode(expr))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, 3e38, 1e-40])
def test_constants_come_back(method, value):
    weight = np.full((4, 5), value, np.float32)
    np.testing.assert_allclose(decode(compress(method, weight)), weight, rtol=1e-5, atol=1e-42)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_floating_dtype(method, dtype):
    weight = uneven_rows().astype(DTYPES[dtype])
    assert squared(weight.astype(np.float64), compress(method, weight)) < 0.25 * np.sum(weight.astype(np.float64) ** 2)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hard_values(method):
    generator = np.random.default_rng(0)
    outlier = (generator.normal(size=(30, 30)) * 1e-3).astype(np.float32)
    outlier[7, 9] = 1e30
    denormal = (generator.normal(size=(20, 20)) * 1e-40).astype(np.float32)
    lone = np.zeros((2, 3000), np.float32)
    lone[0, 0] = 1e-45
    row_of_zeros = uneven_rows()
    row_of_zeros[3] = 0
    for weight in (outlier, denormal, lone, row_of_zeros):
        for h in (None, np.ones(weight.shape, np.float32), np.zeros(weight.shape, np.float32)):
            assert np.isfinite(decode(compress(method, weight, h))).all()
    assert decode(compress(method, outlier))[7, 9] == pytest.approx(1e30, rel=1e-2)
    error = (decode(compress(method, denormal)).astype(np.float64) - denormal) * 1e40
    assert np.sum(error**2) < 0.2 * 400
    few = np.array([[1.5, -2, 1.5], [1, 1, -2]], np.float32)
    np.testing.assert_allclose(decode(compress(RowScaled(300), few)), few, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_importance_moves_error_to_where_it_costs_less(method):
    weight = uneven_rows()
    h = np.ones(weight.shape, np.float32)
    h[:, :30] = 100
    plain, weighted = (decode(compress(method, weight, it)) - weight for it in (None, h))
    assert np.sum(weighted[:, :30] ** 2) < np.sum(plain[:, :30] ** 2)


def test_a_method_is_a_pure_function():
    weight = uneven_rows()
    before = weight.copy()
    first, second = (decode(compress(RowScaled(8), weight)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_clusters": 0}, "row-scaled: n_clusters must lie in 1..65536, got 0"),
        ({"n_clusters": 4, "scale_dtype": "float8"}, "scale_dtype: Invalid enum value 'float8'"),
        ({"n_clusters": 4, "scales": "best"}, "scales: Invalid enum value 'best'"),
        ({}, "missing required field `n_clusters`"),
    ],
)
def test_wrong_options_are_plan_errors(fields, says):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({"rule": [{"tensors": "*", "method": "row-scaled"} | fields]})
    assert says in str(caught.value)


def test_plans_name_it():
    plan = Plan.from_dict({"rule": [{"tensors": "fc*", "method": "row-scaled", "n_clusters": 16}]})
    assert plan.rules[0].method == RowScaled(16)
    assert Plan.from_dict(plan.to_dict()) == plan


# -- the factored product -----------------------------------------------------------------------------------------


def test_product_by_hand():
    # codes 0 1 0 over codewords 2, 10: x = (1, 2, 3) sums to 4 and 2, so 2 * 4 + 10 * 2 = 28, times 3, plus 0.5 * 6
    lookup = Lookup(np.array([[[0, 1, 0]]], np.uint8), np.array([[[2.0], [10]]], np.float32))
    x = np.array([[1.0, 2, 3]])
    assert product(lookup, x).tolist() == [[28]]
    scaled = Affine(lookup, np.full((1, 1, 1), 3, np.float32), np.full((1, 1, 1), 0.5, np.float32))
    assert product(scaled, x).tolist() == [[87]]
    assert (multiplications(lookup), multiplications(scaled)) == (2, 4)


@pytest.mark.parametrize(
    "method",
    [RowScaled(16), KMeans(7), KMeans(7, granularity="row"), RateAware(0.05)],
    ids=lambda it: type(it).__name__,
)
def test_factored_equals_dense(method):
    weight = uneven_rows()
    x = np.random.default_rng(5).normal(size=(3, 300)).astype(np.float32)
    expr = compress(method, weight)
    dense = x.astype(np.float64) @ decode(expr).astype(np.float64).T
    bound = np.abs(x).astype(np.float64) @ np.abs(decode(expr)).astype(np.float64).T
    assert np.all(np.abs(product(expr, x) - dense) <= 2e-7 * bound)  # decode rounds to float32, the product does not
    assert multiplications(expr) < weight.size


def test_groups_have_their_own_codebooks():
    generator = np.random.default_rng(0)
    lookup = Lookup(generator.integers(0, 5, (3, 4, 50)).astype(np.uint8), generator.normal(size=(3, 5, 1)))
    x = generator.normal(size=(2, 50))
    np.testing.assert_allclose(product(lookup, x), x @ decode(lookup)[:, :, 0].T, rtol=0, atol=1e-12)
    assert product(lookup, x[:0]).shape == (0, 12)


def test_what_has_no_factored_form_says_so():
    codes, words = np.zeros((1, 2, 6), np.uint8), np.ones((1, 1, 1), np.float32)
    x = np.ones((1, 6))
    for expr, says in (
        (Raw(np.ones((2, 6))), "no Raw"),
        (Permute(Lookup(codes, words), (0, 1, 2)), "no Permute"),
        (Lookup(codes[:, :, :3], np.ones((1, 1, 2))), r"no Lookup of \(2, 3, 2\)"),
        (Affine(Lookup(codes, words), np.ones((1, 6, 1))), "one scale and offset a row"),
        (Reshape(Lookup(codes, words), (3, 4)), r"rows are the first axis, got \(2, 6, 1\) reshaped to \(3, 4\)"),
        (Lookup(codes + 1, words), "code 1 in a codebook of 1"),
    ):
        with pytest.raises(ExprError, match=says):
            product(expr, x)
    with pytest.raises(ExprError, match=r"x must be \(b, 6\), got \(1, 5\)"):
        product(Lookup(codes, words), x[:, :5])
