"""Models that run from expressions: the same outputs as decoded ones, memory, copies, moves, training, mismatches."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codeword.artifact import Artifact, Writer, code_tensor, tied_tensor
from codeword.errors import MismatchError
from codeword.expr import DTYPES, Affine, Expr, Lookup, Raw, Reshape, Scatter
from codeword.methods import FixedPoint, Keep, KMeans, Method, RateAware
from codeword.nn import CodedConv, CodedEmbedding, CodedLinear, CodedModule, TorchExpr, load_into, state_dict, swap
from codeword.nn import swap_report as report
from codeword.sources import open_source
from codeword.zoo import digits, lenet5, lenet5_trained

_opened: list[Artifact] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def finished(writer: Writer) -> Artifact:
    """The writer's artifact, closed after the test."""
    _opened.append(writer.finish())
    return _opened[-1]


def compressed(model: Any, methods: dict[str, Method] | None = None, *, default: Method | None = None) -> Artifact:
    """A model or state dict as an artifact: tensors of two axes and more by `default`, the rest kept."""
    source = open_source(model)
    writer, at = Writer(), {}
    generator = np.random.default_rng(0)
    for info in source.infos:
        if info.tied_to is not None:
            writer.add(tied_tensor(info.name, info.dtype, info.shape, at[info.tied_to]))
            continue
        method = (methods or {}).get(info.name) or (default or KMeans(8) if len(info.shape) > 1 else Keep())
        expr = method.compress(source.load(info.name), None, generator=generator)
        at[info.name] = writer.add(code_tensor(info.name, info.dtype, info.shape, expr))
    return finished(writer)


def written(**exprs: tuple[str, tuple[int, ...], Expr]) -> Artifact:
    writer = Writer()
    for name, (dtype, dims, expr) in exprs.items():
        writer.add(code_tensor(name, dtype, dims, expr))
    return finished(writer)


def decoded(model: nn.Module, artifact: Artifact) -> nn.Module:
    dense = copy.deepcopy(model)
    load_into(dense, artifact)
    return dense


def floats(model: nn.Module) -> int:
    """Values in parameters and floating buffers: where a dense weight would show."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return sum(tensor.numel() for tensor in tensors)


@pytest.fixture(scope="module")
def lenet_artifact() -> Iterator[Artifact]:
    artifact = compressed(
        lenet5_trained(),
        {
            "conv1.weight": KMeans(16),
            "conv2.weight": KMeans(16, granularity="row"),
            "fc2.weight": Keep(),
            "fc2.bias": FixedPoint(5),
        },
        default=RateAware(0.05),
    )
    _opened.remove(artifact)  # lives longer than one test
    yield artifact
    artifact.close()


def test_lenet_gives_the_same_logits_from_codes(lenet_artifact: Artifact):
    model = lenet5().eval()
    before = copy.deepcopy(model.state_dict())
    swapped = swap(model, lenet_artifact)
    x, y = digits()
    images = torch.from_numpy(x[:200])
    with torch.no_grad():
        logits = swapped(images)
        assert torch.equal(logits, decoded(model, lenet_artifact)(images))
    assert (logits.argmax(1).numpy() == y[:200]).mean() > 0.95
    assert not swapped.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert report(swapped) == {
        "conv1.weight": "coded",
        "conv1.bias": "dense: raw",
        "conv2.weight": "coded",
        "conv2.bias": "dense: raw",
        "fc1.weight": "coded",
        "fc1.bias": "dense: raw",
        "fc2.weight": "dense: raw",
        "fc2.bias": "dense: raw",
    }
    assert "CodedLinear(\n    800, 500, bias=True" in repr(swapped)
    assert "CodedConv(\n    1, 20, kernel_size=(5, 5)" in repr(swapped)


def test_no_dense_weight_is_held_between_calls(lenet_artifact: Artifact):
    swapped = swap(lenet5(), lenet_artifact)
    swapped(torch.zeros(1, 1, 28, 28)).sum().backward()
    # fc2 (5000, raw), 580 biases, mean and std; then 16 + 16 + 50 scales, fc1's step and 500 scales
    assert floats(swapped) == 5000 + 580 + 2 + 16 + 16 + 50 + 1 + 500
    for module in swapped.modules():
        assert not isinstance(module, CodedModule) or "weight" not in module._parameters


def test_copies_and_state_dicts_of_a_swapped_model(lenet_artifact: Artifact):
    swapped = swap(lenet5(), lenet_artifact)
    x = torch.from_numpy(digits()[0][:8])
    with torch.no_grad():
        swapped.get_parameter("conv1.expr.root.inner.codebook").mul_(1.1)
        expected = swapped(x)
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    fresh = swap(lenet5(), lenet_artifact)
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(swapped.state_dict())
    others = copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped)), torch.load(file, weights_only=False), fresh
    for other in others:
        assert torch.equal(other(x), expected)
        assert report(other) == report(swapped)
    with torch.no_grad():
        others[0].get_parameter("conv1.expr.root.inner.codebook").zero_()
        assert torch.equal(swapped(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_a_dtype_is_as_moving_the_decoded_model(lenet_artifact: Artifact, dtype: torch.dtype):
    x = torch.from_numpy(digits()[0][:4]).to(dtype)
    expected = decoded(lenet5(), lenet_artifact).to(dtype)(x)
    moved = swap(lenet5(), lenet_artifact).to(dtype)
    swapped = swap(lenet5().to(dtype), lenet_artifact)
    for model in (moved, swapped):
        assert model(x).dtype == dtype
        assert torch.equal(model(x), expected)
    assert moved.get_parameter("conv1.expr.root.inner.codebook").dtype == torch.float32


def test_training_moves_codebooks_scales_and_biases(lenet_artifact: Artifact):
    swapped = swap(lenet5().train(), lenet_artifact)
    assert swapped.training
    x, y = digits()
    images, labels = torch.from_numpy(x[:100]), torch.from_numpy(y[:100])
    optimizer = torch.optim.Adam(swapped.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(swapped(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in swapped.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_frozen_weights_stay_frozen(lenet_artifact: Artifact):
    model = lenet5()
    model.conv1.weight.requires_grad_(False)
    swapped = swap(model, lenet_artifact)
    assert not swapped.get_parameter("conv1.expr.root.inner.codebook").requires_grad
    assert swapped.get_parameter("fc1.expr.root.inner.scale").requires_grad


CONVOLUTIONS = [
    nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2),
    nn.Conv2d(6, 9, (3, 5), groups=3, padding="same"),
    nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="reflect", bias=False),
    nn.Conv2d(6, 4, 3, padding="same", padding_mode="replicate", dilation=2),
    nn.Conv3d(6, 6, 3, groups=6, padding=1, padding_mode="circular"),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolutions(layer: Any):
    artifact = compressed(layer)
    swapped = swap(layer, artifact)  # the whole model is one layer
    assert isinstance(swapped, CodedConv)
    for batch in ((2,), ()):
        x = torch.randn(*batch, 6, *[9, 8, 7][: len(layer.kernel_size)])
        assert torch.equal(swapped(x), decoded(layer, artifact)(x))
    assert type(layer).__name__.startswith("Conv")


def test_embeddings_and_linear_without_bias():
    model = nn.Sequential(
        nn.Embedding(20, 8, padding_idx=3, max_norm=1.0, scale_grad_by_freq=True), nn.Linear(8, 5, bias=False)
    )
    artifact = compressed(model)
    swapped, dense = swap(model, artifact), decoded(model, artifact)
    assert isinstance(swapped[0], CodedEmbedding)  # pyright: ignore[reportIndexIssue]
    assert isinstance(swapped[1], CodedLinear)  # pyright: ignore[reportIndexIssue]
    tokens = torch.tensor([[0, 3, 3], [19, 7, 0]])
    weight = swapped[0].weight.detach().clone()  # pyright: ignore[reportIndexIssue]
    assert torch.equal(swapped(tokens), dense(tokens))
    assert torch.equal(swapped[0].weight, weight)  # pyright: ignore[reportIndexIssue]
    swapped(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in swapped.parameters())


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("drop", ["", "head.weight", "embedding.weight"])
def test_tied_tensors_share_one_expression(drop: str):
    model = Tied()
    artifact = compressed({name: value for name, value in model.state_dict().items() if name != drop})
    swapped = swap(model, artifact)
    assert swapped.get_submodule("embedding.expr") is swapped.get_submodule("head.expr")
    assert floats(swapped) == 8
    assert report(swapped) == {"embedding.weight": "coded", "head.weight": "coded"}
    tokens = torch.arange(5)
    assert torch.equal(swapped(tokens), decoded(model, artifact)(tokens))
    again = copy.deepcopy(swapped)
    assert again.get_submodule("embedding.expr") is again.get_submodule("head.expr")


def test_tensors_tied_in_the_file_only_share_too():
    artifact = compressed(Tied())
    swapped = swap(Tied(tied=False), artifact)
    assert swapped.get_submodule("embedding.expr") is swapped.get_submodule("head.expr")
    state = state_dict(artifact)
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_a_layer_in_two_places_stays_one_layer():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    artifact = compressed(model)
    swapped: Any = swap(model, artifact)
    assert swapped[0] is swapped[2]
    x = torch.randn(3, 4)
    assert torch.equal(swapped(x), decoded(model, artifact)(x))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_modules_without_a_coded_form_run_dense_and_the_report_says_why():
    model = nn.ModuleDict(
        {
            "own": Scaled(4, 4),
            "norm": nn.GroupNorm(2, 4),
            "up": nn.ConvTranspose1d(4, 4, 3),
            "linear": nn.Linear(4, 4),
            "batch": nn.BatchNorm1d(4),
        }
    )
    model["own"].weight = model["up"].bias = nn.Parameter(torch.randn(4, 4))
    coded = KMeans(4)
    artifact = compressed(model, {"norm.weight": coded, "linear.bias": coded})
    swapped = swap(model, artifact)
    assert {name: what for name, what in report(swapped).items() if what not in ("coded", "dense: raw")} == {
        "own.weight": "dense: module type Scaled has no coded form",
        "up.bias": "dense: module type Scaled has no coded form",
        "up.weight": "dense: module type ConvTranspose1d has no coded form",
        "norm.weight": "dense: module type GroupNorm has no coded form",
        "linear.bias": "dense: bias of Linear has no coded form",
    }
    assert report(swapped)["linear.weight"] == "coded"
    assert swapped.get_parameter("own.weight") is swapped.get_parameter("up.bias")
    expected = state_dict(artifact)
    for name, value in swapped.state_dict().items():
        if not name.startswith("linear.expr"):
            assert torch.equal(value, expected[name])


def test_attention_reads_its_output_layers_weight():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    artifact = compressed(model)
    swapped, dense = swap(model, artifact), decoded(model, artifact)
    assert report(swapped)["self_attn.in_proj_weight"] == "dense: module type MultiheadAttention has no coded form"
    assert report(swapped)["self_attn.out_proj.weight"] == "coded"
    x = torch.randn(2, 5, 8)
    for mode in (True, False):
        assert torch.equal(swapped.train(mode)(x), dense.train(mode)(x))
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), dense(x))  # torch's fused path


def test_hooks_and_references_survive():
    model: Any = nn.Sequential(nn.Linear(3, 3))
    model.plain = [model[0]]  # a list torch does not know of
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    artifact = compressed(model)
    swapped: Any = swap(model, artifact)
    assert swapped.plain[0] is swapped[0]
    x = torch.randn(2, 3)
    assert torch.equal(swapped(x), decoded(model, artifact)(x))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2"])
def test_weights_of_narrow_tensors_run_as_they_decode(name: str):
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 9, (1, 4, 6)).astype(np.uint8)
    expr = Affine(
        Lookup(codes, generator.normal(size=(1, 9, 1)).astype(np.float32)),
        generator.normal(size=(4, 1, 1)).astype(ml_dtypes.bfloat16),
    )
    artifact = written(weight=(name, (4, 6), Reshape(expr, (4, 6))))
    model = nn.Linear(6, 4, bias=False)
    swapped: Any = swap(model, artifact)
    assert isinstance(swapped, CodedLinear)
    assert swapped.weight.dtype == torch.float32
    assert torch.equal(swapped.weight, state_dict(artifact)["weight"].float())
    assert torch.equal(swapped.weight, decoded(model, artifact).get_parameter("weight"))


def test_pruned_and_two_byte_weights_run():
    positions = np.arange(0, 24, 5, dtype=np.uint32)
    pruned = written(weight=("float32", (4, 6), Scatter(24, positions, Raw(np.arange(5, dtype=np.float32)))))
    assert report(swap(nn.Linear(6, 4, bias=False), pruned)) == {"weight": "coded"}
    model = nn.Linear(40, 40)
    swapped: Any = swap(model, compressed(model, default=KMeans(400)))
    assert swapped.get_buffer("expr.root.inner.codes").dtype == torch.uint16
    assert swapped.extra_repr() == "40, 40, bias=True"


def test_state_dict_has_every_dtype_bit_for_bit():
    arrays = {
        name: np.frombuffer(np.random.default_rng(0).bytes(6 * dtype.itemsize), dtype).reshape(2, 3)
        for name, dtype in DTYPES.items()
        if name != "bool"
    }
    arrays["bool"] = np.array([[True, False, True]])
    arrays["scalar"] = np.array(7, np.int64)
    arrays["empty"] = np.zeros((0, 3), np.float16)
    writer = Writer()
    for name, array in arrays.items():
        dtype = {"scalar": "int64", "empty": "float16"}.get(name, name)
        writer.add(code_tensor(name, dtype, array.shape, Raw(array)))
    state = state_dict(finished(writer))
    for name, array in arrays.items():
        tensor = state[name]
        assert tuple(tensor.shape) == array.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    assert state["float8_e4m3"].dtype == torch.float8_e4m3fn
    assert state["bfloat16"].dtype == torch.bfloat16
    assert state["uint64"].dtype == torch.uint64


def test_load_into_keeps_dtypes_and_the_counter_that_the_file_lacks():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    artifact = compressed(state)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    load_into(other, artifact)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float64}
    assert torch.equal(other[1].running_mean, model[1].running_mean.double())
    assert other[1].num_batches_tracked == 0
    swapped = swap(model, artifact)
    assert swapped.get_buffer("1.num_batches_tracked") == 1
    assert report(swapped)["1.num_batches_tracked"] == "dense: not in the file"


@pytest.mark.parametrize("act", [swap, load_into])
def test_a_mismatch_names_every_tensor_and_changes_nothing(act: Any):
    artifact = compressed({"0.weight": torch.randn(4, 3), "0.bias": torch.randn(5), "1.weight": torch.randn(2, 2)})
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError) as caught:
        act(model, artifact)
    message = str(caught.value)
    assert "missing in the file (1): 1.bias (4,)" in message
    assert "0.bias is (4,) in the model, (5,) in the file" in message
    assert "1.weight is (4, 4) in the model, (2, 2) in the file" in message
    assert "build the model with the options" in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(MismatchError, match=r"not in the model \(1\): 1.weight \(2, 2\)"):
        act(nn.Sequential(nn.Linear(3, 4)), artifact)


def test_long_mismatches_are_cut_and_wrapped_models_recognised():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    artifact = compressed(model)
    with pytest.raises(MismatchError, match=r"missing in the file \(18\).* and 8 more;.*give the inner one") as caught:
        swap(nn.ModuleDict({"module": model}), artifact)
    assert str(caught.value).count("module.0.") == 2
    assert "module.8.weight" not in str(caught.value)


def test_models_without_values_are_refused():
    artifact = compressed(nn.Linear(3, 4))
    with pytest.raises(MismatchError, match="meta device"):
        swap(nn.Linear(3, 4, device="meta"), artifact)
    with pytest.raises(MismatchError, match="run the model once"):
        load_into(nn.LazyLinear(4), artifact)
    whole = written(weight=("int64", (4, 3), Raw(np.ones((4, 3), np.int64))))
    with pytest.raises(MismatchError, match="weight is float32 in the model, int64 in the file"):
        swap(nn.Linear(3, 4, bias=False), whole)
    with pytest.raises(MismatchError, match="does not come from swap"):
        report(nn.Linear(3, 4))


def test_take_refuses_what_has_no_coded_form():
    twin = TorchExpr(Raw(np.ones((4, 3), np.float32)))
    with pytest.raises(MismatchError, match="a ReLU has no coded form"):
        CodedModule.take(nn.ReLU(), twin)
    layer = nn.Linear(4, 3)
    with pytest.raises(MismatchError, match=r"weight is \(3, 4\), the expression \(4, 3\)"):
        CodedModule.take(layer, twin)
    assert type(layer) is nn.Linear
    taken = CodedModule.take(nn.Linear(3, 4), twin)
    assert isinstance(taken, CodedLinear)
    assert torch.equal(taken.weight, torch.ones(4, 3))
