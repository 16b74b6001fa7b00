"""How much a relative error of each weight tensor disturbs what a net puts out, for the planner to weigh them by.

Divergence of outputs is sum over tensors of s * relative squared error, about, as long as errors are small and do not
know of each other. Each s is needed only relative to the others.

With data s is measured: an error e of the row of weights that makes output o of a layer adds e H e to that output's
variance, with H the second moments of the layer's inputs, and what a variance there costs is the mean squared
derivative g of the log likelihood by it (Martens & Grosse 2015, K-FAC: the Fisher matrix as H times diag g). Labels are
drawn from what the net itself says. Where errors are made to cancel under H, an error of variance D in position i
costs D / U_ii**2, U as in `math.moments.factor`.

Without data the weights themselves tell, if they were trained with weight decay and a batch norm follows them. Their
scale changes nothing then: gradients drive the norm |W| up by their square, decay drives it down, and where both are in
balance the squared gradient by W / |W| is as |W|**4 (van Laarhoven 2017). So s is |W|**4 / n for n weights. A layer
that no norm follows stays out of balance, so none counts more than 8 times the median.

A bias adds to an output what an input that is always 1 would: with data s is the mean squared derivative by each of its
values, summed over the places of an image before it is squared, times the value's square; without data
it is the layer's times |b|**2 / |W|**2, at most the layer's, as if inputs were of mean square 1.

What is returned is the square root of either. Both hold for small errors only, and large ones, as few bits make them,
differ less in what they do: planned by s itself, ResNet-20 with data diverges more at 12x and 15x than with all tensors
alike, and by its root less than by either (benchmarks/ordering.py has the order of plans).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from codeword.calibrate import spread, weight_layers
from codeword.evaluate import eval_mode
from codeword.execute import Importance
from codeword.math.moments import Moments
from codeword.methods.base import as_rows

if TYPE_CHECKING:
    import torch

_EXAMPLES = 256
_LEAST, _VALUES = 32, 1 << 22  # examples, and values of all their inputs together: fewer examples where those are large
_BATCH = 64
_MOST_OF_MEDIAN = 8.0
_RANGE = 8.0  # about the geometric mean: a tensor that these data do not touch still is one


def of_biases(
    weights: Mapping[str, tuple[float, int]], energies: Mapping[str, float], known: Mapping[str, float]
) -> dict[str, float]:
    """sqrt(s) of biases from (|W|**2, n) of weights, |b|**2 of vectors and what weights count, 1 if it is not known."""
    found: dict[str, float] = {}
    for name, energy in energies.items():
        place, _, part = name.rpartition(".")
        weight = f"{place}.weight" if place else "weight"
        if part == "bias" and weights.get(weight, (0.0, 0))[0] > 0 and energy > 0:
            share = min(energy / weights[weight][0], 1.0)
            found[name] = max(known.get(weight, 1.0) * math.sqrt(share), 1 / _RANGE)
    return found


def from_weights(norms: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """sqrt(s) of each tensor from (|W|**2, n), for tensors of a net with batch norms. Their geometric mean is 1."""
    rough = {name: energy**2 / n for name, (energy, n) in norms.items() if energy > 0}
    top = _MOST_OF_MEDIAN * float(np.median(list(rough.values()))) if rough else 0.0
    return _relative({name: min(value, top) for name, value in rough.items()})


def from_data(model: torch.nn.Module, data: Sequence[torch.Tensor], importance: Importance) -> dict[str, float]:
    """sqrt(s) of the weights and biases of linear and convolution layers, by name. The geometric mean of weights is 1.

    data: batches, of which up to 256 examples are used; importance: what `importance_from_data` made of them. Nothing
    for a net whose output is no tensor of floats, or has no derivative.
    """
    slopes, biases = _slopes(model, data)
    rough: dict[str, float] = {}
    for name, module in weight_layers(model).items():
        cost = importance.get(f"{name}.weight")
        if cost is None or name not in slopes:
            continue
        rows = as_rows(module.get_parameter("weight").detach().float().cpu().numpy())
        if isinstance(cost, Moments):
            each = [_cancelled(h, upper) for h, upper in zip(cost.second, cost.factors, strict=True)]
            spent = np.repeat(each, len(rows) // len(each))
        else:
            spent = as_rows(cost).sum(1, dtype=np.float64)
        rough[f"{name}.weight"] = float((slopes[name] * spent * np.square(rows, dtype=np.float64).mean(1)).sum())
    weights = {name: value for name, value in rough.items() if 0 < value < np.inf}
    return _relative(weights, {name: value for name, value in biases.items() if 0 < value < np.inf})


def _cancelled(second: np.ndarray, upper: np.ndarray) -> float:
    """What an error of variance 1 in each position of a row adds to the output's, where they cancel."""
    return float(np.diagonal(second).mean() * np.sum(1 / np.square(np.diagonal(upper), dtype=np.float64)))


def _slopes(model: torch.nn.Module, data: Sequence[torch.Tensor]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Of the derivative of the log likelihood, means over examples: (out,) of its square by each output of each layer,
    and that by each value of its bias, times the value, squared and summed.
    """
    import torch

    layers = weight_layers(model)
    sums: dict[str, torch.Tensor] = {}
    biases: dict[str, float] = {}
    outs: list[tuple[str, torch.Tensor]] = []
    draw = torch.Generator().manual_seed(0)

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def after(_: torch.nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
            own = out if out.requires_grad else out.requires_grad_()  # of a net whose parameters are frozen
            outs.append((name, own))
            return own.clone()  # what follows may change it in place

        return module.register_forward_hook(after)

    x = torch.cat([batch for batch in data if batch.shape[1:] == data[0].shape[1:]]) if data else torch.empty(0)
    x = x[spread(len(x), min(_EXAMPLES, max(_LEAST, _VALUES // max(x[:1].numel(), 1))))]
    device = next((parameter.device for parameter in model.parameters()), None)
    handles = [watch(name, module) for name, module in layers.items()]
    try:
        with eval_mode(model), torch.enable_grad():
            for batch in x.split(_BATCH) if len(x) else ():
                outs.clear()
                likelihood = _likelihood(model(batch.to(device)), draw)
                if likelihood is None or not outs:
                    return {}, {}
                slopes = torch.autograd.grad(likelihood, [out for _, out in outs], allow_unused=True)
                for (name, _), slope in zip(outs, slopes, strict=True):
                    if slope is None:
                        continue
                    each = _by_output(layers[name], slope)
                    found = each.square().sum((0, 1))
                    sums[name] = sums[name] + found if name in sums else found
                    bias = getattr(layers[name], "bias", None)
                    if bias is not None:
                        moved = each.sum(1) * bias.detach()
                        biases[f"{name}.bias"] = biases.get(f"{name}.bias", 0.0) + float(moved.square().sum())
    finally:
        for handle in handles:
            handle.remove()
    slopes = {name: (total / len(x)).cpu().numpy() for name, total in sums.items()}
    return slopes, {name: total / len(x) for name, total in biases.items()}


def _by_output(module: torch.nn.Module, slope: torch.Tensor) -> torch.Tensor:
    """(examples, places, out) of an output of any layer."""
    spatial = module.get_parameter("weight").dim() - 2
    last = slope.movedim(-1 - spatial, -1) if spatial > 0 else slope
    return last.double().reshape(len(last), -1, last.shape[-1])


def _likelihood(out: object, draw: torch.Generator) -> torch.Tensor | None:
    """Log likelihood of labels drawn from logits (n, classes), or of any other output under noise of variance 1."""
    import torch

    if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not out.requires_grad:
        return None
    if out.dim() == 2 and out.shape[1] > 1:
        logs = torch.log_softmax(out.float(), 1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=draw).to(out.device)
        return logs.gather(1, labels).sum()
    return (out.float() * torch.randn(out.shape, generator=draw).to(out.device)).sum()


def _relative(rough: Mapping[str, float], others: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
    """Square roots over the geometric mean of those of `rough`, and not farther from it than a factor of 8."""
    if not rough:
        return {}
    mean = float(np.mean(np.log(list(rough.values()))))
    roots = {name: float(np.exp((np.log(value) - mean) / 2)) for name, value in (*rough.items(), *others.items())}
    return {name: min(max(value, 1 / _RANGE), _RANGE) for name, value in roots.items()}
