"""Training what a file holds: gradients by finite differences, what runs is what is shipped, zeros, sizes, states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import codeword
from codeword.artifact import Artifact
from codeword.expr import decode, leaves, with_leaves
from codeword.methods import (
    Birch,
    DensityKMeans,
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
METHODS = [*ALONE, *PRUNED, Keep(mantissa_bits=5)]
ADAM = {"lr": 3e-3, "weight_decay": 0.1}


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
    kinds = ("codebook", "step", "scale", "gain", "offset", "raw")
    tuner = Tuner(compressed(model, method), gradient=gradient, train=kinds)
    net: Any = tuner.prepare(model).train()
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
