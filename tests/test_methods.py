"""The methods: shapes and bounds of what they promise, data that is hard, options that are wrong."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import round_trip
from codeword.artifact import code_tensor
from codeword.errors import PlanError
from codeword.expr import DTYPES, Affine, Lookup, Raw, Reshape, decode, dtype_name, leaves, lookups, shape
from codeword.math.bins import make_bins
from codeword.math.kmeans import kmeans, midpoints
from codeword.methods import (
    BuiltIn,
    FixedPoint,
    Keep,
    KMeans,
    Method,
    RateAware,
    as_rows,
    round_mantissa,
    row_scales,
)
from codeword.report.measure import describe
from round_trip import error

BF16 = DTYPES["bfloat16"]
CLUSTERING = [
    KMeans(4),
    KMeans(5, zero=True),
    KMeans(4, granularity="row"),
    KMeans(5, granularity="row", zero=True),
    RateAware(0.05),
    RateAware(0.05, codebook="free"),
    RateAware(0.05, granularity="tensor"),
    RateAware(0.05, granularity="tensor", codebook="free"),
    RateAware(1e-4, max_clusters=9),
]
METHODS = [Keep(), Keep(3), FixedPoint(0), FixedPoint(6), *CLUSTERING]


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=np.random.default_rng(0))


def laplacian(*dims, seed=0):
    return np.random.default_rng(seed).laplace(size=dims).astype(np.float32)


def restored(method, weight, importance=None):
    """The tensor as a file gives it back."""
    return round_trip.restored(compress(method, weight, importance), weight)


# -- all methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(), (1,), (17,), (4, 6), (1, 9), (9, 1), (3, 2, 3, 3)])
def test_the_shape_comes_back(method, dims):
    weight = laplacian(*dims)
    expr = compress(method, weight)
    assert isinstance(method, Method)
    assert shape(expr) == dims
    assert decode(expr).shape == dims
    assert np.isfinite(decode(expr)).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(0,), (0, 3), (3, 0), (2, 0, 3, 3)])
def test_empty_tensors(method, dims):
    assert restored(method, np.zeros(dims, np.float32)).shape == dims


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64], ids=str)
def test_every_floating_dtype_is_clustered_alike(method, dtype):
    weight = laplacian(20, 30).astype(dtype)
    found = restored(method, weight)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert error(found, weight) < 0.25
    assert error(found, weight) == pytest.approx(error(restored(method, weight.astype(np.float32)), weight), rel=0.05)


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-140, 2.0**100])
def test_the_scale_of_the_weights_does_not_matter(method, scale):
    weight = laplacian(40, 40)
    scaled = (weight.astype(np.float64) * scale).astype(np.float32)
    found = decode(compress(method, scaled))
    assert np.isfinite(found).all()
    assert error(found, scaled) == pytest.approx(
        error(decode(compress(method, weight)), weight), rel=0.1 if scale > 2.0**-126 else 0.5
    )  # denormal rows share one scale, the smallest normal float


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_the_smallest_float_among_zeros_leaves_no_nan(method):
    weight = np.zeros((2, 3000), np.float32)
    weight[0, 0] = np.float32(1e-45)
    found = decode(compress(method, weight))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1e-44


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(1,), (5, 7)])
def test_all_zeros_stay_zeros(method, dims):
    found = restored(method, np.zeros(dims, np.float32))
    assert found.tobytes() == np.zeros(dims, np.float32).tobytes()


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
@pytest.mark.parametrize("value", [1.0, -0.3, 1e-30, 3e38])
def test_constants_come_back(method, value):
    weight = np.full((4, 5), value, np.float32)
    if isinstance(method, RateAware) or method.zero:
        # On a grid, or with zero for the nearest codeword, a constant is approximated at best.
        assert error(restored(method, weight), weight) <= (1 if isinstance(method, KMeans) else 0.2)
    else:
        assert error(restored(method, weight), weight) < 1e-12


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_a_huge_outlier_is_kept_and_hurts_only_itself(method):
    weight = laplacian(30, 30)
    weight[7, 9] = 1e30
    found = decode(compress(method, weight))
    assert found[7, 9] == pytest.approx(1e30, rel=0.1)
    assert np.isfinite(found).all()
    if method.granularity == "row":
        rest = np.arange(30) != 7
        assert np.abs(found[rest]).max() < 1e27  # other rows fall below 2**-14 of the largest and become its zeros
    elif isinstance(method, KMeans):
        inner = np.delete(weight.reshape(-1), 7 * 30 + 9)
        assert error(np.delete(found.reshape(-1), 7 * 30 + 9), inner) < 0.35


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_rows_of_zeros_among_others_stay_zeros(method):
    weight = laplacian(6, 200)
    weight[2] = 0
    found = decode(compress(method, weight))
    near = 0 if isinstance(method, RateAware) or method.zero else 1e-4 if method.granularity == "row" else 1
    assert np.abs(found[2]).max() <= near


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_is_a_pure_function(method):
    weight = laplacian(10, 12)
    before = weight.copy()
    first, second = (list(leaves(compress(method, weight))) for _ in range(2))
    assert [(path, array.tobytes()) for path, array in first] == [(path, array.tobytes()) for path, array in second]
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_equal_importance_is_none_at_all(method):
    weight = laplacian(20, 20)
    plain, weighted = (decode(compress(method, weight, h)) for h in (None, np.full((20, 20), 3.0, np.float32)))
    assert np.mean(plain == weighted) > 0.97  # but for values on a threshold, which two roundings decide
    assert error(weighted, weight) == pytest.approx(error(plain, weight), rel=0.02)


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_importance_moves_error_to_where_it_costs_less(method):
    weight, importance = laplacian(40, 40), np.ones((40, 40), np.float32)
    importance[:, :4] = 100
    plain, weighted = (decode(compress(method, weight, h)) for h in (None, importance))
    before, after = error(plain[:, :4], weight[:, :4]), error(weighted[:, :4], weight[:, :4])
    assert after <= before
    if method != RateAware(1e-4, max_clusters=9):  # with nine places on a grid and free bits there is no choice
        assert after < before


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_no_importance_anywhere_still_gives_something_finite(method):
    assert np.isfinite(decode(compress(method, laplacian(5, 6), np.zeros((5, 6), np.float32)))).all()


# -- Keep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_is_lossless(dtype):
    weight = np.arange(12).reshape(3, 4).astype(DTYPES[dtype])
    for method in (Keep(), Keep(52)):
        assert decode(compress(method, weight)).tobytes() == weight.tobytes()


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1), st.integers(0, 22))
def test_keep_rounds_to_bits_of_mantissa(values, bits):
    weight = np.array(values, np.float32)
    found = decode(compress(Keep(bits), weight))
    finite = np.isfinite(weight)
    np.testing.assert_array_equal(found[~finite], weight[~finite])
    wide = weight[finite].astype(np.float64)
    assert np.all(np.abs(found[finite] - wide) <= 2.0 ** -(bits + 1) * np.abs(wide))
    assert np.isfinite(found[finite]).all()
    np.testing.assert_array_equal(np.signbit(found), np.signbit(weight))


def test_keep_rounds_by_hand():
    values = np.array([1, 1.25, 1.375, 1.5, 1.75, -1.75, 3.4e38, -0.0], np.float32)
    assert round_mantissa(values, 1).tolist() == [1, 1, 1.5, 1.5, 2, -2, np.float32(3.4e38), 0]
    bits = np.array([0x3F80, 0x3F81, 0x3FFF], np.uint16).view(BF16)
    assert round_mantissa(bits, 3).astype(float).tolist() == [1, 1, 2]


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000])
def test_keep_leaves_nan_and_infinity_alone(pattern):
    values = np.array([pattern], np.uint32).view(np.float32)
    assert round_mantissa(values, 7).view(np.uint32).tolist() == [pattern]


def test_keep_of_few_bits_codes_to_few_bytes():
    weight = laplacian(4000)
    sizes = [len(code_tensor("w", "float32", (4000,), compress(Keep(bits), weight)).payload) for bits in (None, 15, 7)]
    assert sizes[2] < 0.45 * sizes[0]
    assert sizes[2] < sizes[1] < sizes[0]


# -- FixedPoint ---------------------------------------------------------------------------------------------------


def test_fixed_point_by_hand():
    """The mean square of 3, 4, 0.3 and -1.2 is 6.63, so the root is above 2: two bits make steps of a half."""
    expr = compress(FixedPoint(2), np.array([3, 4, 0.3, -1.2], np.float32))
    assert isinstance(expr, Affine)
    assert decode(expr.inner).tolist() == [6, 8, 1, -2]
    assert (expr.scale.tolist(), dtype_name(expr.scale.dtype)) == ([0.5], "bfloat16")
    assert decode(expr).tolist() == [3, 4, 0.5, -1]


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1), st.integers(0, 14))
def test_fixed_point_errs_by_half_a_step_at_most(values, bits):
    weight = np.array(values, np.float32)
    expr = compress(FixedPoint(bits), weight)
    if not weight.any():
        assert decode(expr).tobytes() == weight.tobytes()
        return
    step, wide = float(expr.scale[0]), weight.astype(np.float64)
    root = np.sqrt(np.mean(wide**2))
    assert np.abs(decode(expr) - wide).max() <= step / 2
    assert step <= max(root * 2.0**-bits, np.abs(wide).max() / 16383.5, 2.0**-126) * (1 + 1e-12)


def test_at_equal_error_fixed_point_takes_fewer_bytes_than_mantissas():
    weight = np.random.default_rng(0).normal(size=4000).astype(np.float32)

    def of(method):
        expr = compress(method, weight)
        error = np.mean((decode(expr) - weight) ** 2)
        return error, len(code_tensor("w", "float32", (4000,), expr).payload)

    (error, nbytes), (other_error, other_nbytes) = of(FixedPoint(5)), of(Keep(5))
    assert error < 1.5 * other_error
    assert nbytes < 0.95 * other_nbytes


# -- KMeans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 16, 300])
def test_kmeans_reaches_the_error_of_the_solver(k):
    weight = laplacian(30, 50)
    found = decode(compress(KMeans(k), weight)).astype(np.float64)
    assert len(np.unique(found)) == k
    assert np.sum((found - weight) ** 2) == pytest.approx(kmeans(make_bins(weight), k).sse, rel=1e-4)


def test_kmeans_ships_the_means_of_its_members():
    weight = laplacian(30, 50)
    (lookup,) = lookups(compress(KMeans(6), weight))
    means = [weight[lookup.codes[0] == code].mean(dtype=np.float64) for code in range(6)]
    np.testing.assert_allclose(lookup.codebook[0, :, 0], means, rtol=1e-6)
    nearest = np.searchsorted(midpoints(lookup.codebook[0, :, 0]), weight)
    assert np.mean(nearest == lookup.codes[0]) > 0.999


def test_kmeans_by_hand_with_importance():
    weight = np.array([0, 1, 3], np.float32)
    assert decode(compress(KMeans(2), weight)).tolist() == [0.5, 0.5, 3]
    found = decode(compress(KMeans(2), weight, np.array([100.0, 100, 1])))
    assert found.tolist() == pytest.approx([0, 103 / 101, 103 / 101])


def test_few_distinct_values_are_kept_exactly_even_next_to_each_other():
    step = np.spacing(np.float32(1))
    weight = np.array([[1, 1 + step, 1 + 2 * step], [-1, 0, 1 + step]], np.float32)
    np.testing.assert_array_equal(decode(compress(KMeans(8), weight)), weight)


def test_zero_is_a_codeword_if_asked():
    weight = np.where(np.arange(600).reshape(20, 30) % 3 == 0, 0, laplacian(20, 30) + 0.1)
    for granularity in ("tensor", "row"):
        assert not np.any(decode(compress(KMeans(6, granularity=granularity), weight))[weight == 0] == 0)
        found = decode(compress(KMeans(6, granularity=granularity, zero=True), weight))
        assert np.all(found[weight == 0] == 0)


def test_codes_take_the_smallest_unsigned_dtype():
    weight = laplacian(40, 40)
    for k, dtype in ((256, np.uint8), (257, np.uint16)):
        (lookup,) = lookups(compress(KMeans(k), weight))
        assert lookup.codes.dtype == dtype


# -- scales and expressions ---------------------------------------------------------------------------------------


def test_a_scale_for_each_row_evens_out_rows():
    weight = laplacian(50, 400) * np.logspace(-2, 0, 50, dtype=np.float32)[:, None]
    for method in (KMeans, RateAware):
        option = 8 if method is KMeans else 0.05
        by_row, by_tensor = (
            decode(compress(method(option, granularity=granularity), weight)) for granularity in ("row", "tensor")
        )
        per_row = [error(by_row[row], weight[row]) for row in range(50)]
        assert max(per_row) < 0.15
        assert error(by_tensor[0], weight[0]) > 0.9  # next to the largest rows the smallest is nothing


def test_row_scales_are_the_root_mean_square_to_two_bits():
    rows = laplacian(30, 300) * np.logspace(-1, 2, 30, dtype=np.float32)[:, None]
    norms = np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=1))
    np.testing.assert_allclose(row_scales(rows).divisor(30), norms, rtol=2.0**-3)


def test_rate_aware_on_a_grid_is_whole_numbers_and_a_step():
    match compress(RateAware(0.05), laplacian(8, 100)):
        case Reshape(Affine(Affine(Lookup(codes, codebook), step, None), scales, None), dims):
            assert (codes.shape, codebook.dtype, step.shape, scales.shape) == (
                (1, 8, 100),
                np.int8,
                (1, 1, 1),
                (8, 1, 1),
            )
            assert dims == (8, 100)
        case other:
            pytest.fail(f"another expression: {other}")


def test_rate_aware_with_two_codewords_at_a_tiny_price_does_not_overflow_its_steps():
    found = decode(compress(RateAware(1e-12, max_clusters=2), np.abs(laplacian(1, 500))))
    assert len(np.unique(found)) <= 2
    assert found.min() == 0


def test_a_dearer_bit_gives_a_smaller_file_and_more_error():
    weight = laplacian(100, 100)
    exprs = [compress(RateAware(lam, granularity="tensor"), weight) for lam in (0.001, 0.01, 0.1, 1.0)]
    sizes = [code_tensor("w", "float32", weight.shape, expr).nbytes for expr in exprs]
    errors = [error(decode(expr), weight) for expr in exprs]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[0] > 3 * sizes[3]


def test_rows_are_output_channels():
    assert as_rows(np.zeros((4, 3, 2, 2))).shape == (4, 12)
    assert as_rows(np.zeros(5)).shape == (1, 5)
    assert as_rows(np.zeros(())).shape == (1, 1)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Keep(-1), r"mantissa_bits must lie in 0\.\.52, got -1"),
        (lambda: Keep(53), "53"),
        (lambda: FixedPoint(-1), r"bits must lie in 0\.\.14, got -1"),
        (lambda: FixedPoint(15), "15"),
        (lambda: KMeans(0), r"n_clusters must lie in 1\.\.65536, got 0"),
        (lambda: KMeans(65537), "65537"),
        (lambda: RateAware(0), "lam must be a positive number, got 0"),
        (lambda: RateAware(-1.0), "got -1"),
        (lambda: RateAware(float("nan")), "nan"),
        (lambda: RateAware(float("inf")), "inf"),
        (lambda: RateAware(0.1, max_clusters=0), r"max_clusters must lie in 1\.\.4096, got 0"),
        (lambda: RateAware(0.1, max_clusters=4097), "4097"),
    ],
)
def test_wrong_options_are_plan_errors(build, says):
    with pytest.raises(PlanError, match=says):
        build()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_options_are_data(method):
    assert msgspec.convert(msgspec.to_builtins(method), BuiltIn) == method
    assert hash(method) == hash(msgspec.convert(msgspec.to_builtins(method), BuiltIn))
    with pytest.raises(AttributeError):
        method.n_clusters = 3


def test_keep_of_integers_is_raw():
    steps = np.array(5)
    expr = compress(Keep(3), steps)
    assert isinstance(expr, Raw)
    assert expr.values is steps


def test_errors_of_a_vector_are_not_compensated():
    # Each of its values acts alone, so equal weights take equal codewords: compensation would dither them.
    vector = np.repeat(np.linspace(-1, 1, 64, dtype=np.float32), 100)
    dense = decode(compress(RateAware(0.05, granularity="tensor"), vector)).reshape(64, 100)
    assert np.all(dense == dense[:, :1])
    assert np.all(np.diff(dense[:, 0]) >= 0)


def test_fixed_point_is_called_so():
    assert describe(compress(FixedPoint(3), laplacian(9))) == "fixed point"
