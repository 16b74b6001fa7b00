"""Codebooks of groups: one for many tensors, whatever their scales, stored once, and the same for any order."""

import itertools

import msgspec
import numpy as np
import pytest
import torch

import codeword
from codeword import Keep, KernelTemplates, Plan, ProductQuantization, Rule
from codeword.errors import NonFiniteError, PlanError
from codeword.execute import run
from codeword.expr import Raw, lookups
from codeword.methods import BuiltIn
from codeword.methods.base import Sample, SharedMethod
from codeword.sources import open_source

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(2, 30, 9))  # what all layers are made of, so that there is something to share


def conv(out, per, scale, seed):
    g = np.random.default_rng(seed)
    kernels = BASE[0, g.integers(0, 30, (out, per))] + 0.2 * g.normal(size=(out, per, 9))
    return (scale * kernels).reshape(out, per, 3, 3).astype(np.float32)


NET = {
    "a.weight": conv(16, 8, 1.0, 1),
    "b.weight": conv(24, 16, 1e-3, 2),
    "c.weight": conv(8, 24, 50.0, 3),
    "fc.weight": (RNG.laplace(size=(10, 72))).astype(np.float32),
    "fc2.weight": (7 * RNG.laplace(size=(20, 36))).astype(np.float32),
}
CONVS = ("a.weight", "b.weight", "c.weight")
METHODS = [
    ProductQuantization(9, 16, shared="all"),
    ProductQuantization(9, 16, shared="all", granularity="row"),
    ProductQuantization(3, 8, shared="all", residual_stages=2),
    ProductQuantization(9, 16, shared="all", codebook_dtype="float16"),
    KernelTemplates(16, shared="all"),
    KernelTemplates(16, shared="all", drop_offset=True),
    KernelTemplates(16, shared="all", drop_offset=False, mantissa_bits=5, codebook_dtype="float16"),
]


def compress(methods, net=NET, **options):
    return run(open_source(net), {name: methods.get(name, Keep()) for name in net}, **options)


def books(artifact, name):
    return [lookup.codebook for lookup in lookups(artifact[name])]


def error(artifact, name, net=NET):
    wide = net[name].astype(np.float64)
    return float(np.sum((artifact.decode(name) - wide) ** 2) / np.sum(wide**2))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_group_has_one_codebook_that_the_file_holds_once(method, tmp_path):
    assert isinstance(method, SharedMethod)
    alone = compress(dict.fromkeys(CONVS, msgspec.structs.replace(method, shared=None)))
    compress(dict.fromkeys(CONVS, method)).save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        for stage, found in enumerate(zip(*(books(artifact, name) for name in CONVS), strict=True)):
            assert found[0] is found[1] is found[2], stage
        borrowed = [leaf.path for leaf in artifact.entries["b.weight"].leaves if leaf.lender is not None]
        assert [path.rpartition(".")[2] for path in borrowed] == ["codebook"] * len(books(artifact, "a.weight"))
        assert artifact.nbytes < alone.nbytes
        for name in CONVS:  # of scales from 0.001 to 50
            assert error(artifact, name) < 1.6 * error(alone, name) + 0.02


def test_by_hand():
    u, v = [1, 2, 3, 4], [4, -3, 2, -1]  # one energy: the scales of the tensors are 1 to -100 of each other
    net = {"a": np.array([u, v, u]), "b": -100 * np.array([v, u, v, u]), "c": 1e-3 * np.array([[*u, *v]])}
    net = {name: values.astype(np.float32) for name, values in net.items()}
    method = ProductQuantization(4, 4, shared="all", codebook_dtype="float32")
    artifact = compress(dict.fromkeys(net, method), net)
    root = np.sqrt(30 / 4)
    expected = np.unique(np.array([u, v, np.negative(u), np.negative(v)]) / root, axis=0)
    np.testing.assert_allclose(np.unique(books(artifact, "c")[0][0], axis=0), expected, rtol=1e-6)
    for name, values in net.items():
        np.testing.assert_allclose(artifact.decode(name), values, rtol=1e-6)
    # As lines, u and v are two.
    net = {name: values.reshape(-1, 1, 2, 2) for name, values in net.items()}
    artifact = compress(dict.fromkeys(net, KernelTemplates(2, shared="all", codebook_dtype="float32")), net)
    for name in net:
        assert error(artifact, name, net) < 0.01


def test_a_relative_error_counts_the_same_in_all():
    g = np.random.default_rng(3)
    net = {"weak": g.normal(size=(40, 40)).astype(np.float32) * 1e-4, "strong": g.normal(size=(40, 40)) * 1e4}
    artifact = compress(dict.fromkeys(net, ProductQuantization(2, 32, shared="all")), net)
    assert error(artifact, "weak", net) == pytest.approx(error(artifact, "strong", net), rel=0.1)


def test_groups_are_of_one_name_one_kind_one_length_and_equal_options():
    product, other = ProductQuantization(9, 16, shared="all"), ProductQuantization(9, 16, shared="other")
    artifact = compress({**dict.fromkeys(NET, product), "c.weight": other})
    a, b, c, fc, fc2 = (books(artifact, name)[0] for name in NET)
    assert a is b
    assert fc is fc2
    assert len({found.tobytes() for found in (a, c, fc)}) == 3
    artifact = compress({**dict.fromkeys(CONVS, product), "c.weight": ProductQuantization(9, 15, shared="all")})
    assert books(artifact, "a.weight")[0] is not books(artifact, "c.weight")[0]
    net = NET | {"five.weight": RNG.normal(size=(6, 5, 5, 5)).astype(np.float32)}
    artifact = compress(dict.fromkeys([*CONVS, "five.weight"], KernelTemplates(4, shared="all")), net)
    assert [books(artifact, name)[0].shape for name in (*CONVS, "five.weight")] == [(1, 4, 9)] * 3 + [(1, 4, 25)]


@pytest.mark.parametrize("method", [METHODS[2], METHODS[4]], ids=str)
def test_neither_workers_nor_the_order_of_tensors_change_a_byte(method, tmp_path):
    methods = dict.fromkeys(CONVS, method)
    expected = compress(methods, seed=3)
    compress(methods, seed=3, workers=2).save(tmp_path / "two.cw")
    expected.save(tmp_path / "one.cw")
    assert (tmp_path / "two.cw").read_bytes() == (tmp_path / "one.cw").read_bytes()
    turned = compress(methods, dict(reversed(NET.items())), seed=3)
    for name in NET:
        assert turned.decode(name).tobytes() == expected.decode(name).tobytes()
    other = compress(methods, seed=4)
    assert books(other, "a.weight")[0].tobytes() != books(expected, "a.weight")[0].tobytes()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_group_of_one(method):
    alone = compress({"a.weight": msgspec.structs.replace(method, shared=None)})
    artifact = compress({"a.weight": method})
    assert error(artifact, "a.weight") == pytest.approx(error(alone, "a.weight"), rel=0.25, abs=0.01)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_empty_zero_and_constant_tensors(method):
    net = NET | {
        "zero": np.zeros((4, 8, 3, 3), np.float32),
        "empty": np.zeros((0, 8, 3, 3), np.float32),
        "least": np.full((4, 8, 3, 3), 1e-44, np.float32),
    }
    artifact = compress(dict.fromkeys([*CONVS, "zero", "empty", "least"], method), net)
    assert not artifact.decode("zero").any()
    assert artifact.decode("empty").shape == (0, 8, 3, 3)
    assert isinstance(artifact["empty"], Raw)
    assert np.abs(artifact.decode("least")).max() < 1e-36
    zeros = {name: net[name] for name in ("zero", "empty")}
    assert not compress(dict.fromkeys(zeros, method), zeros).decode("zero").any()


def test_pruned_weights_stay_zero_and_have_no_say():
    g = np.random.default_rng(5)
    net = {name: np.where(g.random(NET[name].shape) < 0.8, 0, NET[name]).astype(np.float32) for name in CONVS}
    plain, masked = (
        compress(dict.fromkeys(CONVS, ProductQuantization(9, 16, shared="all", skip_zeros=skip)), net)
        for skip in (False, True)
    )
    for name in CONVS:
        assert not masked.decode(name)[net[name] == 0].any()
        assert error(masked, name, net) < 0.6 * error(plain, name, net)


def test_what_is_not_finite_is_named_or_kept():
    net = NET | {"b.weight": np.full((8, 8, 3, 3), np.inf, np.float32)}
    methods = dict.fromkeys(CONVS, ProductQuantization(9, 16, shared="all"))
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        compress(methods, net)
    artifact = compress(methods, net, keep_nonfinite=True)
    assert np.isinf(artifact.decode("b.weight")).all()
    assert error(artifact, "a.weight") < 0.3


def test_importance_moves_error_to_where_it_costs_less():
    importance = {name: np.ones(NET[name].shape, np.float32) for name in CONVS[:2]}
    for h in importance.values():
        h[:, :, 0] = 100  # the first row of each kernel
    for method in (METHODS[0], METHODS[2], METHODS[4]):
        plain, weighted = (compress(dict.fromkeys(CONVS, method), importance=h) for h in (None, importance))
        some = {name: NET[name][:, :, 0] for name in importance}

        def cost(artifact, some=some):
            parts = (
                np.square(artifact.decode(name)[:, :, 0] / w.std() - w / w.std()).sum() for name, w in some.items()
            )
            return sum(parts)

        assert cost(weighted) < 0.95 * cost(plain)


@pytest.mark.parametrize("method", [ProductQuantization(9, 2, shared="all"), KernelTemplates(2, shared="all")], ids=str)
def test_samples_are_bounded_and_of_mean_square_1(method):
    weight = conv(60, 50, 0.01, 6)  # 3000 vectors
    samples = [
        method.gather(weight, None, share=share, generator=np.random.default_rng(0)) for share in (1, 0.25, 1e-9, 0)
    ]
    assert [len(sample.vectors) for sample in samples] == [512, 128, 1, 0]
    assert np.mean(np.square(samples[0].vectors)) == pytest.approx(1, rel=0.1)
    h = np.zeros_like(weight)
    h[:, :2] = 7
    sample = method.gather(weight, h, share=1, generator=np.random.default_rng(0))
    assert sample.importance is not None
    np.testing.assert_array_equal(sample.importance, np.ones((120, 9)))
    bound = method.bind([Sample(sample.vectors, None), sample], generator=np.random.default_rng(0))
    found = bound.compress(weight, None, generator=np.random.default_rng(0))
    assert next(lookups(found)).codebook.shape == (1, 2, 9)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ProductQuantization(4, shared=""), "product: shared must be the name of a group, got ''"),
        (lambda: KernelTemplates(4, shared=""), "templates: shared must be the name of a group, got ''"),
        (lambda: ProductQuantization(4, shared="x", group_size=2), "shared 'x' .* group_size 2"),
        (
            lambda: compress({"fc.weight": KernelTemplates(4, shared="x")}),
            r"tensor 'fc.weight': .* of shape \(10, 72\)",
        ),
        (
            lambda: compress({"fc.weight": ProductQuantization(7, shared="x")}),
            "tensor 'fc.weight': .* 7 does not divide",
        ),
    ],
)
def test_wrong_options_are_plan_errors(build, says):
    with pytest.raises(PlanError, match=says):
        build()


def test_from_a_plan_to_a_file_to_a_net(tmp_path):
    def layer(*sizes):
        return (torch.nn.Conv2d(*sizes, 3, padding=1), torch.nn.ReLU())

    net = torch.nn.Sequential(*layer(3, 8), *layer(8, 8), *layer(8, 8), torch.nn.Flatten(), torch.nn.Linear(128, 6))
    for product, templates in itertools.product((False, True), repeat=2):
        plan = Plan(
            (
                Rule("[02].weight", ProductQuantization(9, 8, shared="convs") if product else Keep()),
                Rule("4.weight", KernelTemplates(8, shared="convs") if templates else Keep()),
                Rule("*", Keep()),
            )
        )
        plan.save(tmp_path / "plan.toml")
        assert Plan.load(tmp_path / "plan.toml") == plan
        codeword.compress(net, plan=plan).save(tmp_path / "net.cw")
        with codeword.load(tmp_path / "net.cw") as artifact:
            swapped = codeword.swap(net, artifact)
            dense = {name: torch.from_numpy(np.array(artifact.decode(name))) for name in artifact}
            assert codeword.verify(artifact, net) == []
        x = torch.randn(3, 3, 4, 4)
        copy = torch.nn.Sequential(*net)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        copy.load_state_dict(dense)
        torch.testing.assert_close(swapped(x), copy(x))
        net.load_state_dict(before)
    for method in METHODS:
        assert msgspec.convert(msgspec.to_builtins(method), BuiltIn) == method
