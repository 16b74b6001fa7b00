"""Calibration: how much the error of each weight matters, from a few unlabelled batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from codeword.data import Dataset
from codeword.errors import DataError, PlanError
from codeword.evaluate import eval_mode
from codeword.execute import Cost, Importance
from codeword.math.moments import Moments
from codeword.sources import TensorInfo

if TYPE_CHECKING:
    import torch

_BATCH = 256
_MOST_EXAMPLES = 1024
_WIDEST = 4608  # inputs of a weight: 512 kernels of 3 x 3; their moments take 85 MB
_PLACES = 64  # of an image or a sequence that inputs are taken from

# Name of a layer, the layer, its input.
Visit = Callable[[str, "torch.nn.Module", "torch.Tensor"], None]


def importance_from_data(model: torch.nn.Module, data: Iterable[Any] | Dataset) -> dict[str, Cost]:
    """Second moments of the inputs that weights of linear and convolution layers multiply, by the weights' names.

    The squared error of an output is e H e, for e the error of the row of weights that makes it and H = E[x x^T]: what
    lets errors cancel (Frantar et al. 2022). Where H would be wider than 4,608, or of a convolution in 3 dimensions,
    its diagonal alone: with independent inputs E[x**2] is what a squared error costs (LeCun et al. 1990).
    data: a Dataset, or batches of inputs (a batch may be a tuple whose first item is the input; labels are not used).
    Layers that only zeros reach are left out, for other data may wake them. Raises DataError if there is no
    batch, the model does not take one, or none reaches a layer.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    places = torch.Generator().manual_seed(0)
    batches = 0

    def add(name: str, module: torch.nn.Module, x: torch.Tensor) -> None:
        total, count = _second(module, x.detach(), places) if is_narrow(module) else _squares(module, x.detach())
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + count

    layers = weight_layers(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    with watching(layers, add), eval_mode(model), torch.inference_mode():
        for batch in batches_of(data):
            run_on(model, batch.to(device), f"batch {batches}")
            batches += 1
    if not sums:
        raise DataError(f"calibration: {batches} batches reached none of {len(layers)} linear and convolution layers")
    found: dict[str, Cost] = {}
    for name, total in sums.items():
        mean = (total / max(counts[name], 1)).cpu().numpy().astype(np.float32)
        if not mean.any():
            continue  # nothing came through: no weight of it matters to these data, and others may wake it
        if is_narrow(layers[name]):
            found[f"{name}.weight"] = Moments(mean, counts[name])
            continue
        floor = 1e-3 * float(mean.mean())
        shape = tuple(layers[name].get_parameter("weight").shape)
        found[f"{name}.weight"] = np.broadcast_to(np.maximum(mean, floor), shape).copy()
    return found


def examples(data: Iterable[Any] | Dataset) -> list[torch.Tensor]:
    """Batches of up to 1,024 examples in all: evenly from a Dataset, which may be in order, or the first that come."""
    import torch

    if isinstance(data, Dataset):
        return list(torch.from_numpy(np.ascontiguousarray(data.x[spread(len(data))])).split(_BATCH))
    found: list[torch.Tensor] = []
    left = _MOST_EXAMPLES
    for batch in batches_of(data):
        found.append(batch[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    return found


def spread(n: int, most: int = _MOST_EXAMPLES) -> np.ndarray:
    """Evenly spaced places in n, up to `most` of them."""
    return np.arange(min(n, most)) * n // max(min(n, most), 1)


def run_on(model: torch.nn.Module, x: torch.Tensor, what: str) -> None:
    """Runs a net on x, for what its hooks see. Raises DataError, naming x as `what`, if the net does not take it."""
    try:
        model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"calibration: {type(model).__name__} does not take {what} of shape {tuple(x.shape)}, {x.dtype}: {said}"
        ) from error


def check_importance(importance: Importance, infos: Iterable[TensorInfo]) -> Importance:
    """The importance, checked against the tensors it is for. Raises PlanError naming the tensor and both values."""
    known = {info.name: info for info in infos}
    for name, cost in importance.items():
        if name not in known:
            raise PlanError(f"importance: there is no tensor {name!r}; leave it out")
        shape = known[name].shape
        if isinstance(cost, Moments):
            h = cost.second
            rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
            if h.ndim != 3 or h.shape[1:] != (columns, columns) or not len(h) or rows % len(h):
                raise PlanError(
                    f"moments of {name!r} have shape {h.shape}, the tensor {shape}; expected (groups, {columns}, "
                    f"{columns}), groups a divisor of {rows}"
                )
            signs = np.einsum("gii->gi", h)
        else:
            h = signs = cost
            if h.shape != shape:
                raise PlanError(f"importance of {name!r} has shape {h.shape}, the tensor {shape}")
        for values, wrong in ((h, ~np.isfinite(h)), (signs, ~(signs >= 0))):
            if wrong.any():
                place = np.unravel_index(int(np.argmax(wrong)), values.shape)
                where = [int(i) for i in place]
                raise PlanError(f"importance of {name!r} is {values[place]} at {where}; it must be finite, >= 0")
        if h.size and not h.any():
            raise PlanError(f"importance of {name!r} is zero everywhere; leave it out to weigh all alike")
    return importance


def weight_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear and convolution layers of a net whose weight is a parameter of their own, by name."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and "weight" in dict(module.named_parameters(recurse=False))
    }


@contextmanager
def watching(layers: Mapping[str, torch.nn.Module], visit: Visit) -> Iterator[None]:
    """Inside, visit(name, layer, its input) is called each time one of the layers is about to run."""

    def watch(name: str, module: torch.nn.Module) -> Any:  # noqa: ANN401 - a hook handle
        return module.register_forward_pre_hook(lambda _, inputs: visit(name, module, inputs[0]))

    handles = [watch(name, module) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_narrow(module: torch.nn.Module) -> bool:
    """Whether the moments of a layer's input are measured whole."""
    from torch import nn

    weight = module.get_parameter("weight")
    return not isinstance(module, nn.Conv3d) and weight[0].numel() <= _WIDEST


def multiplied(module: torch.nn.Module, x: torch.Tensor, places: torch.Generator) -> torch.Tensor:
    """(g, n, c) float32: what the rows (r, c) of a layer's weight multiply, r / g of them each.

    x: an input of the layer, linear or a convolution in one or two dimensions, of which 64 places of each image or
    sequence are taken; places: draws which.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    if isinstance(module, nn.Linear):
        steps = x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
        chosen = torch.randperm(steps.shape[1], generator=places)[:_PLACES].to(x.device)
        return steps[:, chosen].reshape(1, -1, x.shape[-1]).float()
    conv: nn.Conv1d | nn.Conv2d = module  # type: ignore[assignment]
    spatial = len(conv.kernel_size)
    x = x.float() if x.dim() == spatial + 2 else x.float()[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    ways = list(zip(x.shape[2:], x.stride()[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True))
    sizes = [(length - dilation * (width - 1) - 1) // stride + 1 for length, _, width, stride, dilation in ways]
    strides = [step * stride for _, step, _, stride, _ in ways] + [step * dilation for _, step, _, _, dilation in ways]
    patches = x.as_strided((*x.shape[:2], *sizes, *conv.kernel_size), (*x.stride()[:2], *strides))
    chosen = torch.randperm(math.prod(sizes), generator=places)[:_PLACES]
    some = patches[(slice(None), slice(None), *torch.unravel_index(chosen.to(x.device), tuple(sizes)))]
    grouped = some.reshape(len(x), conv.groups, -1, *some.shape[2:])  # (n, g, in / g, places, *kernel)
    return grouped.transpose(2, 3).transpose(0, 1).reshape(conv.groups, len(x) * len(chosen), -1)


def _second(module: torch.nn.Module, x: torch.Tensor, places: torch.Generator) -> tuple[torch.Tensor, int]:
    """(sum of x x^T, how many were added): (g, c, c) for weights (out, c)."""
    vectors = multiplied(module, x, places)
    return vectors.transpose(1, 2) @ vectors, vectors.shape[1]


def _squares(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum of input**2, how many were added), shaped to broadcast against the weight (out, in / groups, *kernel)."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return x.double().square().reshape(-1, x.shape[-1]).sum(0), x.numel() // max(x.shape[-1], 1)
    spatial = module.get_parameter("weight").dim() - 2
    dims = [dim for dim in range(x.dim()) if dim != x.dim() - spatial - 1]
    channels = x.double().square().sum(dims)  # padding and stride ignored: they touch few positions
    groups: int = module.groups  # type: ignore[assignment]
    out = module.get_parameter("weight").shape[0]
    per_group = channels.reshape(groups, -1).repeat_interleave(out // groups, 0)
    return per_group.reshape(out, -1, *[1] * spatial), x.numel() // max(len(channels), 1)


def batches_of(data: Iterable[Any] | Dataset) -> Iterable[torch.Tensor]:
    """The inputs of a Dataset, or of batches of one's own. Raises DataError for a batch that is no array."""
    import torch

    if isinstance(data, Dataset):
        for at in range(0, len(data), _BATCH):
            yield torch.from_numpy(np.ascontiguousarray(data.x[at : at + _BATCH]))
        return
    for batch in data:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        try:
            yield torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"calibration: a batch must be a tensor or array, got {type(x).__name__}") from error
