"""Kernel templates: eigenvectors by hand, signs, offsets, and what must hold on any data."""

import msgspec
import numpy as np
import pytest
import torch

import codeword
from codeword import Keep, Plan, Rule
from codeword.errors import PlanError
from codeword.expr import DTYPES, Affine, Lookup, Raw, Reshape, decode, leaves, lookups
from codeword.math.templates import fit_gains, fit_offsets, kernel_templates, match_templates
from codeword.methods import BuiltIn, KernelTemplates, Method
from codeword.report.measure import describe
from round_trip import error, restored

METHODS = [
    KernelTemplates(8),
    KernelTemplates(8, drop_offset=True),
    KernelTemplates(8, drop_offset=False, mantissa_bits=3),
    KernelTemplates(8, drop_offset=False, mantissa_bits=7, codebook_dtype="float32"),
    KernelTemplates(8, drop_offset=False, codebook_dtype="float16"),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def smooth(*dims, seed=0, offset=0.5):
    """Kernels with a mean, as those of nets have."""
    g = generator(seed)
    return (g.normal(size=dims) + offset * g.normal(size=(*dims[:2], *[1] * (len(dims) - 2)))).astype(np.float32)


def compress(method, weight, importance=None):
    return method.compress(weight, importance, generator=generator())


# -- the arithmetic -----------------------------------------------------------------------------------------------


def test_one_template_is_the_leading_eigenvector_of_the_energy():
    kernels = generator().normal(size=(200, 9)) * np.arange(1, 10)
    (template,) = kernel_templates(kernels, 1, generator=generator())
    leading = np.linalg.eigh(kernels.T @ kernels)[1][:, -1]
    assert abs(template @ leading) == pytest.approx(1, abs=1e-5)
    # Strong kernels count for more: the mean of unit vectors would be between the two directions.
    (template,) = kernel_templates(np.array([[10.0, 0], [0, 1]]), 1, generator=generator())
    np.testing.assert_allclose(np.abs(template), [1, 0], atol=1e-6)


def test_a_kernel_and_its_negative_share_a_template():
    lines = generator(1).normal(size=(3, 9))
    kernels = np.concatenate([lines * gain for gain in (1, -2, 0.5, -0.1)])
    templates = kernel_templates(kernels, 3, generator=generator())
    np.testing.assert_allclose(np.linalg.norm(templates, axis=1), 1)
    codes = match_templates(kernels, templates).reshape(4, 3)
    assert np.all(codes == codes[0])
    assert len(set(codes[0])) == 3
    gains = np.sum(kernels * templates[codes.reshape(-1)], axis=1)
    np.testing.assert_allclose(gains[:, None] * templates[codes.reshape(-1)], kernels, atol=1e-5)


def test_the_match_explains_most():
    kernels, templates = generator(2).normal(size=(300, 9)), generator(3).normal(size=(20, 9))
    shares = np.square(kernels @ templates.T) / np.square(templates).sum(axis=1)
    assert np.mean(match_templates(kernels, templates) == shares.argmax(axis=1)) > 0.99


@pytest.mark.parametrize("offset", [True, False])
def test_gain_and_offset_are_those_of_least_squares(offset):
    kernels, matched = generator(4).normal(size=(6, 9)), generator(5).normal(size=(6, 9))
    h = generator(6).uniform(size=(6, 9))
    gains = fit_gains(kernels, matched, h, offset=offset)
    offsets = fit_offsets(kernels, matched, h, gains) if offset else np.zeros(6)
    for i in range(6):
        root = np.sqrt(h[i])
        columns = [matched[i] * root, root] if offset else [matched[i] * root]
        expected = np.linalg.lstsq(np.array(columns).T, kernels[i] * root, rcond=None)[0]
        assert gains[i] == pytest.approx(expected[0])
        assert offsets[i] == pytest.approx(expected[1] if offset else 0)


def test_more_templates_than_directions_do_no_harm():
    kernels = np.outer([1.0, -3, 2, 0], np.arange(9))
    templates = kernel_templates(kernels, 4, generator=generator())
    assert np.isfinite(templates).all()
    matched = templates[match_templates(kernels, templates)]
    gains = fit_gains(kernels, matched, np.ones((4, 9)), offset=False)
    np.testing.assert_allclose(gains[:, None] * matched, kernels, atol=1e-5)


# -- the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(10, 6, 3, 3), (32, 1, 3, 3), (5, 4, 7), (6, 3, 2, 2, 2), (20, 16, 1, 1)])
def test_shape_and_expression(method, dims):
    weight = smooth(*dims)
    expr = compress(method, weight)
    assert isinstance(method, Method)
    found = restored(expr, weight)
    assert (found.shape, found.dtype) == (dims, np.float32)
    assert error(found, weight) < 0.7
    (lookup,) = lookups(expr)
    d = lookup.codebook.shape[2]
    assert d == (8 if dims[2:] == (1, 1) else np.prod(dims[2:]))
    assert lookup.codes.shape == (1, dims[0], weight[0].size // d)


def test_the_expression_by_pattern():
    match compress(KernelTemplates(4, drop_offset=False), smooth(6, 5, 3, 3)):
        case Reshape(Affine(Affine(Lookup(codes, templates), a, b), unit, None) as inner, (6, 5, 3, 3)):
            assert (codes.shape, templates.shape, templates.dtype) == ((1, 6, 5), (1, 4, 9), np.int8)
            assert a.shape == b.shape == (6, 5, 1)
            assert a.dtype == b.dtype == DTYPES["float8_e5m2"]
            assert unit.shape == (1, 1, 1)
            assert describe(inner) == "shared vectors of 9, offset, scaled kernels"
        case other:
            pytest.fail(f"another expression: {other}")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-140, 2.0**100])
def test_the_scale_of_the_weights_does_not_matter(method, scale):
    weight = smooth(10, 8, 3, 3)
    scaled = (weight.astype(np.float64) * scale).astype(np.float32)
    expected = error(decode(compress(method, weight)), weight)
    found = decode(compress(method, scaled))
    assert error(found, scaled) == pytest.approx(expected, rel=0.05, abs=0.2 if scale < 2.0**-126 else 0)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, 3e38])
def test_constants_come_back(method, value):
    weight = np.full((6, 5, 3, 3), value, np.float32)
    np.testing.assert_allclose(decode(compress(method, weight)), weight, rtol=2.0 ** -(method.mantissa_bits + 1))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hard_kernels(method):
    weight = smooth(10, 8, 3, 3)
    weight[3] = 0
    found = decode(compress(method, weight))
    assert np.all(found[3] == 0)
    weight[7, 1, 1, 1] = 1e30
    found = decode(compress(method, weight))
    assert np.isfinite(found).all()
    assert found[7, 1, 1, 1] == pytest.approx(1e30, rel=0.2)
    one = smooth(1, 1, 3, 3)
    assert error(decode(compress(method, one)), one) < 0.05


@pytest.mark.parametrize("dtype", [np.float16, DTYPES["bfloat16"], np.float64], ids=str)
def test_every_floating_dtype(dtype):
    weight = smooth(10, 8, 3, 3).astype(dtype)
    found = restored(compress(KernelTemplates(16), weight), weight)
    assert found.dtype == weight.dtype
    assert error(found, weight) < 0.5


def test_empty_tensors():
    assert isinstance(compress(KernelTemplates(2), np.zeros((2, 0, 3, 3), np.float32)), Raw)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_is_a_pure_function(method):
    weight = smooth(10, 12, 3, 3)
    before = weight.copy()
    first, second = (list(leaves(compress(method, weight))) for _ in range(2))
    assert [(path, array.tobytes()) for path, array in first] == [(path, array.tobytes()) for path, array in second]
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_importance_moves_error_to_where_it_costs_less(method):
    weight, importance = smooth(20, 16, 3, 3), np.ones((20, 16, 3, 3), np.float32)
    importance[:4] = 100
    importance[:, :, 0, 0] *= 0
    plain, weighted = (decode(compress(method, weight, h)) for h in (None, importance))
    important = np.s_[:4, :, 1:, 1:]
    assert error(weighted[important], weight[important]) < 0.95 * error(plain[important], weight[important])
    assert np.isfinite(decode(compress(method, weight, np.zeros_like(weight)))).all()


def test_templates_bits_and_offsets_lower_the_error():
    weight = smooth(30, 30, 3, 3)
    for methods in (
        [KernelTemplates(k) for k in (1, 4, 16, 64, 256)],
        [KernelTemplates(64, mantissa_bits=bits) for bits in (0, 1, 2, 4)],
        [KernelTemplates(16, drop_offset=drop) for drop in (True, False)],
    ):
        errors = [error(decode(compress(method, weight)), weight) for method in methods]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("offset", [True, False])
def test_offsets_are_kept_where_they_pay(offset):
    shapes = generator().normal(size=(4, 9))
    shapes -= shapes.mean(axis=1, keepdims=True)
    kernels = generator(1).normal(size=(900, 1)) * shapes[generator(2).integers(0, 4, 900)]
    kernels += offset * generator(3).normal(size=(900, 1))
    weight = kernels.reshape(30, 30, 3, 3).astype(np.float32)
    paths = [path for path, _ in leaves(compress(KernelTemplates(4), weight))]
    assert any(path.endswith("offset") for path in paths) is offset


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: KernelTemplates(0), r"n_templates must lie in 1\.\.65536, got 0"),
        (lambda: KernelTemplates(4, mantissa_bits=8), r"mantissa_bits must lie in 0\.\.7, got 8"),
        (lambda: KernelTemplates(4, cluster_dim=3), r"cluster_dim must lie in 4\.\.64, got 3"),
        (lambda: compress(KernelTemplates(4), smooth(6, 9)), r"not for a tensor of shape \(6, 9\)"),
        (lambda: compress(KernelTemplates(4), smooth(6, 11, 1, 1)), "divides the 11 input channels"),
    ],
)
def test_wrong_options_are_plan_errors(build, says):
    with pytest.raises(PlanError, match=says):
        build()


def test_from_a_plan_to_a_file_to_a_net(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8))
    plan = Plan((Rule("*.weight", KernelTemplates(4)), Rule("*", Keep())))
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    for method in METHODS:
        assert msgspec.convert(msgspec.to_builtins(method), BuiltIn) == method
    codeword.compress(net, plan=plan).save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        swapped = codeword.swap(net, artifact)
        dense = {name: torch.from_numpy(np.array(artifact.decode(name))) for name in artifact}
    trained = [name for name, _ in swapped.named_parameters() if name.startswith("0.expr")]
    assert any(name.endswith("scale") for name in trained)
    assert not any("codebook" in name for name in trained)
    x = torch.randn(3, 2, 6, 6)
    net.load_state_dict(dense)
    torch.testing.assert_close(swapped(x), net(x))
