"""Tensors that no method was made for, through every method, a plan and a file: what comes back is never worse than
the best constant, in its shape and dtype, and finite."""

import re
from typing import get_args

import ml_dtypes
import numpy as np
import pytest

import codeword
from codeword import (
    Birch,
    DensityKMeans,
    FixedPoint,
    Keep,
    KernelTemplates,
    KMeans,
    Lloyd,
    Plan,
    ProductQuantization,
    Prune,
    RateAware,
    RowScaled,
    Rule,
)
from codeword.errors import NonFiniteError, PlanError
from codeword.methods import BuiltIn

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (8, 2, 3, 3)  # 8 rows of 18: two kernels, and vectors of 2, 3, 6 or 9
NORMAL = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
MOST = np.finfo(np.float32).max


def spiked(base, *spikes):
    values = base.reshape(-1).copy()
    values[7 : 7 + 11 * len(spikes) : 11] = spikes
    return values.reshape(SHAPE)


ZEROS = np.zeros(SHAPE, np.float32)
FEW = {  # at most 3 distinct values
    "zeros": ZEROS,
    "minus zeros": -ZEROS,
    "constant": np.full(SHAPE, -0.3, np.float32),
    "constant far away": np.full(SHAPE, 1000.1, np.float32),
    "two values": np.where(NORMAL > 0, 1.5, -2).astype(np.float32),
    "three values": np.rint(NORMAL).clip(-1, 1),
    "one weight": spiked(ZEROS, 1),
    "rows of zeros": np.where(np.arange(8).reshape(8, 1, 1, 1) % 2, np.sign(NORMAL), 0).astype(np.float32),
    "the largest float": np.full(SHAPE, MOST),
    "the largest floats": np.where(NORMAL > 0, MOST, -MOST),
    "nothing or the largest": np.where(NORMAL > 0, MOST, 0).astype(np.float32),
    "the smallest float": spiked(ZEROS, 1e-45),
    "float16 at its end": np.where(NORMAL > 0, 65504, -1).astype(np.float16),
    "bfloat16 at its end": np.where(NORMAL > 0, ml_dtypes.finfo(BF16).max, -1).astype(BF16),
    "float64 below float32": np.full(SHAPE, 1e-300),
    "float64 about float32's least": np.full(SHAPE, -1e-40),
}
MANY = {
    "normal": NORMAL,
    "float16": NORMAL.astype(np.float16),
    "bfloat16": NORMAL.astype(BF16),
    "float64": NORMAL.astype(np.float64),
    "an outlier": spiked(NORMAL * np.float32(1e-3), 1e30),
    "outliers": spiked(NORMAL * np.float32(1e-3), 1e30, -1e30),
    "the largest float among others": spiked(NORMAL, MOST),
    "the lowest float among others": spiked(NORMAL, -MOST),
    "beyond 1e38": NORMAL * np.float32(1e38),
    "near 1e38": NORMAL * np.float32(2.5e37),
    "denormals": NORMAL * np.float32(1e-41),
    "float16 denormals": (NORMAL * 1e-7).astype(np.float16),
    "next to nothing": NORMAL * np.float32(1e-30),
    "far from zero": 1000 + NORMAL * np.float32(1e-2),
    "closer than float32": 1 + NORMAL.astype(np.float64) * 1e-12,
    "float64 mixed": spiked(NORMAL.astype(np.float64), 1e-300, 1e30),
}
CASES = FEW | MANY

# Those that shall hold few distinct values exactly; the rest round codewords, scales, or weigh an error against bits.
EXACT = [
    KMeans(300),
    KMeans(300, zero=True),
    KMeans(300, granularity="row"),
    *(Lloyd(300, start) for start in ("linear", "random", "kmeans++", "density")),
    DensityKMeans(300),
    RowScaled(300),
    ProductQuantization(3, 300, codebook_dtype="float32"),
]
CLUSTERING = [
    *EXACT,
    FixedPoint(6),
    KMeans(1),
    KMeans(4),
    KMeans(4, zero=True),
    KMeans(4, group_size=2),
    KMeans(4, "row", group_size=4, codebook_dtype="float16"),
    *(Lloyd(4, start) for start in ("linear", "random", "kmeans++", "density")),
    Lloyd(4, "density", "row"),
    Lloyd(1),
    DensityKMeans(1),
    DensityKMeans(4),
    DensityKMeans(),
    Birch(20.0),
    Birch(60.0, scan="raw"),
    *(RateAware(lam, codebook=book) for lam in (1e-4, 10.0) for book in ("grid", "free")),
    *(RateAware(0.05, granularity="tensor", compensate=flag) for flag in (True, False)),
    *(RateAware(0.05, start=start) for start in (KMeans(4), KMeans(3, group_size=1), RowScaled(4), KernelTemplates(4))),
    RateAware(0.05, "tensor", "free", start=ProductQuantization(3, 4, residual_stages=1)),
    RateAware(5.0, start=ProductQuantization(3, 4, skip_zeros=True)),
    RowScaled(1),
    RowScaled(4, "float16"),
    Prune(then=KMeans(4)),
    Prune(then=RateAware(0.05)),
    Prune(then=ProductQuantization(3, 4)),
    ProductQuantization(2, 1),
    ProductQuantization(9, 4, granularity="row"),
    ProductQuantization(3, 4, residual_stages=2),
    ProductQuantization(3, 4, skip_zeros=True, group_size=2),
    ProductQuantization(3, 4, residual_stages=1, shared="all of these"),
    KernelTemplates(1, drop_offset=True, mantissa_bits=0),
    KernelTemplates(4, shared="all of these"),
    KernelTemplates(4),
    KernelTemplates(300, drop_offset=False, mantissa_bits=7, codebook_dtype="float16"),
]
# These minimise the very squared error that a constant has, so none may beat them.
LEAST_SQUARES = (KMeans, Lloyd, DensityKMeans, Birch)


def through_a_file(net, method, path, importance=None):
    """The net as it comes back, its shapes, dtypes and finiteness checked."""
    plan = Plan((Rule("*", method),))
    artifact = codeword.compress(net, plan=plan, importance=importance)
    artifact.save(path)
    loaded = codeword.load(path)
    decoded = {name: loaded.decode(name) for name in net}
    for name, weight in net.items():
        assert decoded[name].tobytes() == artifact.decode(name).tobytes(), name
        assert (decoded[name].shape, decoded[name].dtype) == (weight.shape, weight.dtype), name
        assert np.isfinite(decoded[name].astype(np.float64)).all(), name
    assert codeword.verify(path, net) == []
    return decoded


def unit(values, weight):
    """Float64 values over the largest of weight: squares of those neither over- nor underflow."""
    return values.astype(np.float64) / (float(np.abs(weight.astype(np.float64)).max(initial=0)) or 1.0)


def squares(decoded, weight, constant=0.0):
    """(squared error of decoded, that of a constant of weight's dtype, what rounding may add to the first)."""
    w = unit(weight, weight)
    info = ml_dtypes.finfo(weight.dtype if weight.dtype != np.float64 else np.float32)
    top = float(np.abs(weight.astype(np.float64)).max())
    least = float(info.smallest_subnormal) / top if top > float(info.smallest_subnormal) else 0.0
    rounding = weight.size * (2 * float(info.eps) + least) ** 2
    best = unit(np.asarray(constant).astype(weight.dtype), weight)
    return np.sum(np.square(unit(decoded, weight) - w)), np.sum(np.square(w - best)), rounding


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_never_worse_than_a_constant(method, tmp_path):
    free = isinstance(method, LEAST_SQUARES) and getattr(method, "granularity", "") != "row"
    for case, decoded in through_a_file(CASES, method, tmp_path / "w.cw").items():
        mean = np.mean(CASES[case].astype(np.float64)) if free and not getattr(method, "zero", False) else 0.0
        error, of_constant, rounding = squares(decoded, CASES[case], mean)
        assert error <= of_constant * (1 + 1e-5) + rounding, case


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_few_values_are_held_by_more_codewords(method, tmp_path):
    for case, decoded in through_a_file(FEW, method, tmp_path / "w.cw").items():
        error, _, rounding = squares(decoded, FEW[case])
        assert error <= rounding, case


def test_kept_bit_by_bit(tmp_path):
    decoded = through_a_file(CASES, Keep(), tmp_path / "w.cw")
    assert [case for case in CASES if decoded[case].tobytes() != CASES[case].tobytes()] == []


@pytest.mark.parametrize("bits", [0, 7])
def test_kept_to_bits_of_mantissa(bits, tmp_path):
    for case, decoded in through_a_file(CASES, Keep(bits), tmp_path / "w.cw").items():
        weight = CASES[case].astype(np.float64)
        normal = np.abs(weight) >= float(ml_dtypes.finfo(CASES[case].dtype).smallest_normal)
        off = np.abs(decoded.astype(np.float64) - weight)
        assert (off <= np.abs(weight) * 2.0 ** -(bits + 1))[normal].all(), case


@pytest.mark.parametrize("target", ["1.1x", "8x", "1000x"])
@pytest.mark.filterwarnings("ignore::codeword.TargetMissed")
def test_by_a_target(target):
    net = CASES | {"other": np.random.default_rng(1).normal(size=(30, 20)).astype(np.float32)}
    artifact = codeword.compress(net, target)
    assert codeword.verify(artifact, net) == []
    for case, weight in net.items():
        decoded = artifact.decode(case)
        assert (decoded.shape, decoded.dtype) == (weight.shape, weight.dtype)
        # Errors that are made to cancel are a little larger than those of zeros, where nearly all is zero.
        error, of_zeros, rounding = squares(decoded, weight)
        assert error <= 1.1 * of_zeros + rounding, case


@pytest.mark.parametrize("target", ["1.1x", "8x", "1000x"])
@pytest.mark.parametrize("case", ["constant", "the largest floats", "near 1e38", "float64 below float32", "denormals"])
@pytest.mark.filterwarnings("ignore::codeword.TargetMissed")
def test_alone_by_a_target(case, target):
    decoded = codeword.compress({"w": CASES[case]}, target).decode("w")
    error, of_zeros, rounding = squares(decoded, CASES[case])
    assert error <= 1.1 * of_zeros + rounding


IMPORTANCES = {
    "tiny": np.full(SHAPE, 1e-40),
    "huge": np.full(SHAPE, 1e30),
    "of one weight": spiked(ZEROS, 1),
    "of some weights": (np.arange(144).reshape(SHAPE) % 7 == 0).astype(np.float32),
    "of some rows": np.broadcast_to(np.arange(8).reshape(8, 1, 1, 1) > 3, SHAPE).astype(np.float32),
    "of all sizes": 10.0 ** np.random.default_rng(2).integers(-30, 30, SHAPE),
}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("method", CLUSTERING, ids=str)
def test_importance_of_any_size_leaves_all_finite(method, importance, tmp_path):
    through_a_file(CASES, method, tmp_path / "w.cw", dict.fromkeys(CASES, IMPORTANCES[importance]))


@pytest.mark.parametrize("method", CLUSTERING, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(method, value):
    with pytest.raises(NonFiniteError, match=rf"tensor 'w' holds {value} at \[0, 0, 2, 1\]"):
        codeword.compress({"w": spiked(NORMAL, value)}, plan=Plan((Rule("*", method),)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1), (0,), (3, 0), (0, 2, 3, 3)])
@pytest.mark.parametrize("method", [m for m in CLUSTERING if getattr(m, "lam", 0) < 1], ids=str)
def test_one_value_or_none(method, shape, tmp_path):
    net = {"w": np.full(shape, 0.25, np.float32)}
    vectors = ProductQuantization | KernelTemplates
    inner = method.start if isinstance(method, RateAware) else getattr(method, "then", None)
    if isinstance(inner, vectors) and net["w"].size:
        method = inner
    grouped = isinstance(method, KMeans) and method.group_size is not None and len(shape) > 1 and net["w"].size
    if not isinstance(method, vectors) and not grouped:
        np.testing.assert_allclose(through_a_file(net, method, tmp_path / "w.cw")["w"], net["w"], rtol=0.1)
    elif net["w"].size or (len(shape) < 3 and isinstance(method, KernelTemplates)):  # no vector, no group
        with pytest.raises(PlanError, match=rf"^tensor 'w': .*{re.escape(str(shape))}"):
            through_a_file(net, method, tmp_path / "w.cw")
    else:
        through_a_file(net, method, tmp_path / "w.cw")


def test_zero_is_a_codeword_beside_the_values_where_there_is_room(tmp_path):
    weight = np.full((4, 4), -0.3, np.float32)
    np.testing.assert_array_equal(through_a_file({"w": weight}, KMeans(2, zero=True), tmp_path / "w.cw")["w"], weight)
    np.testing.assert_array_equal(through_a_file({"w": weight}, KMeans(1, zero=True), tmp_path / "w.cw")["w"], 0)


def test_rows_of_the_largest_floats_have_finite_scales(tmp_path):
    """Their scale, rounded up to two bits of mantissa, was infinite, and they came back as zeros."""
    weight = np.stack([np.full(6, MOST), np.full(6, -1, np.float32)])
    for method in (KMeans(4, "row"), RateAware(1e-4)):
        decoded = through_a_file({"w": weight}, method, tmp_path / "w.cw")["w"]
        np.testing.assert_allclose(decoded[0], MOST, rtol=0.02)


def test_float64_too_small_for_float32_is_kept_and_said():
    made = codeword.fit({"w": FEW["float64 below float32"]}, plan=Plan((Rule("*", KMeans(4)),)))
    assert "too small for float32" in made.kept["w"]
    np.testing.assert_array_equal(made.artifact.decode("w"), 1e-300)


def test_a_step_beyond_the_largest_float_makes_no_nan(tmp_path):
    """0 codewords times an infinite step are NaN, though the weights lie well within what float32 holds."""
    net = {"w": CASES["near 1e38"]}
    decoded = through_a_file(net, RateAware(10.0, granularity="tensor"), tmp_path / "w.cw")["w"]
    np.testing.assert_array_equal(decoded, net["w"])


def test_every_method_is_here():
    names = {type(method).__name__ for method in [Keep(), *CLUSTERING]}
    assert names == {method.__name__ for method in get_args(BuiltIn)}
