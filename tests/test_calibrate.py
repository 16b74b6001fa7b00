"""Importance from data: second moments by hand, what is refused, and that it is worth having."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import codeword
from codeword.calibrate import check_importance, importance_from_data
from codeword.data import Dataset, load_data
from codeword.errors import DataError, PlanError
from codeword.math.moments import Moments
from codeword.sources import open_source


def net(*layers):
    return nn.Sequential(*layers).eval()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_by_hand():
    """Of (1, 2, 4) and (-3, 0, 2): E[x x^T] has (1 + 9) / 2, (2 + 0) / 2, (4 - 6) / 2 in its first row."""
    found = importance_from_data(net(nn.Linear(3, 2)), [np.array([[1, 2, 4], [-3, 0, 2]], np.float32)])
    assert list(found) == ["0.weight"]
    assert found["0.weight"].second.dtype == np.float32
    np.testing.assert_allclose(found["0.weight"].second, [[[5, 1, -1], [1, 2, 4], [-1, 4, 10]]], rtol=1e-6)
    np.testing.assert_allclose(found["0.weight"].diagonal(2), [[5, 2, 10], [5, 2, 10]], rtol=1e-6)


def test_conv2d_by_hand():
    x = np.array([[[[3, 3], [3, 3]], [[1, 2], [3, 4]]]], np.float32)  # one image of 2 channels: one place for a kernel
    found = importance_from_data(net(nn.Conv2d(2, 3, 2)), [x])["0.weight"]
    inputs = np.array([3, 3, 3, 3, 1, 2, 3, 4])
    np.testing.assert_allclose(found.second, np.outer(inputs, inputs)[None], rtol=1e-6)


LAYERS = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (5, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, (3, 2), padding="same", dilation=2, groups=4), (5, 4, 7, 8)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (5, 4, 9)),
    "sequences": (lambda: nn.Linear(7, 3), (5, 2, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_say_what_errors_cost_at_the_output(name, layout):
    """e H e for each row e of an error is the mean square that the layer itself makes of that error."""
    make, shape = LAYERS[name]
    x = torch.from_numpy(random(*shape))
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    layer = make()
    second = importance_from_data(net(layer), [x])["0.weight"].second
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(random(*layer.weight.shape, seed=1)))
        layer.bias.zero_()
        out = layer(x).double()
    out = out if name == "sequences" else out.movedim(1, -1)
    error = layer.weight.detach().double().flatten(1).numpy()
    h = np.repeat(second.astype(np.float64), len(error) // len(second), axis=0)
    expected = out.reshape(-1, len(error)).square().mean(0).numpy()
    np.testing.assert_allclose(np.einsum("ri,rij,rj->r", error, h, error), expected, rtol=1e-4)


def test_long_sequences_are_sampled():
    x = random(4, 1000, 5) + np.linspace(0, 1, 1000, dtype=np.float32)[:, None]
    found = importance_from_data(net(nn.Linear(5, 2)), [x])["0.weight"].second[0]
    whole = x.reshape(-1, 5).T @ x.reshape(-1, 5) / 4000
    assert 0 < np.abs(found - whole).max() < 0.6  # of 256 vectors instead of 4,000
    one = importance_from_data(net(nn.Linear(5, 2)), [x[0, 0]])["0.weight"].second[0]  # a lone vector
    np.testing.assert_allclose(one, np.outer(x[0, 0], x[0, 0]), rtol=1e-6)


def test_large_images_are_sampled_at_places_that_a_seed_chose():
    x = random(8, 3, 20, 20) + np.float32(1)
    model = net(nn.Conv2d(3, 2, 3))
    one, two = (importance_from_data(model, [x])["0.weight"].second for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(np.einsum("gii->gi", one) - 2).max() < 0.5  # E[x**2] of 512 of 2,592 patches


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv3d(3, 2, 2), (4, 3, 5, 5, 5)), (nn.Conv2d(520, 2, 3), (1, 520, 4, 4))]
)
def test_of_wide_weights_and_volumes_the_diagonal_alone(layer, shape):
    x = random(*shape)
    found = importance_from_data(net(layer), [x])["0.weight"]
    moment = np.square(x.astype(np.float64)).mean((0, *range(2, x.ndim)))
    kernel = [1] * (x.ndim - 2)
    np.testing.assert_allclose(found, np.broadcast_to(moment.reshape(1, -1, *kernel), found.shape), rtol=1e-4)


def diagonal(found, rows=1):
    """What a squared error of each weight of the first row costs."""
    return found.diagonal(rows)[0]


def test_later_layers_see_what_reaches_them():
    model = net(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.from_numpy(random(50, 6))
    hidden = F.relu(model[0](x)).detach().double().square().mean(0)
    found = importance_from_data(model, [x])
    np.testing.assert_allclose(diagonal(found["2.weight"]), hidden.numpy(), rtol=1e-5)


@pytest.mark.parametrize("cuts", [[100], [50, 50], [90, 10], [1, 99], [33, 33, 34]])
def test_examples_count_alike_however_they_are_batched(cuts):
    model, x = net(nn.Linear(6, 5)), random(100, 6) * np.linspace(0, 3, 100, dtype=np.float32)[:, None]
    batches = np.split(x, np.cumsum(cuts)[:-1])
    expected = np.square(x.astype(np.float64)).mean(0)
    np.testing.assert_allclose(diagonal(importance_from_data(model, batches)["0.weight"]), expected, rtol=1e-5)


def test_batches_may_be_tensors_pairs_or_a_dataset_longer_than_one_batch():
    model, x = net(nn.Linear(6, 5)), random(300, 6)
    x[256:] *= 5
    y = np.zeros(300, np.int64)
    expected = np.square(x.astype(np.float64)).mean(0)
    for data in (Dataset("d", x, y), [torch.from_numpy(x)], [(x, y)], [[torch.from_numpy(x), y]], iter([x])):
        np.testing.assert_allclose(diagonal(importance_from_data(model, data)["0.weight"]), expected, rtol=1e-5)


def test_layers_that_only_zeros_reach_are_left_out():
    model = net(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert list(importance_from_data(model, [random(5, 4)])) == ["0.weight"]
    assert importance_from_data(model, [np.zeros((2, 4), np.float32)]) == {}
    assert codeword.compress(model, method="rate-aware:lam=0.1", data=[np.zeros((2, 4), np.float32)]).nbytes


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("broken", [False, True])
def test_hooks_are_removed_and_modes_restored(broken):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    if broken:
        model.append(Fails())
    model.train()
    model[1].eval()  # a frozen norm in a net that trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if broken:
        with pytest.raises(DataError, match="on purpose"):
            importance_from_data(model, [random(3, 4)])
    else:
        importance_from_data(model, [random(3, 4)])
    assert [module.training for module in model] == [True, False, True, True][: len(model)]
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_net_in_training_is_measured_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4)).train()
    x = random(20, 4)
    found = diagonal(importance_from_data(model, [x])["1.weight"])
    np.testing.assert_allclose(found, np.square(x.astype(np.float64)).mean(0), rtol=1e-5)


def test_weights_that_are_computed_are_left_out():
    model = net(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert list(importance_from_data(model, [random(5, 4)])) == ["1.weight"]


def test_no_data_or_no_layers():
    with pytest.raises(DataError, match="0 batches reached none of 1 linear"):
        importance_from_data(net(nn.Linear(4, 3)), [])
    with pytest.raises(DataError, match="1 batches reached none of 0 linear"):
        importance_from_data(net(nn.LayerNorm(4)), [random(5, 4)])
    with pytest.raises(DataError, match="0 batches"):
        codeword.compress(net(nn.Linear(4, 3)), "4x", data=[])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([random(2, 3), random(2, 5)], r"Sequential does not take batch 1 of shape \(2, 5\), torch.float32: "),
        (["text"], "a batch must be a tensor or array, got str"),
        ("mnist:tset", "unknown data 'mnist:tset': did you mean 'mnist:test'"),
    ],
)
def test_data_that_do_not_fit_the_net(data, says):
    with pytest.raises(DataError, match=says):
        codeword.compress(net(nn.Linear(3, 2)), "4x", data=data)


def test_data_by_name():
    model = net(nn.Flatten(), nn.Linear(784, 10))
    plan = codeword.Plan((codeword.Rule("*", codeword.RateAware(0.05)),))
    from_name, from_set = (codeword.compress(model, plan=plan, data=data) for data in ("digits", load_data("digits")))
    for name in from_name:
        np.testing.assert_array_equal(from_name.decode(name), from_set.decode(name))


def test_data_needs_a_module(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(net(nn.Linear(4, 3)).state_dict(), path)
    for weights in (path, {"w": random(4, 3)}):
        with pytest.raises(PlanError, match=r"data needs a model to run.*pass the torch module"):
            codeword.compress(weights, "4x", data=[random(5, 4)])


def test_data_and_importance_are_one_too_many():
    with pytest.raises(PlanError, match="give data or importance, not both"):
        codeword.compress(net(nn.Linear(4, 3)), "4x", data=[random(5, 4)], importance={})


@pytest.mark.parametrize(
    ("name", "h", "says"),
    [
        ("w.weight", np.ones((4, 4), np.float32), r"'w.weight' has shape \(4, 4\), the tensor \(4, 3\)"),
        ("w.weight", np.full((4, 3), -1.0), r"'w.weight' is -1.0 at \[0, 0\]; it must be finite, >= 0"),
        ("w.weight", np.zeros((4, 3)), "'w.weight' is zero everywhere; leave it out"),
        ("w.weight", np.where(np.arange(12.0).reshape(4, 3) == 7, np.nan, 1), r"'w.weight' is nan at \[2, 1\]"),
        ("w.weight", np.full((4, 3), np.inf), "'w.weight' is inf at"),
        ("W.weight", np.ones((4, 3)), "no tensor 'W.weight'"),
    ],
)
def test_bad_importance(name, h, says):
    weights = {"w.weight": random(4, 3), "b": random(3)}
    with pytest.raises(PlanError, match=says):
        check_importance({name: h}, open_source(weights).infos)
    with pytest.raises(PlanError, match=says):
        codeword.compress(weights, "4x", importance={name: h})


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (np.ones((1, 4, 4)), r"shape \(1, 4, 4\), the tensor \(4, 3\); expected \(groups, 3, 3\)"),
        (np.ones((3, 3, 3)), "groups a divisor of 4"),
        (np.full((1, 3, 3), np.nan), r"'w.weight' is nan at \[0, 0, 0\]"),
        (-np.eye(3)[None], r"'w.weight' is -1.0 at \[0, 0\]"),
        (np.zeros((1, 3, 3)), "zero everywhere"),
        (1 - np.eye(3)[None], "'w.weight': moments of 3 inputs are not positive semidefinite"),
    ],
)
def test_bad_moments(second, says):
    with pytest.raises(PlanError, match=says):
        codeword.compress(
            {"w.weight": random(4, 3)}, method="rate-aware:lam=0.1", importance={"w.weight": Moments(second)}
        )


def output_error(artifact, model, x):
    return float(np.square(x @ (artifact.decode("0.weight") - model[0].weight.detach().numpy()).T).mean())


def test_measured_moments_lower_the_output_error_at_equal_bytes():
    model = net(nn.Linear(128, 64))
    x = (random(400, 16) @ random(16, 128, seed=1) + 0.1 * random(400, 128, seed=2)).astype(np.float32)  # dependent
    plain, aware = (codeword.fit(model, "8x", data=data).artifact for data in (None, [x]))
    assert abs(aware.nbytes - plain.nbytes) < 0.02 * plain.nbytes
    assert output_error(aware, model, x) < 0.3 * output_error(plain, model, x)
    method = "rate-aware:lam=0.1"
    aware = codeword.compress(model, method=method, data=[x])
    by_hand = codeword.compress(model, method=method, importance=importance_from_data(model, [x]))
    assert by_hand.nbytes == aware.nbytes
    np.testing.assert_array_equal(by_hand.decode("0.weight"), aware.decode("0.weight"))


def test_an_importance_of_weights_lowers_the_error_it_weighs_at_equal_bytes():
    weight = random(64, 128)
    h = np.broadcast_to(np.logspace(-4, 4, 128, dtype=np.float32), weight.shape)

    def error(artifact):
        return float((h * np.square(artifact.decode("w") - weight)).sum())

    plain, aware = (codeword.compress({"w": weight}, "8x", importance=some) for some in ({}, {"w": h}))
    assert abs(aware.nbytes - plain.nbytes) < 0.02 * plain.nbytes
    assert error(aware) < 0.6 * error(plain)


@pytest.mark.parametrize("method", ["kmeans:n_clusters=8", "prune:sparsity=0.5,then=kmeans,then.n_clusters=4"])
def test_methods_that_know_no_moments_take_their_diagonal(method):
    model, x = net(nn.Linear(16, 8)), random(50, 16) * np.arange(16, dtype=np.float32)
    moments = importance_from_data(model, [x])
    by_weight = {name: found.diagonal(8) for name, found in moments.items()}
    one, two = (codeword.compress(model, method=method, importance=some) for some in (moments, by_weight))
    np.testing.assert_array_equal(one.decode("0.weight"), two.decode("0.weight"))
