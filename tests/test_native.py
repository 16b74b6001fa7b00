"""The native core against the NumPy reference: the same bits, whatever the input, its layout, and the threads."""

import hashlib
import os
import subprocess
import sys
from importlib import resources

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codeword.errors import FormatError
from codeword.kernels import (
    assign,
    birch,
    bits,
    chunks,
    compensate,
    groups,
    histogram,
    moments,
    native,
    partition,
    rans,
    vectors,
)
from codeword.math.moments import factor

pytestmark = pytest.mark.skipif(native.load() is None, reason="no native core: python -m codeword.kernels.native")
LIMITS = [1 << 62, 1 << 16, 1 << 13]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
EXTREME = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.17e-38, -3e-39, 1e-3, 1.0, 1 + 2**-23, -1.0, 65504.0, 1e30, -1e30, 3.4e38]


def same(name, module, *arguments):
    """Both implementations of a kernel on the same arguments; returns what they return."""
    found = getattr(module, f"_{name}_native")(*arguments)
    expected = getattr(module, f"{name}_numpy")(*arguments)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for a, b in pairs:
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()
        else:
            assert a == b
    return found


def matrix(shape, seed=0, dtype=np.float32, extreme=False):
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, shape)
    if extreme and values.size:
        spots = generator.random(shape) < 0.3
        values[spots] = generator.choice(EXTREME, int(spots.sum()))
        if np.dtype(dtype).itemsize == 2:
            values = np.clip(values, -60000, 60000)
    return values.astype(dtype)


def layouts(values):
    """The same values as they may come: C order, Fortran order, strided, read-only."""
    yield values
    yield np.asfortranarray(values)
    wide = np.zeros((2 * values.shape[0], 3 * values.shape[1]), values.dtype)
    wide[::2, ::3] = values
    yield wide[::2, ::3]
    frozen = values.copy()
    frozen.flags.writeable = False
    yield frozen


SHAPES = [(0, 3), (3, 0), (1, 1), (1, 7), (5, 1), (3, 17), (70, 33), (9, 5000), (4100, 2)]
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9), elements=floats)


# -- the choice of input: layouts, dtypes, chunks -----------------------------------------------------------------


def every_float_kernel(values, scale, importance, k):
    """All kernels over a matrix, natively and by NumPy."""
    generator = np.random.default_rng(k)
    codebook = np.unique(generator.normal(size=k)) * 2
    penalty = generator.random(len(codebook)) * 0.1
    wide, prices = codebook.astype(np.float32), penalty.astype(np.float32)
    edges = (wide[1:] + wide[:-1]) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        codes = same("assign", assign, values, scale, edges)
        same("assign_parts", assign, values, scale, edges)
        same("cluster_sums", assign, values, scale, None, codes, len(codebook))
        same("histogram", histogram, values, scale, None)
        if importance is not None:
            same("cluster_sums", assign, values, scale, importance, codes, len(codebook))
            same("histogram", histogram, values, scale, importance)
            same("assign_weighted", assign, values, scale, importance, wide, prices)
        for kernel in {1, values.shape[1] or 1}:
            same("assign_compensated", compensate, values, scale, None, kernel, codebook, penalty)
            if importance is not None:
                same("assign_compensated", compensate, values, scale, importance, kernel, codebook, penalty)


def upper(columns, seed=0):
    """A factor of inverse moments of dependent inputs."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(3 * columns, columns)) @ generator.normal(size=(columns, columns)) + 1
    return factor(x.T @ x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 32), (65, 33), (130, 70)])
@pytest.mark.parametrize("k", [1, 2, 16, 17, 300])
def test_moments_in_any_shape(shape, dtype, k):
    generator = np.random.default_rng(k)
    codebook, penalty = np.unique(generator.normal(size=k)) * 2, generator.random(k) * 0.1
    scale = generator.random(shape[0]).astype(np.float32) + np.float32(0.5)
    values = matrix(shape, dtype=dtype)
    for divisor in (None, scale):
        same("assign_by_moments", moments, values, divisor, upper(shape[1]), codebook, penalty)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_and_dtype(shape, dtype):
    values = matrix(shape, dtype=dtype)
    scale = np.random.default_rng(1).random(shape[0]).astype(np.float32) + np.float32(0.5)
    importance = np.random.default_rng(2).random(shape).astype(np.float32)
    every_float_kernel(values, None, None, 5)
    every_float_kernel(values, scale, importance, 17)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(dtype):
    values = matrix((40, 36), 3, dtype)
    for here, h in zip(layouts(values), layouts(np.abs(matrix((40, 36), 4))), strict=True):
        every_float_kernel(here, None, h, 16)
        every_float_kernel(here, np.linspace(0.5, 2, 40, dtype=np.float32), h, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_dtype_of_scale_and_importance(dtype):
    values, h = matrix((30, 24), 5), np.abs(matrix((30, 24), 6)).astype(dtype)
    every_float_kernel(values, np.linspace(0.1, 3, 30).astype(np.float32), h, 9)
    same("histogram", histogram, values, np.linspace(0.1, 3, 30), h)
    same("assign", assign, values, np.linspace(0.1, 3, 30), np.linspace(-1, 1, 7, dtype=np.float32))


@pytest.mark.parametrize("chunk", [50, 700])
def test_chunks_of_any_size_are_added_up_alike(chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    for shape in [(13, 17), (3, 130), (130, 3)]:
        for here in layouts(matrix(shape, 7)):
            every_float_kernel(here, None, np.abs(matrix(shape, 8)), 6)


def test_more_than_one_chunk():
    values = matrix((3, 1_100_000), 9)
    h = np.abs(matrix(values.shape, 10))
    same("histogram", histogram, values, None, None)
    same("histogram", histogram, values, None, h)
    codes = same("assign", assign, values, None, np.linspace(-2, 2, 300, dtype=np.float32))
    assert codes.dtype == np.uint16
    same("assign_parts", assign, values, None, np.linspace(-2, 2, 300, dtype=np.float32))
    same("cluster_sums", assign, values, None, h, codes, 301)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_zeros_and_outliers(dtype):
    values = matrix((60, 50), 11, dtype, extreme=True)
    scale = np.linspace(1, 2, 60, dtype=np.float32)  # what is divided stays finite
    for divisor in (None, scale):
        same("histogram", histogram, values, divisor, None)
        same("histogram", histogram, values, divisor, np.abs(matrix((60, 50), 12)))
        every_float_kernel(values, divisor, np.abs(matrix((60, 50), 13)), 12)


@settings(deadline=None, max_examples=200)
@given(matrices, st.data())
def test_whatever_the_values(values, data):
    importance = data.draw(
        st.none() | hnp.arrays(np.float32, values.shape, elements=st.floats(0, 1e6, width=32, allow_subnormal=True))
    )
    edges = np.sort(data.draw(hnp.arrays(np.float32, st.integers(0, 40), elements=floats)))
    sums = same("histogram", histogram, values, None, importance)
    assert sums.counts.sum() == values.size
    codes = same("assign", assign, values, None, edges)
    same("assign_parts", assign, values, None, edges)
    same("assign_parts", assign, values, None, np.sort(values.reshape(-1)))
    with np.errstate(over="ignore", invalid="ignore"):
        same("cluster_sums", assign, values, None, importance, codes, len(edges) + 1)
        same("assign", assign, values, None, values.reshape(-1)[np.argsort(values.reshape(-1))])  # ties


# -- histogram ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_finite_pattern_of_16_bits_has_a_bin_of_its_own(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    values = np.tile(finite, 3).reshape(3, -1)
    for here in (values, np.asfortranarray(values)):
        sums = same("histogram", histogram, here, None, None)
        assert (sums.counts == 3).all()
        expected = np.sort(finite.astype(np.float64))
        np.testing.assert_array_equal(sums.first, 3 * expected)
        np.testing.assert_array_equal(sums.second, 3 * expected**2)


def test_unweighted_sums_are_rounded_once():
    values = matrix((100, 3000), 14, extreme=True)
    sums = histogram.histogram(values, None, None)
    wide = values.astype(np.float64).reshape(-1)
    assert np.abs(sums.first).sum() == pytest.approx(np.abs(wide).sum(), rel=1e-13)
    assert sums.second.sum() == pytest.approx((wide**2).sum(), rel=1e-13)
    flat = np.full((1, 1000), 0.1, np.float32)
    (first,) = histogram.histogram(flat, None, None).first
    assert first == 1000 * float(np.float32(0.1))


def test_bins_of_very_many_values_do_not_overflow():
    values = np.tile(np.array([1 - 2**-24, -3.0, 2**-140], np.float32), (3, 300_000))
    assert same("histogram", histogram, values, None, None).counts.tolist() == [900_000] * 3
    same("histogram", histogram, values.astype(np.float16), None, None)


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(0, 50)), elements=st.floats(-9, 9)), st.data())
def test_prefixes(parts, data):
    same("prefixes", histogram, parts, data.draw(st.integers(0, parts.shape[1])))
    with pytest.raises(ValueError, match="anchor"):
        histogram._prefixes_native(parts, parts.shape[1] + 1)


# -- assignment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 64, 255, 256, 257, 1000, 65536, 65537])
def test_assign_for_any_k(k):
    generator = np.random.default_rng(k)
    edges = np.sort(generator.normal(size=k - 1)).astype(np.float32)
    some = np.resize(edges, 400) if k > 1 else np.zeros(400, np.float32)
    values = np.concatenate([some, np.nextafter(some, np.float32(9)), generator.normal(size=333)]).astype(np.float32)
    values = np.append(values, [np.inf, -np.inf, np.nan, 0.0, -0.0]).astype(np.float32)
    codes = same("assign", assign, values[None], None, edges)
    assert codes.dtype == assign.code_dtype(k)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_assign_of_16_bits(dtype):
    values = matrix((300, 400), 15, dtype, extreme=True)
    every = np.resize(np.arange(1 << 16, dtype=np.uint16), (2, 40_001)).view(dtype)  # NaN and infinity too
    for k in (1, 2, 7, 15, 16, 17, 31, 32, 33, 300):
        edges = np.linspace(-2, 2, k - 1).astype(np.float32)
        with np.errstate(invalid="ignore"):
            same("assign", assign, every, None, edges)
            same("assign", assign, every, None, np.sort(edges * 1e30))
            same("assign", assign, every, None, np.sort(edges * 1e-38))
        for here in layouts(values):
            same("assign", assign, here, None, edges)


def test_codes_past_the_codebook_and_shapes_that_differ_are_refused():
    values, codes = np.zeros((2, 2), np.float32), np.full((2, 2), 3, np.uint8)
    with pytest.raises(ValueError, match="code 3"):
        assign._cluster_sums_native(values, None, None, codes, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        assign._cluster_sums_native(values, None, values[:1], codes, 4)
    with pytest.raises(ValueError, match="scale"):
        assign._assign_native(values, np.ones(3, np.float32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="scale"):
        compensate._assign_compensated_native(values, np.ones(3, np.float32), None, 1, np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="candidates"):
        partition._best_path_native(np.array([[7]]), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="C order"):
        native.call("cw_abi", np.zeros((4, 4))[:, ::2])


# -- compensation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 16, 17, 64, 300])
@pytest.mark.parametrize(("shape", "kernel"), [((130, 90), 9), ((1, 6), 3), ((257, 130), 130), ((64, 64), 1)])
def test_compensation(shape, kernel, k):
    generator = np.random.default_rng(k)
    values, h = matrix(shape, k), generator.random(shape).astype(np.float32)
    scale = generator.random(shape[0]).astype(np.float32) + np.float32(0.1)
    codebook, penalty = np.sort(generator.normal(size=k)) * 2, generator.random(k)
    for divisor in (None, scale):
        for importance in (None, h, np.zeros_like(h)):
            same("assign_compensated", compensate, values, divisor, importance, kernel, codebook, penalty)


# -- vectors ------------------------------------------------------------------------------------------------------


def every_vector_kernel(x, h, words, penalty):
    """All kernels over vectors, natively and by NumPy."""
    for weight in (None, h):
        for price in (None, penalty):
            table = vectors._table(words, price, weight is not None)
            for sums in (False, True):
                found = vectors._run_native(x, weight, table, sums)
                for a, b in zip(found, vectors.run_numpy(x, weight, table, sums), strict=True):
                    assert a.dtype == b.dtype
                    assert a.shape == b.shape
                    assert a.tobytes() == b.tobytes()
    products = vectors._Table(words, np.zeros(len(words), np.float32), None)
    for a, b in zip(
        vectors._run_native(x, None, products, False), vectors.run_numpy(x, None, products, False), strict=True
    ):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("d", [*range(1, 18), 40])
@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (70, 5), (1500, 300)])
def test_vectors(n, d, k):
    generator = np.random.default_rng(d)
    x, words, h = matrix((n, d), 1), matrix((k, d), 2), generator.random((n, d)).astype(np.float32)
    x[: n // 2], words[: k // 2] = np.rint(x[: n // 2]), np.rint(words[: k // 2])  # ties
    h[::3] = 0
    every_vector_kernel(x, h, words, generator.random(k))


def test_vectors_of_many_pieces_and_codes_of_all_widths():
    generator = np.random.default_rng(0)
    x, h = matrix((9001, 3), 3), generator.random((9001, 3)).astype(np.float32)
    for k, dtype in [(256, np.uint8), (257, np.uint16), (65537, np.uint32)]:
        words = matrix((k, 3), k)
        some = slice(None) if k < 1000 else slice(200)
        table = vectors._table(words, None, True)
        assert vectors._run_native(x[:1], h[:1], table, False)[0].dtype == dtype
        every_vector_kernel(x[some], h[some], words, generator.random(k))


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 20), st.integers(0, 80))
def test_vectors_whatever_the_values(data, d, k, n):
    value, positive = st.floats(-(2.0**50), 2.0**50, width=32), st.floats(0, 2.0**20, width=32)
    x, words = (data.draw(hnp.arrays(np.float32, (rows, d), elements=value)) for rows in (n, k))
    h = data.draw(hnp.arrays(np.float32, (n, d), elements=positive))
    every_vector_kernel(x, h, words, data.draw(hnp.arrays(np.float64, k, elements=positive)))


def test_vectors_that_do_not_fit_are_refused():
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(2, 5\) do not go"):
        vectors.nearest(x, None, np.zeros((2, 5)), None)
    with pytest.raises(ValueError, match="do not go"):
        vectors.nearest(x, x[:2], np.zeros((2, 3)), None)
    with pytest.raises(ValueError, match="penalty"):
        vectors.nearest(x, None, np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="do not go"):
        vectors.nearest(x, None, np.zeros((0, 3)), None)


# -- clustering ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_layers_and_paths(m, seed, whole):
    generator = np.random.default_rng(seed)
    # Whole numbers make ties, weights of zero make empty bins.
    values = np.sort(generator.integers(-4, 5, m).astype(float) if whole else generator.normal(size=m))
    weight = generator.integers(0, 3, m).astype(float)
    parts = np.stack([weight, weight * values, weight * values**2])
    prefix = np.concatenate([np.zeros((3, 1)), np.cumsum(parts, axis=1)], axis=1)
    for k in (1, 2, 4, m + 2):
        same("best_partition", partition, prefix, k)
    rows, width = generator.integers(1, 6), generator.integers(1, 34)
    candidates = np.sort(generator.integers(0, m + 1, (rows, width)), axis=1)
    same("best_path", partition, candidates, prefix)


def test_long_layers():
    values = np.sort(np.random.default_rng(0).standard_t(2, 5000))
    prefix = np.concatenate([np.zeros((3, 1)), np.cumsum([np.ones(5000), values, values**2], axis=1)], axis=1)
    _, edges = same("best_partition", partition, prefix, 6)
    near = np.clip(edges[1:-1, None] + np.arange(-300, 301), 0, 5000)
    assert same("best_path", partition, near, prefix).tolist() == edges[1:-1].tolist()


@settings(deadline=None)
@given(
    st.sampled_from([0, 1, 50, 3000]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "ties", "rising", "far apart", "extreme", "alike"]),
    st.floats(0, 3),
    st.integers(1, 3000),
)
def test_the_scan_of_birch(n, seed, draw, threshold, chunk):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=n)
    match draw:
        case "ties":
            values = np.rint(4 * values)
        case "rising":
            values.sort()
        case "far apart":
            values = np.exp(20 * values)
        case "extreme":
            values = matrix((n,), seed, extreme=True).astype(np.float64)
        case "alike":  # so near to each other that rounding decides
            values = 1e6 + 1e-9 * values
            threshold *= 1e-3
    importance = generator.integers(0, 3, n).astype(np.float32) * np.float32(0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(birch, "_CHUNK", chunk)
        patch.setattr(birch, "_ROOM", 4)  # grows all the time
        for h in (None, importance):
            for dtype in (np.float64, np.float32):
                with np.errstate(over="ignore"):
                    here = values.astype(dtype)
                features = same("cluster_features", birch, here, h, threshold)
                assert features[0].sum() == pytest.approx(n if h is None else h.sum(dtype=np.float64))


def test_the_scan_of_birch_of_what_should_not_come():
    for odd in (np.nan, np.inf, -np.inf, 1e308, -1e308):
        values = np.random.default_rng(0).normal(size=500)
        values[::7] = odd
        with np.errstate(over="ignore", invalid="ignore"):
            found = birch._cluster_features_native(values, None, 0.1)
        assert found[0].sum() == 500
    with pytest.raises(ValueError, match=r"values must be \(n,\), got \(3,\), with an importance for each"):
        birch._cluster_features_native(np.zeros(3), np.zeros(4), 1.0)
    with pytest.raises(ValueError, match=r"got \(3, 1\)"):
        birch._cluster_features_native(np.zeros((3, 1)), None, 1.0)


# -- entropy coder and bits ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, rans.MAX_ALPHABET),
    st.integers(1, 5000),
    st.sampled_from(LIMITS),
    st.integers(0, 3000),
    st.integers(0, 2**32 - 1),
    st.floats(0.001, 1),
)
def test_rans(alphabet, lanes, limit, n, seed, skew):
    symbols = (alphabet * np.random.default_rng(seed).random(n) ** (1 / skew)).astype(np.uint16)
    same("adaptive_cost", rans, symbols, alphabet, lanes, limit)
    states, words = same("rans_encode", rans, symbols, alphabet, lanes, limit)
    for dtype in (np.uint16, np.uint32) if alphabet > 256 else (np.uint8, np.uint16):
        found = same("rans_decode", rans, states, words, n, alphabet, limit, np.dtype(dtype))
        np.testing.assert_array_equal(found, symbols)


@pytest.mark.parametrize("limit", LIMITS)
def test_rans_over_many_blocks(limit):
    generator = np.random.default_rng(0)
    for alphabet, dtype in ((2, np.uint8), (200, np.uint8), (4096, np.uint16)):
        symbols = np.minimum(generator.geometric(0.05, 50_000) - 1, alphabet - 1).astype(dtype)
        for lanes in (1, 4096):
            states, words = same("rans_encode", rans, symbols, alphabet, lanes, limit)
            same("adaptive_cost", rans, symbols, alphabet, lanes, limit)
            same("rans_decode", rans, states, words, len(symbols), alphabet, limit, symbols.dtype)


@settings(deadline=None)
@given(st.data(), st.integers(2, 300), st.integers(1, 40), st.integers(0, 400))
def test_hostile_streams_end_alike(data, alphabet, lanes, n):
    states = data.draw(hnp.arrays(np.uint32, lanes, elements=st.integers(0, 2**32 - 1)))
    words = data.draw(hnp.arrays(np.uint16, st.integers(0, 60)))
    limit = data.draw(st.sampled_from(LIMITS))

    def result(run):
        try:
            return run(states, words, n, alphabet, limit, np.dtype(np.uint16)).tolist()
        except FormatError as error:
            return str(error)

    assert result(rans._rans_decode_native) == result(rans.rans_decode_numpy)


def test_symbols_and_alphabets_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="symbol 4"):
        rans._rans_encode_native(np.array([4], np.uint8), 4, 1, LIMITS[0])
    with pytest.raises(ValueError, match="alphabet of 0"):
        rans._adaptive_cost_native(np.array([], np.uint8), 0, 1, LIMITS[0])


@settings(deadline=None)
@given(st.sampled_from([8, 16, 32, 64]), st.data(), st.integers(0, 300))
def test_bits(size, data, n):
    width = data.draw(st.integers(1, size))
    values = np.random.default_rng(n).integers(0, (1 << width) - 1, n, np.uint64, endpoint=True).astype(f"u{size // 8}")
    packed = same("pack_bits", bits, values, width)
    found = same("unpack_bits", bits, packed, width, n, values.dtype)
    np.testing.assert_array_equal(found, values)
    same("pack_bits", bits, np.repeat(values, 2)[::2], width)
    same("pack_bits", bits, values.astype(values.dtype.newbyteorder(">")), width)


@pytest.mark.parametrize("width", [1, 7, 12])
def test_bits_over_many_pieces(width):
    values = np.random.default_rng(0).integers(0, 1 << width, 300_001).astype(np.uint16)
    packed = same("pack_bits", bits, values, width)
    same("unpack_bits", bits, packed, width, len(values), values.dtype)
    with pytest.raises(ValueError, match="are not"):
        bits._unpack_bits_native(packed[:-1], width, len(values), values.dtype)


# -- threads, and all of it together ------------------------------------------------------------------------------


def test_the_number_of_threads_changes_nothing(monkeypatch):
    values = matrix((500, 2100), 20)
    h, scale = np.abs(matrix(values.shape, 21)), np.linspace(0.5, 2, 500, dtype=np.float32)
    codebook = np.linspace(-3, 3, 21)
    monkeypatch.setattr(chunks, "CHUNK", 1 << 14)

    def digest():
        codes = assign.assign(values, scale, (codebook[1:] + codebook[:-1]) / 2)
        results = [
            codes,
            *histogram.histogram(values, scale, None),
            *histogram.histogram(values, scale, h),
            *histogram.histogram(values.astype(np.float16), None, None),
            *assign.cluster_sums(values, scale, h, codes, 21),
            *assign.assign_parts(values, scale, codebook)[1],
            assign.assign_weighted(values[:50], None, h[:50], codebook, np.zeros(21)),
            *groups.cluster_groups(values[:50], h[:50], 9),
            compensate.assign_compensated(values[:, :300], scale, None, 3, codebook, np.zeros(21)),
        ]
        for weight in (None, h.reshape(-1, 4)):
            *found, members = vectors.nearest_and_members(values.reshape(-1, 4), weight, matrix((90, 4), 22), None)
            results += [*found, *(part for part in members if part is not None)]
        packed = bits.pack_bits(codes.reshape(-1), 5)
        results += [bits.unpack_bits(packed, 5, codes.size, codes.dtype)]
        return hashlib.sha256(b"".join(result.tobytes() for result in results) + packed).hexdigest()

    found = set()
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("CODEWORD_THREADS", str(threads))
        found.add(digest())
    assert len(found) == 1


def test_lenet5_is_compressed_to_the_same_bytes(tmp_path):
    plan = tmp_path / "plan.toml"
    source = str(resources.files("codeword") / "zoo" / "lenet5.safetensors")
    written = {}
    for kernels in ("native", "numpy"):
        out = tmp_path / f"{kernels}.cw"
        subprocess.run(
            [sys.executable, "-m", "codeword", "compress", source, "-o", out, "--target", "20x", "--save-plan", plan],
            env={**os.environ, "CODEWORD_KERNELS": kernels},
            check=True,
            capture_output=True,
        )
        written[kernels] = out.read_bytes(), plan.read_text()
    assert written["native"] == written["numpy"]
