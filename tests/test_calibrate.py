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
from codeword.sources import open_source


def net(*layers):
    return nn.Sequential(*layers).eval()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_by_hand():
    # Two examples: E[x**2] of the inputs is (1 + 9) / 2, (4 + 0) / 2, (16 + 4) / 2.
    found = importance_from_data(net(nn.Linear(3, 2)), [np.array([[1, 2, 4], [-3, 0, 2]], np.float32)])
    assert list(found) == ["0.weight"]
    assert found["0.weight"].dtype == np.float32
    np.testing.assert_allclose(found["0.weight"], [[5, 2, 10], [5, 2, 10]], rtol=1e-6)


def test_conv2d_by_hand():
    x = np.stack([np.full((2, 2), 3.0), [[1, 2], [3, 4]]])[None].astype(np.float32)  # 1 image of 2 channels
    found = importance_from_data(net(nn.Conv2d(2, 3, 2)), [x])["0.weight"]
    assert found.shape == (3, 2, 2, 2)
    np.testing.assert_allclose(found[:, 0], 9, rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], (1 + 4 + 9 + 16) / 4, rtol=1e-6)


def test_groups_see_their_own_channels():
    x = random(5, 4, 3, 3) * np.array([1, 2, 3, 4], np.float32).reshape(1, 4, 1, 1)
    moment = np.square(x.astype(np.float64)).mean((0, 2, 3))
    found = importance_from_data(net(nn.Conv2d(4, 6, 3, padding=1, groups=2)), [x])["0.weight"]
    assert found.shape == (6, 2, 3, 3)
    for out in range(6):
        for channel in range(2):
            np.testing.assert_allclose(found[out, channel], moment[2 * (out // 3) + channel], rtol=1e-5)


@pytest.mark.parametrize(("layer", "dims"), [(nn.Conv1d(3, 2, 2), 1), (nn.Conv3d(3, 2, 2), 3)])
def test_other_convolutions(layer, dims):
    x = random(4, 3, *[5] * dims)
    found = importance_from_data(net(layer), [x])["0.weight"]
    moment = np.square(x.astype(np.float64)).mean((0, *range(2, 2 + dims)))
    np.testing.assert_allclose(found, np.broadcast_to(moment.reshape(1, 3, *[1] * dims), found.shape), rtol=1e-5)


def test_linear_over_sequences_counts_every_position():
    x = random(4, 7, 5)
    found = importance_from_data(net(nn.Linear(5, 2)), [x])["0.weight"]
    np.testing.assert_allclose(found[0], np.square(x.astype(np.float64)).mean((0, 1)), rtol=1e-5)


def test_later_layers_see_what_reaches_them():
    model = net(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.from_numpy(random(50, 6))
    hidden = F.relu(model[0](x)).detach().double().square().mean(0)
    found = importance_from_data(model, [x])
    np.testing.assert_allclose(found["2.weight"][3], hidden.numpy(), rtol=1e-5)


@pytest.mark.parametrize("cuts", [[100], [50, 50], [90, 10], [1, 99], [33, 33, 34]])
def test_examples_count_alike_however_they_are_batched(cuts):
    model, x = net(nn.Linear(6, 5)), random(100, 6) * np.linspace(0, 3, 100, dtype=np.float32)[:, None]
    batches = np.split(x, np.cumsum(cuts)[:-1])
    expected = np.square(x.astype(np.float64)).mean(0)
    np.testing.assert_allclose(importance_from_data(model, batches)["0.weight"][0], expected, rtol=1e-5)


def test_batches_may_be_tensors_pairs_or_a_dataset_longer_than_one_batch():
    model, x = net(nn.Linear(6, 5)), random(300, 6)
    x[256:] *= 5
    y = np.zeros(300, np.int64)
    expected = np.square(x.astype(np.float64)).mean(0)
    for data in (Dataset("d", x, y), [torch.from_numpy(x)], [(x, y)], [[torch.from_numpy(x), y]], iter([x])):
        np.testing.assert_allclose(importance_from_data(model, data)["0.weight"][0], expected, rtol=1e-5)


def test_inputs_that_are_always_zero_keep_a_thousandth_of_the_mean():
    x = random(100, 4)
    x[:, 2] = 0
    found = importance_from_data(net(nn.Linear(4, 3)), [x])["0.weight"][0]
    assert found[2] == pytest.approx(1e-3 * np.square(x).mean(0).mean(), rel=1e-5)
    dead = importance_from_data(net(nn.Linear(4, 3)), [np.zeros((2, 4), np.float32)])["0.weight"]
    np.testing.assert_array_equal(dead, np.ones((3, 4), np.float32))


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
    found = importance_from_data(model, [x])["1.weight"][0]
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


def weighted_error(artifact, weight, h):
    return float((h * np.square(artifact.decode("0.weight") - weight)).sum())


def test_importance_lowers_the_error_it_weighs_at_equal_bytes():
    model = net(nn.Linear(128, 64))
    weight = model[0].weight.detach().numpy()
    x = random(400, 128) * np.logspace(-2, 2, 128, dtype=np.float32)  # very unequal inputs
    h = importance_from_data(model, [x])["0.weight"]
    plain, aware = (codeword.fit(model, "8x", data=data).artifact for data in (None, [x]))
    assert abs(aware.nbytes - plain.nbytes) < 0.02 * plain.nbytes
    assert weighted_error(aware, weight, h) < 0.6 * weighted_error(plain, weight, h)
    by_hand = codeword.compress(model, "8x", importance={"0.weight": h})
    assert by_hand.nbytes == aware.nbytes
    np.testing.assert_array_equal(by_hand.decode("0.weight"), aware.decode("0.weight"))
