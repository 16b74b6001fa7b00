"""The expression algebra: each node by hand, what it refuses, and the float32 rule bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeword.errors import ExprError, FormatError
from codeword.expr import (
    DTYPES,
    FLOATS,
    Affine,
    Lookup,
    Permute,
    Raw,
    Reshape,
    Scatter,
    Sum,
    decode,
    dtype_name,
    fits_dtype,
    is_float,
    leaves,
    lookups,
    nbytes,
    result_dtype,
    shape,
    with_leaves,
)


def f32(*values):
    return np.array(values, np.float32)


def u8(*values):
    return np.array(values, np.uint8)


# -- values by hand -----------------------------------------------------------------------------------------------


def test_raw_is_its_values():
    values = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert decode(Raw(values)) is values
    assert shape(Raw(values)) == (2, 3)


def test_lookup_takes_rows_of_groups_and_blocks_of_columns():
    codes = u8(0, 1, 1, 1, 0, 0, 1, 0).reshape(2, 2, 2)  # 2 groups of 2 rows of 2 codes
    codebook = f32(1, 2, 3, 4, 10, 20, 30, 40).reshape(2, 2, 2)  # 2 codewords of 2 values each
    expected = [[[1, 2], [3, 4]], [[3, 4], [3, 4]], [[10, 20], [10, 20]], [[30, 40], [10, 20]]]
    expr = Lookup(codes, codebook)
    assert shape(expr) == (4, 2, 2)
    assert decode(expr).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("groups", [1, 2])
def test_lookup_takes_codes_of_any_unsigned_dtype(dtype, groups):
    codes = np.full((groups, 1, 2), 1, dtype)
    assert decode(Lookup(codes, np.tile(f32(5, 7).reshape(1, 2, 1), (groups, 1, 1)))).tolist() == [[[7], [7]]] * groups


def test_affine_scales_rows_and_adds():
    inner = Raw(np.array([[1, 2], [3, 4]], np.int8))
    assert decode(Affine(inner, f32(10, 100).reshape(2, 1), f32(0.5))).tolist() == [[10.5, 20.5], [300.5, 400.5]]
    assert decode(Affine(inner, None, f32(1, 2))).tolist() == [[2, 4], [4, 6]]
    assert decode(Affine(inner)).dtype == np.float32


def test_sum_adds_from_left_to_right():
    # 2**24 + 1 is no float32: from the left both ones are lost, from the right they would not be.
    terms = tuple(Raw(f32(value)) for value in (2.0**24, 1, 1))
    assert decode(Sum(terms)).tolist() == [2.0**24]
    assert decode(Sum(terms[::-1])).tolist() == [2.0**24 + 2]


def test_scatter_puts_values_among_zeros():
    expr = Scatter(6, u8(1, 4), Raw(np.array([[7], [9]], np.int32)))
    assert decode(expr).tolist() == [0, 7, 0, 0, 9, 0]
    assert decode(expr).dtype == np.int32
    assert decode(Scatter(3, u8(), Raw(f32()))).tolist() == [0, 0, 0]


def test_permute_is_numpy_transpose_and_reshape_is_c_order():
    values = np.arange(24).reshape(2, 3, 4)
    expr = Permute(Raw(values), (2, 0, 1))
    assert shape(expr) == (4, 2, 3)
    np.testing.assert_array_equal(decode(expr), np.transpose(values, (2, 0, 1)))
    np.testing.assert_array_equal(decode(Reshape(expr, (8, 3))), np.transpose(values, (2, 0, 1)).reshape(8, 3))


def test_decode_leaves_its_leaves_alone():
    arrays = [f32(1, 2), f32(3, 4), f32(5, 6)]
    before = [array.copy() for array in arrays]
    decode(Sum((Affine(Raw(arrays[0]), arrays[1], arrays[2]), Raw(arrays[0]))))
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


# -- the float32 rule ---------------------------------------------------------------------------------------------

SCALES = st.sampled_from([1e-42, 1e-3, 1.0, 1e3, 1e30])


@given(st.integers(0, 2**32 - 1), SCALES, st.sampled_from(sorted(FLOATS)))
def test_affine_rounds_once_an_operation_and_never_fuses(seed, scale, dtype):
    generator = np.random.default_rng(seed)
    with np.errstate(over="ignore", invalid="ignore"):
        inner, a, b = ((generator.normal(size=(5, 7)) * scale).astype(DTYPES[dtype]) for _ in range(3))
        found = decode(Affine(Raw(inner), a, b))
        product = inner.astype(np.float32).astype(np.float64) * a.astype(np.float32).astype(np.float64)  # exact
        expected = (product.astype(np.float32).astype(np.float64) + b.astype(np.float32)).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_affine_differs_from_a_fused_multiply_add():
    x = np.float32(1 + 2.0**-12)
    fused = np.float32(float(x) * float(x) - 1)
    found = decode(Affine(Raw(f32(x)), f32(x), f32(-1)))[0]
    assert found == np.float32(2.0**-11)
    assert found != fused


def test_terms_become_float32_before_they_are_added():
    wide = 2.0**-24 + 2.0**-50  # as float32 half a unit of 1, which is a tie and goes down; as it is, it would go up
    assert decode(Sum((Raw(f32(1)), Raw(np.array([wide]))))).tolist() == [1]
    assert decode(Affine(Raw(f32(1)), None, np.array([wide]))).tolist() == [1]


def test_wide_integers_round_to_float32_once():
    value = 2**60 + 2**36 + 1  # just above a tie; by way of float64 it would be the tie, and go down
    assert decode(Affine(Raw(np.array([value]))))[0] == np.float32(2**60 + 2**37)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Lookup(np.zeros((1, 2, 2), np.int8), np.zeros((1, 2, 1), np.float32)), "unsigned"),
        (lambda: Lookup(np.zeros((2, 2), np.uint8), np.zeros((1, 2, 1), np.float32)), r"\(g, r, c\)"),
        (lambda: Lookup(np.zeros((2, 2, 2), np.uint8), np.zeros((1, 2, 1), np.float32)), "2 groups"),
        (lambda: Affine(Raw(np.zeros((2, 3))), np.zeros(2)), "scale"),
        (lambda: Affine(Raw(np.zeros(3)), None, np.zeros((2, 3))), "offset"),
        (lambda: Sum(()), "one shape"),
        (lambda: Sum((Raw(np.zeros(2)), Raw(np.zeros(3)))), "one shape"),
        (lambda: Scatter(4, np.array([1]), Raw(f32(1))), "unsigned"),
        (lambda: Scatter(4, u8(1, 2), Raw(f32(1))), "2 positions for 1 values"),
        (lambda: Scatter(1, u8(0, 1), Raw(f32(1, 2))), "in 1 places"),
        (lambda: Permute(Raw(np.zeros((2, 3))), (0, 0)), "permutation"),
        (lambda: Permute(Raw(np.zeros((2, 3))), (0,)), "permutation"),
        (lambda: Reshape(Raw(np.zeros(6)), (4,)), "does not fit"),
        (lambda: Reshape(Raw(np.zeros(6)), (-2, -3)), "does not fit"),
    ],
)
def test_contradictions_are_refused_when_the_node_is_made(build, says):
    with pytest.raises(ExprError, match=says):
        build()


def test_codes_without_a_codeword_are_refused():
    expr = Lookup(u8(0, 2).reshape(1, 1, 2), f32(1, 2).reshape(1, 2, 1))
    with pytest.raises(FormatError, match="code 2 in a codebook of 2"):
        decode(expr)


@pytest.mark.parametrize("positions", [(1, 1), (2, 1), (0, 4), (4, 5)])
def test_positions_that_do_not_rise_within_the_size_are_refused(positions):
    with pytest.raises(ExprError, match="rise"):
        decode(Scatter(4, u8(*positions), Raw(f32(1, 2))))


def test_dtypes_of_no_name_are_refused():
    for dtype in (np.complex64, "datetime64[s]", "U3", object):
        with pytest.raises(ExprError, match="cannot be stored"):
            dtype_name(np.dtype(dtype))


def test_every_dtype_has_its_name_and_floats_are_known():
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
    assert {name for name, dtype in DTYPES.items() if is_float(np.zeros(1, dtype))} == FLOATS
    assert is_float(np.zeros(1, ml_dtypes.bfloat16))


# -- dtypes of results --------------------------------------------------------------------------------------------


def test_a_tensor_is_its_expression_or_a_float_that_float32_holds():
    def fits(values, tensor):
        return fits_dtype(Raw(np.zeros(1, DTYPES[values])), DTYPES[tensor])

    assert all(fits(name, name) for name in DTYPES)
    for name in ("float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8", "uint16", "bool"):
        assert all(fits(name, tensor) for tensor in FLOATS)
    for name in ("float64", "int32", "uint64"):
        assert not any(fits(name, tensor) for tensor in DTYPES if tensor != name)
    assert not any(fits("float32", tensor) for tensor in set(DTYPES) - FLOATS)


# -- walking over leaves ------------------------------------------------------------------------------------------

DTYPE = st.sampled_from([np.float32, np.float16, np.int8, np.uint16])


@st.composite
def expressions(draw, depth=3):
    """An expression of (4, 2, 3) values, or a reshaping of it."""
    kinds = ["raw", "lookup", "scatter"] + (["affine", "sum", "permute", "reshape"] if depth else [])
    values = np.arange(24).astype(draw(DTYPE))
    match draw(st.sampled_from(kinds)):
        case "raw":
            return Raw(values.reshape(4, 2, 3))
        case "lookup":
            codes = np.array(draw(st.lists(st.integers(0, 4), min_size=8, max_size=8)), np.uint8)
            return Lookup(codes.reshape(2, 2, 2), np.arange(30).astype(values.dtype).reshape(2, 5, 3))
        case "scatter":
            positions = sorted(draw(st.sets(st.integers(0, 23))))
            kept = Raw(values[: len(positions)])
            return Reshape(Scatter(24, np.array(positions, np.uint32), kept), (4, 2, 3))
        case "affine":
            flags = draw(st.integers(0, 3))
            scale = np.full((4, 1, 1), 2, np.float16) if flags & 1 else None
            return Affine(draw(expressions(depth - 1)), scale, f32(1, 2, 3) if flags & 2 else None)
        case "sum":
            return Sum(tuple(draw(st.lists(expressions(depth - 1), min_size=1, max_size=3))))
        case "permute":
            return Reshape(Permute(draw(expressions(depth - 1)), draw(st.permutations(range(3)))), (4, 2, 3))
        case _:
            return Reshape(Reshape(draw(expressions(depth - 1)), (24,)), (4, 2, 3))


@given(expressions())
def test_leaves_and_with_leaves_undo_each_other(expr):
    listed = list(leaves(expr))
    assert len({path for path, _ in listed}) == len(listed)
    arrays = iter([array.copy() for _, array in listed])
    again = with_leaves(expr, arrays)
    assert next(arrays, None) is None
    assert [path for path, _ in leaves(again)] == [path for path, _ in listed]
    dense = decode(expr)
    assert (dense.shape, dense.dtype) == (shape(expr), result_dtype(expr))
    np.testing.assert_array_equal(decode(again), dense)
    assert nbytes(again) == sum(array.nbytes for _, array in listed)


def test_leaves_stand_in_file_order_and_lookups_are_found():
    lookup = Lookup(u8(0).reshape(1, 1, 1), f32(1).reshape(1, 1, 1))
    scatter = Reshape(Scatter(1, u8(0), Raw(f32(3))), (1, 1, 1))
    expr = Permute(Sum((Affine(lookup, f32(1), f32(2)), scatter)), (1, 0, 2))
    assert [path for path, _ in leaves(expr)] == [
        "inner.terms[0].inner.codes",
        "inner.terms[0].inner.codebook",
        "inner.terms[0].scale",
        "inner.terms[0].offset",
        "inner.terms[1].inner.positions",
        "inner.terms[1].inner.inner.values",
    ]
    assert list(lookups(expr)) == [lookup]
