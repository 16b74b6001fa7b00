"""The torch twin of decode: bit equality for every node and dtype, gradients by hand, and the way back to an Expr."""

from __future__ import annotations

import copy
import io
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.errors import ExprError
from codeword.expr import (
    DTYPES,
    FLOATS,
    Affine,
    Expr,
    Lookup,
    Permute,
    Raw,
    Reshape,
    Scatter,
    Sum,
    decode,
    leaves,
    shape,
)
from codeword.nn import TorchExpr

NARROW = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bits(array: np.ndarray) -> bytes:
    """The bytes of an array, narrow floats widened as the twin widens them, every NaN the same one."""
    if array.dtype in (DTYPES["float16"], DTYPES["bfloat16"], DTYPES["float8_e4m3"], DTYPES["float8_e5m2"]):
        array = array.astype(np.float32)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return array.tobytes()


def same(expr: Expr) -> TorchExpr:
    """Checks that the twin computes what decode does, and that to_expr loses nothing; returns the twin."""
    twin = TorchExpr(expr)
    dense = decode(expr)
    values = twin().detach()
    assert tuple(values.shape) == dense.shape == twin.shape
    assert bits(values.numpy()) == bits(dense)
    back = twin.to_expr()
    for (path, old), (new_path, new) in zip(leaves(expr), leaves(back), strict=True):
        assert path == new_path
        assert old.dtype == new.dtype
        assert bits(old) == bits(new)
    assert bits(decode(back)) == bits(dense)
    return twin


def random_array(generator: np.random.Generator, dims: tuple[int, ...], name: str) -> np.ndarray:
    """Values of every magnitude the dtype has: signed zeros and denormals too."""
    dtype = DTYPES[name]
    size = math.prod(dims)
    if name == "bool":
        return generator.integers(0, 2, dims).astype(np.bool_)
    if name in FLOATS:
        raw = np.frombuffer(generator.bytes(size * dtype.itemsize), dtype).reshape(dims)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(raw.astype(np.float64)), raw, dtype.type(0))
    return np.frombuffer(generator.bytes(size * dtype.itemsize), dtype).reshape(dims)


@st.composite
def expressions(draw: st.DrawFn, dims: tuple[int, ...] | None = None, depth: int = 3) -> Expr:
    """A random expression, of shape `dims` if given."""
    generator = rng(draw(st.integers(0, 2**32 - 1)))
    name = draw(st.sampled_from(sorted(DTYPES)))
    if dims is None:
        dims = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = math.prod(dims)
    kinds = ["raw", "lookup"] + (["affine", "sum", "scatter", "permute", "reshape"] if depth else [])
    match draw(st.sampled_from(kinds)):
        case "lookup":
            g = draw(st.sampled_from([g for g in (1, 2, 3) if size % g == 0]))
            d = draw(st.sampled_from([d for d in (1, 2, 3) if (size // g) % d == 0]))
            k = draw(st.integers(1, 300))
            code_types = [np.uint16, np.uint32, np.uint64] + [np.uint8] * (k <= 256)
            codes = generator.integers(0, k, (g, 1, size // g // d)).astype(draw(st.sampled_from(code_types)))
            return Reshape(Lookup(codes, random_array(generator, (g, k, d), name)), dims)
        case "affine":
            inner = draw(expressions(dims, depth - 1))
            tables = []
            for present in draw(st.tuples(st.booleans(), st.booleans())):
                axes = tuple(draw(st.sampled_from([1, n])) for n in dims)
                other = draw(st.sampled_from(sorted(DTYPES)))
                tables.append(random_array(generator, axes, other) if present else None)
            return Affine(inner, *tables)
        case "sum":
            return Sum(tuple(draw(expressions(dims, depth - 1)) for _ in range(draw(st.integers(1, 3)))))
        case "scatter":
            kept = draw(st.integers(0, size))
            positions = np.sort(generator.permutation(size)[:kept])
            typed = positions.astype(draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64])))
            return Reshape(Scatter(size, typed, draw(expressions((kept,), depth - 1))), dims)
        case "permute":
            order = tuple(draw(st.permutations(range(len(dims)))))
            source = [0] * len(dims)
            for axis, of in enumerate(order):
                source[of] = dims[axis]
            return Permute(draw(expressions(tuple(source), depth - 1)), order)
        case "reshape":
            return Reshape(draw(expressions((size,), depth - 1)), dims)
        case _:
            return Raw(random_array(generator, dims, name))


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_random_expressions_have_the_same_bits(expr: Expr):
    with np.errstate(over="ignore", invalid="ignore"):  # random bits overflow now and then, on both sides alike
        same(expr)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_through_every_moving_node(name: str):
    values = random_array(rng(1), (2, 5, 3), name)
    lookup = Lookup(rng(2).integers(0, 5, (2, 4, 6)).astype(np.uint8), values)
    scatter = Scatter(500, np.arange(0, 432, 3, dtype=np.uint32), lookup)
    twin = same(Permute(Reshape(scatter, (50, 10)), (1, 0)))
    same(Raw(values))
    same(Raw(values[0, 0, 0].reshape(())))
    assert len(list(twin.parameters())) == (name in FLOATS)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats_become_float32_parameters_and_return_as_they_came(dtype: type):
    codebook = rng().normal(size=(1, 16, 1)).astype(dtype)
    expr = Affine(Lookup(rng().integers(0, 16, (1, 8, 9)).astype(np.uint8), codebook), np.ones((8, 1, 1), dtype))
    twin = same(expr)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    with torch.no_grad():
        twin.get_parameter("root.inner.codebook").mul_(1.0001)
    trained = dict(leaves(twin.to_expr()))
    assert trained["inner.codebook"].dtype == np.float32  # it no longer fits: kept in full
    assert trained["scale"].dtype == dtype  # untouched
    assert bits(decode(twin.to_expr())) == bits(twin().detach().numpy())


def test_whole_number_codebooks_are_buffers_under_an_affine():
    codes = rng().integers(0, 7, (1, 4, 9)).astype(np.uint8)
    expr = Affine(Lookup(codes, np.arange(-3, 4, dtype=np.int8).reshape(1, 7, 1)), np.full((1, 1, 1), 0.1, np.float32))
    twin = same(Affine(expr, np.array([1, 2, 3, 4], ml_dtypes.float8_e5m2).reshape(4, 1, 1)))
    assert [name for name, _ in twin.named_parameters()] == ["root.scale", "root.inner.scale"]
    assert [name for name, _ in twin.named_buffers()] == ["root.inner.inner.codes", "root.inner.inner.codebook"]
    twin().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_codes_keep_their_dtype_and_groups_their_codebooks():
    codes = rng().integers(0, 300, (3, 4, 5)).astype(np.uint16)
    twin = same(Lookup(codes, rng().normal(size=(3, 300, 2)).astype(np.float32)))
    assert twin.get_buffer("root.codes").dtype == torch.uint16
    assert sum(buffer.nbytes for buffer in twin.buffers()) == codes.nbytes


@pytest.mark.parametrize("d", [1, 2])
def test_gradient_of_a_codeword_is_the_sum_over_its_members(d: int):
    codes = np.array([[[0, 2, 2]], [[1, 0, 0]]], np.uint8)  # two groups of one row of three codes
    twin = TorchExpr(Lookup(codes, np.arange(6 * d, dtype=np.float32).reshape(2, 3, d)))
    upstream = torch.arange(1.0, 1 + 6 * d).reshape(2, 3, d)
    twin().backward(upstream)
    grad = twin.get_parameter("root.codebook").grad
    assert grad is not None
    u = upstream.numpy()
    zero = np.zeros(d, np.float32)
    expected = [[u[0, 0], zero, u[0, 1] + u[0, 2]], [u[1, 1] + u[1, 2], u[1, 0], zero]]
    np.testing.assert_array_equal(grad.numpy(), np.array(expected))


def test_gradients_of_all_float_leaves_agree_with_finite_differences():
    codes = rng().integers(0, 4, (2, 3, 4)).astype(np.uint8)
    affine = Affine(
        Lookup(codes, rng(1).normal(size=(2, 4, 1)).astype(np.float32)),
        rng(2).normal(size=(6, 1, 1)).astype(np.float32),
        rng(3).normal(size=(1, 4, 1)).astype(np.float32),
    )
    outliers = Scatter(24, np.array([1, 5, 23], np.uint32), Raw(rng(4).normal(size=3).astype(np.float32)))
    twin = same(Permute(Sum((Reshape(affine, (6, 4)), Reshape(outliers, (6, 4)))), (1, 0)))
    upstream = torch.from_numpy(rng(5).normal(size=(4, 6)).astype(np.float32))
    (twin() * upstream).sum().backward()
    assert len(list(twin.parameters())) == 4
    for parameter in twin.parameters():
        assert parameter.grad is not None
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(len(flat)):
            old = flat[index].item()
            results = []
            for step in (0.25, -0.25):  # the expression is linear in each leaf: any step is exact
                flat[index] = old + step
                results.append((twin().double() * upstream).sum().item())
            flat[index] = old
            assert grad[index].item() == pytest.approx((results[0] - results[1]) / 0.5, abs=1e-5)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3", "float8_e5m2"])
def test_result_is_rounded_to_the_tensors_dtype_and_gradients_are_not(name: str):
    raw = Raw(np.array([1.0009, -3.3, 1e-9, 447.0, -0.0], np.float32))
    twin = TorchExpr(Affine(raw, np.ones(1, np.float32)), rounded_to=name)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = decode(raw).astype(DTYPES[name])
    values = twin()
    assert values.dtype == torch.float32
    assert bits(values.detach().numpy()) == bits(expected)
    upstream = torch.tensor([0.1, 0.2, 0.3, 1e-12, 1e30])
    values.backward(upstream)
    grad = twin.get_parameter("root.inner.values").grad
    assert grad is not None
    assert torch.equal(grad, upstream)


def test_rounding_to_a_wider_dtype_or_the_same_does_nothing():
    assert TorchExpr(Raw(np.ones(2, np.float32)), rounded_to="float64").rounded_to is None
    assert TorchExpr(Raw(np.ones(2, np.float16)), rounded_to="float16").rounded_to is None
    assert TorchExpr(Raw(np.ones(2, np.int64)), rounded_to="int64").rounded_to is None


def test_whole_numbers_of_a_float_tensor_are_rounded_as_floats():
    twin = TorchExpr(Raw(np.array([2049, -3], np.int16)), rounded_to="float16")
    assert twin().dtype == torch.float32
    assert twin().tolist() == [2048, -3]


def test_casts_leave_the_leaves_alone():
    codes = rng().integers(0, 300, (1, 4, 5)).astype(np.uint16)
    twin = TorchExpr(Affine(Lookup(codes, rng().normal(size=(1, 300, 1)).astype(np.float32)), np.ones((4, 1, 1))))
    before = twin().detach().clone()
    for cast in (twin.half(), twin.double(), twin.to(torch.bfloat16), twin.type(torch.float64)):
        assert {p.dtype for p in cast.parameters()} == {torch.float32, torch.float64}  # the scale came as float64
        assert torch.equal(cast().detach(), before)
    assert twin.to("meta").get_parameter("root.scale").is_meta


def test_memory_is_its_own_and_copies_load():
    codebook = np.ones((1, 2, 1), np.float32)
    codebook.flags.writeable = False  # as leaves read from a file may be
    expr = Lookup(np.zeros((1, 2, 2), np.uint16), codebook)
    twin = TorchExpr(expr)
    with torch.no_grad():
        twin.get_parameter("root.codebook").add_(1)
    taken = twin.to_expr()
    assert decode(expr).max() == 1
    assert decode(taken).min() == 2
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), saved):
        assert torch.equal(other(), twin())
        assert other.get_buffer("root.codes").dtype == torch.uint16
        assert other.get_buffer("root.codes").data_ptr() != twin.get_buffer("root.codes").data_ptr()
    fresh = TorchExpr(expr)
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh(), twin())
    with torch.no_grad():
        twin.get_parameter("root.codebook").add_(1)
    assert decode(taken).min() == 2


def test_contradictions_are_refused():
    book = np.zeros((2, 3, 1), np.float32)
    codes = np.zeros((2, 1, 4), np.uint8)
    codes[0, 0, 1] = 3  # the next group's first codeword, if nobody looked
    with pytest.raises(ExprError, match="code 3 in a codebook of 3"):
        TorchExpr(Lookup(codes, book))
    with pytest.raises(ExprError, match="positions must rise"):
        TorchExpr(Scatter(9, np.array([4, 4], np.uint8), Raw(np.ones(2, np.float32))))


def test_repr_names_shape_and_nodes():
    twin = TorchExpr(Reshape(Raw(np.ones((2, 3), np.float32)), (3, 2)), rounded_to="float16")
    assert "(3, 2), rounded_to=float16" in repr(twin)
    assert shape(twin.to_expr()) == (3, 2)
