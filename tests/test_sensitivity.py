"""How much an error of each tensor counts: by hand, against measured divergence, and that nothing else changes."""

import numpy as np
import pytest
import torch
from torch import nn

from codeword.calibrate import importance_from_data
from codeword.data import load_data
from codeword.math.moments import Moments
from codeword.sensitivity import from_data, from_weights, of_biases
from codeword.zoo import lenet5_trained


def net(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).eval()


def inputs(*shape, seed=0):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(seed))]


def test_from_weights_by_hand():
    """|W|**4 / n is 1, 4 and 16, their mean 4; then at most 8 times the median of 1, 4, 16, 1000: 80. Roots of all."""
    found = from_weights({"a": (10.0, 100), "b": (20.0, 100), "c": (40.0, 100)})
    assert found == pytest.approx({"a": 0.5, "b": 1.0, "c": 2.0})
    found = from_weights({"a": (10.0, 100), "b": (20.0, 100), "c": (40.0, 100), "d": (1000.0, 1000)})
    assert found["d"] / found["a"] == pytest.approx(80**0.5)
    assert from_weights({"dead": (0.0, 10)}) == from_weights({}) == {}


def test_of_two_layers_by_hand():
    """Outputs 0 and 1 of layer "0" go on to "1" times 3: their errors cost nine times as much as those of "1".

    Inputs of both are independent and of variance 1 and v, so sum 1 / U_ii**2 is 4 * 1.01 and 2 * 1.01 * v.
    """
    model = net(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
    first, second = np.eye(4, dtype=np.float32)[None], 2 * np.eye(2, dtype=np.float32)[None]
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 0], [0, 3.0], [0, 0]]))
    x = inputs(256, 1, 4)  # a sequence of one: no logits, so that noise of variance 1 is what is added
    found = from_data(model, x, {"0.weight": Moments(first), "1.weight": Moments(second)})
    squares = [float(layer.weight.detach().square().mean(1).mean()) for layer in model]
    expected = (2 * 9 * 4 * 1.01 * squares[0]) / (3 * 2 * 1.01 * 2 * squares[1])
    assert found["0.weight"] / found["1.weight"] == pytest.approx(expected**0.5, rel=0.08)  # 256 draws
    assert found["0.weight"] * found["1.weight"] == pytest.approx(1)


def test_of_biases_by_hand():
    """Of the layers above, the bias of "0" is 1 and 2, that of "1" 2 everywhere: 9 * (1 + 4) and 3 * 4, summed over
    places before they are squared: of one place here. With sequences of 4 places, 4 times that.
    """
    model = net(nn.Linear(4, 2), nn.Linear(2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 0], [0, 3.0], [0, 0]]))
        model[0].bias.copy_(torch.tensor([1.0, 2.0]))
        model[1].bias.fill_(2.0)
    moments = {
        "0.weight": Moments(np.eye(4, dtype=np.float32)[None]),
        "1.weight": Moments(np.eye(2, dtype=np.float32)[None]),
    }
    for places in (1, 4):
        found = from_data(model, inputs(256, places, 4), moments)
        squares = float(model[1].weight.detach().square().mean(1).mean())
        weight = places * 3 * 2 * 1.01 * squares  # K-FAC: places know nothing of each other
        assert found["0.bias"] / found["1.weight"] == pytest.approx((places * 45 / weight) ** 0.5, rel=0.08)
        assert found["1.bias"] / found["1.weight"] == pytest.approx((places * 12 / weight) ** 0.5, rel=0.08)


def test_biases_without_data_by_hand():
    weights = {"a.weight": (100.0, 50), "b.weight": (4.0, 10), "weight": (1.0, 3), "dead.weight": (0.0, 9)}
    energies = {"a.bias": 25.0, "b.bias": 16.0, "bias": 0.25, "dead.bias": 1.0, "norm.bias": 9.0, "a.zero": 1.0}
    found = of_biases(weights, energies | {"c.bias": 0.0}, {"a.weight": 3.0})
    assert found == pytest.approx({"a.bias": 3 * 0.5, "b.bias": 1.0, "bias": 0.5})


def test_proportions_are_those_of_measured_divergence():
    model, x = lenet5_trained(), torch.from_numpy(load_data("digits").x[:256])
    moments = importance_from_data(model, [x])
    diagonals = {
        name: np.ascontiguousarray(cost.diagonal(len(model.get_parameter(name)))) for name, cost in moments.items()
    }
    found = from_data(model, [x], {k: h.reshape(model.get_parameter(k).shape) for k, h in diagonals.items()})
    with torch.no_grad():
        before = torch.log_softmax(model(x), 1)
        measured = {}
        for name in (name for name in found if name.endswith("weight")):
            weight = model.get_parameter(name)
            kept, total = weight.clone(), 0.0
            for seed in range(3):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                rows = kept.flatten(1).square().mean(1).sqrt().reshape(-1, *(1,) * (weight.dim() - 1))
                weight.copy_(kept + 0.1 * rows * noise)
                total += float((before.exp() * (before - torch.log_softmax(model(x), 1))).sum(1).mean())
            weight.copy_(kept)
            measured[name] = total
    ratios = np.array([measured[name] / found[name] ** 2 for name in measured])
    assert ratios.max() < 6 * ratios.min()  # errors of conv1 at neighbouring places know of each other


def test_scales_that_change_nothing_in_the_net_change_nothing_here():
    model, x = net(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), inputs(100, 6)
    before = from_data(model, x, importance_from_data(model, x))
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[0].bias.mul_(8)
        model[2].weight.div_(8)
    assert from_data(model, x, importance_from_data(model, x)) == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_stays_as_it_is(frozen):
    model = net(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)).train()
    x = inputs(70, 2, 4, 4)
    model.requires_grad_(not frozen)
    found = from_data(model, x, importance_from_data(model, x))
    assert set(found) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert found == from_data(model, x, importance_from_data(model, x))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad != frozen for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class Words(nn.Module):
    """A net whose output is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return {"out": self.layer(x)}


class Detached(Words):
    def forward(self, x):
        return self.layer(x).detach()


@pytest.mark.parametrize("model", [Words(), Detached(), nn.ReLU()])
def test_nothing_is_told_of_nets_without_a_derivative(model):
    assert from_data(model, inputs(10, 6), {"layer.weight": Moments(np.eye(6, dtype=np.float32)[None])}) == {}
    assert from_data(model, [], {}) == {}


def test_layers_that_are_not_reached_are_left_out_and_others_bounded():
    model, x = net(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 4)), inputs(50, 6)
    with torch.no_grad():
        model[0].weight.mul_(30)
    importance = importance_from_data(model, x)
    del importance["3.weight"]
    found = from_data(model, x, importance)
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.bias"}
    assert all(1 / 8 <= value <= 8 for value in found.values())
