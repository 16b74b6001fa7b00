"""Training what a file holds: gradients by finite differences, what runs is what is shipped, zeros, sizes, states."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import codeword
from codeword.artifact import Artifact, Writer, code_tensor
from codeword.errors import MismatchError, NonFiniteError, PlanError
from codeword.expr import Affine, Lookup, Raw, Reshape, decode, leaves, lookups, with_leaves
from codeword.methods import (
    Birch,
    DensityKMeans,
    FixedPoint,
    Keep,
    KernelTemplates,
    KMeans,
    Lloyd,
    Method,
    ProductQuantization,
    Prune,
    RateAware,
    RowScaled,
    round_mantissa,
)
from codeword.nn import CodedModule, TorchExpr
from codeword.train import Tuner
from codeword.train import leaves as train_leaves
from codeword.train.leaves import KINDS

ALONE: list[Any] = [
    KMeans(8),
    KMeans(4, granularity="row", zero=True),
    KMeans(3, group_size=3),
    KMeans(8, codebook_dtype="float16"),
    Lloyd(8),
    DensityKMeans(8),
    Birch(12.0),
    RowScaled(6),
    ProductQuantization(3, 12),
    ProductQuantization(3, 8, granularity="row", residual_stages=1, codebook_dtype="float32"),
    ProductQuantization(9, 6, group_size=3, codebook_dtype="float16"),
    KernelTemplates(5, drop_offset=False),
    KernelTemplates(5, mantissa_bits=5),
    RateAware(0.05),
    RateAware(0.02, codebook="free", granularity="tensor"),
    RateAware(0.02, start=ProductQuantization(3, 8)),
    RateAware(0.02, start=KernelTemplates(5)),
    RateAware(0.02, start=KMeans(8)),
]
PRUNED = [Prune(0.6, then=method) for method in (Keep(), *ALONE)]
METHODS = [*ALONE, *PRUNED, FixedPoint(6), Keep(mantissa_bits=5)]
ADAM = {"lr": 3e-2, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Kernels, a norm, a matrix: (n, 3, 6, 6) -> (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


def made(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.bias.normal_()
        net.norm.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
        net.norm.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return net


def batch(n: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def compressed(model: nn.Module, method: Method) -> Artifact:
    """The kernels by a method, the rest as a target would store it."""
    methods = {"conv.weight": method, "head.weight": KMeans(6)}
    rest = Keep(mantissa_bits=6)
    rules = [codeword.Rule(name, method) for name, method in methods.items()] + [codeword.Rule("*", rest)]
    return codeword.compress(model, plan=codeword.Plan(tuple(rules)))


def trained(tuner: Tuner, net: nn.Module, steps: int = 5, **options: Any) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], **(ADAM | options))
    net.train()
    for seed in range(steps):
        x, y = batch(seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        optimizer.step()
        tuner.step()
    return net.eval()


def payload(artifact: Artifact, tmp_path: Any) -> bytes:
    artifact.save(tmp_path / "file.cw")
    return (tmp_path / "file.cw").read_bytes()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_untrained_net_is_the_file(method: Any, tmp_path: Any):
    model = made()
    artifact = compressed(model, method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuner = Tuner(artifact, reassign_every=1)
    net = tuner.prepare(model)
    x, _ = batch()
    assert torch.equal(net(x), codeword.swap(model, artifact)(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = tuner.finalize()
    assert again.nbytes <= artifact.nbytes
    for name in artifact:
        assert np.array_equal(again.decode(name), artifact.decode(name))


def dense_gradient(net: nn.Module, name: str) -> np.ndarray:
    """Of the loss by a dense weight, in the net that runs decoded."""
    dense = copy.deepcopy(made())
    state = {
        key: value
        for key, value in net.state_dict().items()
        if key in dense.state_dict() and not key.endswith("num_batches_tracked")
    }
    dense.load_state_dict(state, strict=False)
    with torch.no_grad():
        for key, module in net.named_modules():
            if isinstance(module, CodedModule):
                dense.get_parameter(f"{key}.weight").copy_(module.weight)
    x, y = batch()
    F.cross_entropy(dense.train()(x), y).backward()
    grad = dense.get_parameter(name).grad
    assert grad is not None
    return grad.numpy().astype(np.float64)


@pytest.mark.parametrize("gradient", ["mean", "sum"])
@pytest.mark.parametrize("method", METHODS[:-1], ids=repr)
def test_gradients_are_sums_or_means_over_members(method: Any, gradient: Any):
    model = made()
    tuner = Tuner(compressed(model, method), gradient=gradient, train=KINDS)
    net: Any = tuner.prepare(model).train()
    check_gradients(net, gradient)


@pytest.mark.parametrize("method", [KMeans(8), RowScaled(6), RateAware(0.05), Prune(0.6, then=KMeans(8))], ids=repr)
def test_with_new_codes_gradients_are_means_over_new_members_and_shadows_stay_where_they_were(method: Any):
    model = made()
    tuner = Tuner(compressed(model, method), reassign_every=1, start="decoded", train=KINDS)
    net: Any = tuner.prepare(model).train()
    twin: TorchExpr = net.conv.expr
    with torch.no_grad():  # as if training had moved everything
        twin.want(twin() + twin().std() * torch.randn(twin.shape, generator=torch.manual_seed(0)) * (twin() != 0))
    codes, wanted = [lookup.codes for lookup in lookups(twin.to_expr())], twin.wanted
    tuner.reassign()
    assert any(
        not np.array_equal(*pair) for pair in zip(codes, (it.codes for it in lookups(twin.to_expr())), strict=True)
    )
    assert torch.allclose(twin.wanted, wanted, atol=1e-5)
    check_gradients(net, "mean")


def check_gradients(net: Any, gradient: str) -> None:
    """Of each leaf of the kernels, against finite differences and the dense gradient."""
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    twin: TorchExpr = net.conv.expr
    expr, full = twin.to_expr(), dense_gradient(net, "conv.weight").reshape(-1)
    arrays = [array.astype(np.float64) if path.endswith("codebook") else array for path, array in leaves(expr)]
    for at, (path, array) in enumerate(leaves(expr)):
        owner, attribute = twin.owner(path)
        parameter = getattr(owner, attribute)
        if not isinstance(parameter, nn.Parameter):
            assert array.dtype.kind in "ub"  # codes, positions, masks
            continue
        unit = owner._units.get(attribute, 1.0)
        assert np.log2(unit) % 1 == 0
        found = parameter.grad.numpy()
        for index in list(np.ndindex(array.shape))[:: max(1, array.size // 5)]:
            # weights are affine in each leaf: a finite difference of any width is exact
            ends = []
            for end in (0.0, 1 / unit):
                moved = array.astype(np.float64)
                moved[index] = end
                some = [*arrays[:at], moved.astype(np.float32), *arrays[at + 1 :]]
                ends.append(decode(with_leaves(expr, iter(some))).astype(np.float64).reshape(-1))
            slope = ends[1] - ends[0]
            expected = slope @ full
            if gradient == "mean":
                expected = expected / (slope @ slope) if slope.any() else 0.0
            assert found[index] == pytest.approx(expected, rel=2e-3, abs=2e-6 * (1 + np.abs(full).max()))


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_was_trained_is_what_is_shipped(method: Any, every: int | None):
    model = made()
    artifact = compressed(model, method)
    tuner = Tuner(artifact, reassign_every=every)
    net = trained(tuner, tuner.prepare(model))
    final = tuner.finalize()
    x, _ = batch()
    assert torch.equal(net(x), codeword.swap(model, final)(x))
    moved = [name for name in artifact if not np.array_equal(final.decode(name), artifact.decode(name))]
    assert set(moved) >= {"conv.weight", "head.weight", "head.bias", "norm.bias", "norm.running_mean"}
    assert codeword.verify(final) == []
    for name in ("norm.weight", "norm.bias", "norm.running_var", "head.bias"):
        values = final.decode(name)
        assert np.array_equal(values, round_mantissa(values, 6))
    assert final.metadata == artifact.metadata
    assert tuner.finalize({"note": "x"}).metadata == {"note": "x"}


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("method", [*PRUNED, KMeans(4, zero=True), RateAware(0.2)], ids=repr)
def test_zeros_stay_zero(method: Any, every: int | None):
    model = made()
    if isinstance(method, Prune):  # as a Pruner leaves it
        with torch.no_grad():
            weight = model.conv.weight
            weight.masked_fill_(torch.rand(weight.shape) < 0.6, 0)
        method = Prune(None, then=method.then)
    artifact = compressed(model, method)
    zero = artifact.decode("conv.weight") == 0
    assert zero.any()
    tuner = Tuner(artifact, reassign_every=every)
    trained(tuner, tuner.prepare(model), 20)
    now = tuner.finalize().decode("conv.weight")
    if every is None or isinstance(method, Prune):
        pruned = zero if every is None else zero & (model.conv.weight == 0).numpy()
        assert not now[pruned].any()
    if isinstance(method, (KMeans, RateAware)):
        assert np.any(now == 0)  # the codeword itself has not moved


def test_free_zeros_move_where_no_mask_holds_them():
    model = made()
    artifact = compressed(model, KMeans(4, zero=True))
    tuner = Tuner(artifact, zeros="free")
    trained(tuner, tuner.prepare(model), 5)
    assert np.all(tuner.finalize().decode("conv.weight") != 0)
    masked = Tuner(compressed(model, Prune(0.5, then=KMeans(4))), zeros="free")
    trained(masked, masked.prepare(model), 5)
    assert np.count_nonzero(masked.finalize().decode("conv.weight")) == 81


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, Keep)], ids=repr)
def test_a_state_goes_on_to_the_same_bytes(method: Any, tmp_path: Any):
    model = made()
    artifact = compressed(model, method)

    def steps(tuner: Tuner, net: nn.Module, optimizer: Any, seeds: range) -> None:
        net.train()
        for seed in seeds:
            x, y = batch(seed=seed)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            tuner.step()

    def begin() -> tuple[Tuner, nn.Module, torch.optim.Optimizer]:
        tuner = Tuner(artifact, reassign_every=3)
        net = tuner.prepare(model)
        return tuner, net, torch.optim.Adam(net.parameters(), **ADAM)

    tuner, net, optimizer = begin()
    steps(tuner, net, optimizer, range(4))
    saved = copy.deepcopy((tuner.state_dict(), net.state_dict(), optimizer.state_dict()))
    steps(tuner, net, optimizer, range(4, 8))
    expected = payload(tuner.finalize(), tmp_path)
    for first in (True, False):
        tuner, net, optimizer = begin()
        if first:
            tuner.load_state_dict(saved[0])
        net.load_state_dict(saved[1])
        optimizer.load_state_dict(copy.deepcopy(saved[2]))  # it would train the saved tensors
        if not first:
            tuner.load_state_dict(saved[0])
        steps(tuner, net, optimizer, range(4, 8))
        assert payload(tuner.finalize(), tmp_path) == expected


@pytest.mark.parametrize("method", [RateAware(0.02), KMeans(16), ProductQuantization(2, 64), RowScaled(8)], ids=repr)
def test_new_codes_take_no_more_bytes(method: Any):
    model = made()
    artifact = codeword.compress(model, method=method)
    tuner = Tuner(artifact, reassign_every=1, start="decoded")
    net: Any = tuner.prepare(model)
    with torch.no_grad():  # as if training had moved everything
        for twin in (net.conv.expr, net.head.expr):
            twin.want(twin() + 0.5 * twin().std() * torch.randn(twin.shape, generator=torch.manual_seed(0)))
    before = [lookup.codes.copy() for lookup in lookups(net.conv.expr.to_expr())]
    tuner.reassign()
    after = [lookup.codes for lookup in lookups(net.conv.expr.to_expr())]
    assert any(not np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert tuner.finalize().nbytes <= artifact.nbytes


def test_free_codes_are_the_nearest():
    model = made()
    tuner = Tuner(compressed(model, KMeans(5)), reassign_every=1, rate="free", start="decoded")
    net: Any = tuner.prepare(model)
    with torch.no_grad():
        net.conv.expr.want(torch.randn(net.conv.expr.shape))
    target = net.conv.expr.wanted.numpy().reshape(-1)
    tuner.reassign()
    (lookup,) = lookups(net.conv.expr.to_expr())
    words = lookup.codebook.reshape(-1)
    assert np.array_equal(lookup.codes.reshape(-1), np.abs(target[:, None] - words).argmin(axis=1))


def shared_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)).eval()


@pytest.mark.parametrize("method", [ProductQuantization(9, 12, shared="a"), KernelTemplates(6, shared="b")], ids=repr)
@pytest.mark.parametrize("every", [None, 2])
def test_shared_codebooks_are_one_parameter_and_one_stream(method: Any, every: int | None, tmp_path: Any):
    model = shared_net()
    artifact = codeword.compress(model, method=method, include=["0.weight", "2.weight"])
    tuner = Tuner(artifact, reassign_every=every)
    net: Any = tuner.prepare(model)
    books = [net[at].expr.owner(path) for at in (0, 2) for path, _ in leaves(net[at].expr.to_expr()) if "book" in path]
    assert len(books) == 2
    assert getattr(*books[0]) is getattr(*books[1])
    trained(tuner, net)
    final = tuner.finalize()
    lent = [leaf for entry in final.entries.values() for leaf in entry.leaves if leaf.lender is not None]
    assert [leaf.path.endswith("codebook") for leaf in lent] == [True]
    assert final.nbytes <= artifact.nbytes + 16
    x, _ = batch()
    assert torch.equal(net(x), codeword.swap(model, final)(x))


def test_gradients_of_a_shared_codebook_are_of_all_its_tensors():
    model = shared_net()
    artifact = codeword.compress(model, method=ProductQuantization(9, 12, shared="a"), include=["0.weight", "2.weight"])
    net: Any = Tuner(artifact, gradient="sum").prepare(model)
    dense = copy.deepcopy(model)
    dense.load_state_dict(codeword.state_dict(artifact))
    x, y = batch()
    for some in (net, dense):
        F.cross_entropy(some(x), y).backward()
    (path,) = (path for path, _ in leaves(net[0].expr.to_expr()) if path.endswith("codebook"))
    owner, name = net[0].expr.owner(path)
    expected = np.zeros((12, 9))
    for at in (0, 2):
        expr = net[at].expr.to_expr()
        (lookup,) = lookups(expr)
        step = decode(expr).reshape(-1)[0] / lookup.codebook[0, lookup.codes.reshape(-1)[0], 0]
        grads = dense[at].weight.grad.numpy().reshape(-1, 9)  # pyright: ignore
        np.add.at(expected, lookup.codes.reshape(-1), grads * step)
    found = getattr(owner, name).grad.numpy()[0] * owner._units[name]
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_grids_that_are_equal_by_chance_train_apart():
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)).eval()
    with torch.no_grad():
        model[1].weight.copy_(3 * model[0].weight)
    artifact = codeword.compress(model, method=RateAware(0.003, granularity="tensor"))
    net: Any = Tuner(artifact).prepare(model)
    owners = [net[at].expr.owner("inner.inner.codebook") for at in (0, 1)]
    assert np.array_equal(*(next(lookups(net[at].expr.to_expr())).codebook for at in (0, 1)))
    assert getattr(*owners[0]) is not getattr(*owners[1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_tied_weights_stay_one():
    model = Tied().eval()
    artifact = codeword.compress(model, method=KMeans(8))
    tuner = Tuner(artifact, reassign_every=1)
    net = tuner.prepare(model)
    assert net.get_submodule("embedding.expr") is net.get_submodule("head.expr")
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        F.cross_entropy(net(torch.arange(30)), torch.arange(30)).backward()
        optimizer.step()
        tuner.step()
    final = tuner.finalize()
    assert [entry.tied_to for entry in final.entries.values()] == [None, "embedding.weight"]
    assert torch.equal(net.eval()(torch.arange(5)), codeword.swap(model, final)(torch.arange(5)))


def test_what_cannot_train_stays_as_the_file_has_it():
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose1d(4, 4, 3),
            "frozen": nn.Linear(4, 4),
            "linear": nn.Linear(4, 4),
        }
    ).eval()
    model["frozen"].requires_grad_(False)
    artifact = codeword.compress(model, method=KMeans(3))
    tuner = Tuner(artifact, reassign_every=1)
    net: Any = tuner.prepare(model)
    assert tuner.fixed == {
        "up.weight": "module type ConvTranspose1d has no coded form",
        "frozen.weight": "requires_grad is False",
        "frozen.bias": "requires_grad is False",
    }
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.5)
    x = torch.randn(3, 4, 5)
    net["frozen"](net["linear"](net["up"](x).transpose(1, 2))).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    optimizer.step()
    tuner.step()
    final = tuner.finalize()
    for name in artifact:
        assert np.array_equal(final.decode(name), artifact.decode(name)) == (name in tuner.fixed)


def test_kinds_of_leaves_to_train():
    model = made()
    artifact = compressed(model, KernelTemplates(5, drop_offset=False))
    net: Any = Tuner(artifact, train=("gain", "offset", "raw")).prepare(model)  # as Chen et al. train
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names == {
        "conv.expr.root.inner.inner.scale",
        "conv.expr.root.inner.inner.offset",
        "norm.weight",
        "norm.bias",
        "head.bias",
    }
    scaled: Any = Tuner(compressed(model, KMeans(4, granularity="row"))).prepare(model)
    scale = scaled.conv.expr.owner("inner.scale")
    assert not getattr(*scale).requires_grad  # float8, and a norm's gain follows
    scaled = Tuner(compressed(model, RowScaled(4, scales="fitted"))).prepare(model)
    paths = [path for path, _ in leaves(scaled.conv.expr.to_expr()) if path.endswith("scale")]
    assert getattr(*scaled.conv.expr.owner(paths[0])).requires_grad  # bfloat16


def test_small_steps_add_up_where_the_file_rounds():
    model = made()
    tuner = Tuner(compressed(model, KMeans(5, codebook_dtype="float16")))
    net: Any = tuner.prepare(model).train()
    bias, book = net.norm.bias, net.conv.expr.get_parameter("root.inner.codebook")
    before = bias.detach().clone(), book.detach().clone()
    for _ in range(1000):
        with torch.no_grad():
            bias += 1e-5
            book += 1e-6
        tuner.step()
    assert torch.allclose(bias, before[0] + 1e-2, atol=0.02)
    assert torch.allclose(book, before[1] + 1e-3, atol=3e-4)
    assert torch.equal(book.half().float(), book)


def test_whole_numbers_move_one_by_one():
    lookup = Lookup(np.zeros((1, 2, 2), np.uint8), np.array([[[-3], [0], [1], [2]]], np.int8))
    expr = Affine(lookup, np.full((1, 1, 1), 0.5, np.float32))
    fine = train_leaves.finer(expr)
    (found,) = lookups(fine)
    assert found.codebook.reshape(-1).tolist() == [-96, 0, 32, 64]
    assert np.array_equal(decode(fine), decode(expr))
    back = train_leaves.coarser(fine)
    assert next(lookups(back)).codebook.reshape(-1).tolist() == [-3, 0, 1, 2]
    many = Lookup(np.zeros((1, 2, 2), np.uint8), np.arange(-90, 91, dtype=np.int8).reshape(1, -1, 1))
    (found,) = lookups(train_leaves.finer(Affine(many, np.full((1, 1, 1), 0.5, np.float32))))
    assert found.codebook.dtype == np.int16
    assert np.diff(found.codebook.reshape(-1)).tolist() == [16] * 180


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (np.arange(1, 9) / 8, 2),
        (np.ones(9), None),
        (np.zeros(5), None),
        (np.random.default_rng(0).normal(size=50), 23),
        (round_mantissa(np.random.default_rng(0).normal(size=50).astype(np.float32), 5), 5),
    ],
)
def test_mantissa_bits(values: np.ndarray, bits: int | None):
    assert train_leaves.mantissa_bits(values) == bits


@pytest.mark.parametrize("bits", [0, 2, 7, 22])
def test_rounding_mantissas_is_that_of_the_method(bits: int):
    patterns = np.random.default_rng(bits).integers(0, 2**32, 10000, dtype=np.uint32).view(np.float32)
    values = patterns[np.isfinite(patterns)]
    found = train_leaves.round_mantissa(torch.from_numpy(values), bits).numpy()
    assert found.tobytes() == round_mantissa(values, bits).tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype: torch.dtype):
    model = made().to(dtype)
    tuner = Tuner(codeword.compress(model, method=KMeans(6)), reassign_every=2)
    net = tuner.prepare(model).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x.to(dtype)).float(), y).backward()
        optimizer.step()
        tuner.step()
    final = tuner.finalize()
    assert final.entries["norm.weight"].dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(net.eval()(x.to(dtype)), codeword.swap(model, final)(x.to(dtype)))


def test_what_is_frozen_half_way_stays_as_it_is():
    model = made()
    tuner = Tuner(compressed(model, KMeans(8)), reassign_every=2)
    net: Any = tuner.prepare(model)
    trained(tuner, net, 3)
    net.conv.requires_grad_(False)
    before = net.conv.weight.clone()
    head = net.head.weight.clone()
    trained(tuner, net, 4)
    assert torch.equal(net.conv.weight, before)
    assert not torch.equal(net.head.weight, head)


@pytest.mark.parametrize("leaf", ["conv.expr.shadow", "head.bias", "codebook"])
def test_a_net_that_diverged_gets_no_new_codes_and_no_file(leaf: str):
    model = made()
    tuner = Tuner(compressed(model, RateAware(0.05)), reassign_every=1)
    net = tuner.prepare(model).train()
    with torch.no_grad():
        name = next(name for name, _ in net.named_parameters() if name.endswith(leaf))
        net.get_parameter(name).view(-1)[0] = float("nan")
    if not leaf.endswith("bias"):
        with pytest.raises(NonFiniteError, match=r"'conv\.weight' .*NaN or infinity"):
            tuner.step()
    if not leaf.endswith("shadow"):  # which is in no file
        with pytest.raises(NonFiniteError, match=rf"'{name[:4]}\.\w+' .*NaN or infinity"):
            tuner.finalize()


def test_values_that_were_infinite_in_the_file_may_be_so_again():
    model = made()
    with torch.no_grad():
        model.head.bias[0] = -float("inf")
    tuner = Tuner(codeword.compress(model, method=KMeans(4), keep_nonfinite=True))
    tuner.prepare(model)
    assert tuner.finalize().decode("head.bias")[0] == -np.inf


def test_copies_and_pickles_of_a_net_that_trains():
    model = made()
    for dtype in (np.float32, np.float64):
        book = np.array([[[-1.5], [0], [2]]], dtype)
        lookup = Lookup(np.random.default_rng(0).integers(0, 3, (1, 4, 96)).astype(np.uint16), book)
        writer = Writer()
        for name, value in model.state_dict().items():
            expr = Reshape(lookup, (4, 96)) if name == "head.weight" else Raw(value.numpy())
            kind = "float64" if name == "head.weight" and dtype == np.float64 else str(value.dtype)[6:]
            writer.add(code_tensor(name, kind, tuple(value.shape), expr))
        net = Tuner(writer.finish(), reassign_every=2).prepare(model)
        x, y = batch()
        F.cross_entropy(net(x), y).backward()
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            other.zero_grad()
            F.cross_entropy(other(x), y).backward()
            grads = [[p.grad for p in some.parameters() if p.requires_grad] for some in (net, other)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_and_compile_without_a_break():
    model = made()
    tuner = Tuner(compressed(model, RateAware(0.05)), reassign_every=2)
    net = tuner.prepare(model).train()
    x, y = batch()

    def run(some: Any) -> list[Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(some(x), y)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    plain = run(net)
    traced = torch.compile(net, backend="aot_eager", fullgraph=True)
    for a, b in zip(plain, run(traced), strict=True):
        assert torch.allclose(a, b, rtol=0.05, atol=1e-3)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    tuner.step()
    tuner.step()  # new codes
    for a, b in zip(run(net), run(traced), strict=True):
        assert torch.allclose(a, b, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reassign_every": 0}, "reassign_every must be a whole number >= 1, got 0"),
        ({"reassign_every": 1.5}, "reassign_every must be a whole number >= 1, got 1.5"),
        ({"rate": "low"}, "rate must be of hold, free, got 'low'"),
        ({"zeros": "none"}, "zeros must be of fixed, free"),
        ({"gradient": 1}, "gradient must be of mean, sum, got 1"),
        ({"pace": 0}, "pace must lie above 0 and up to 1, got 0"),
        ({"start": "x"}, "start must be of model, decoded"),
        ({"train": ("codebooks",)}, "train must be of codebook, step, scale, gain, offset, raw, got 'codebooks'"),
    ],
)
def test_wrong_options(options: Any, says: str):
    with pytest.raises(PlanError, match=says):
        Tuner(compressed(made(), KMeans(3)), **options)


def test_kinds_may_come_from_an_iterator():
    net = Tuner(compressed(made(), KMeans(3)), train=iter(("raw",))).prepare(made())
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["norm.weight", "norm.bias", "head.bias"]


def test_what_is_refused():
    model = made()
    artifact = compressed(model, KMeans(3))
    tuner = Tuner(artifact)
    for call in (tuner.step, tuner.finalize, tuner.state_dict):
        with pytest.raises(PlanError, match=r"tuner.prepare\(model\) first"):
            call()
    with pytest.raises(MismatchError, match="do not fit"):
        tuner.prepare(nn.Linear(3, 3))
    again = Tuner(artifact)
    again.prepare(model)
    with pytest.raises(MismatchError, match="do not fit"):
        again.prepare(nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"tuner.prepare\(model\) first"):  # half of this, half of that
        again.finalize()
    with pytest.raises(MismatchError, match="none of the 5 parameters"):
        tuner.prepare(made().requires_grad_(False))
    with pytest.raises(MismatchError, match="nothing of this Net trains"):
        Tuner(artifact, train=("gain",)).prepare(model)
    tuner.prepare(model)
    with pytest.raises(PlanError, match="eval mode"):
        tuner.step()
    other = Tuner(compressed(model, RateAware(0.1)))
    other.prepare(model)
    with pytest.raises(MismatchError, match="the state of another tuner"):
        tuner.load_state_dict(other.state_dict())
    state = tuner.state_dict()
    name = next(name for name in state if name.startswith("master."))
    with pytest.raises(MismatchError, match=rf"'{name}' of the state is \(2, 2\), here it is \("):
        tuner.load_state_dict(state | {name: torch.zeros(2, 2)})
