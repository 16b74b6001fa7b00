"""Calibration: how much the error of each weight matters, from a few unlabelled batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from codeword.data import Dataset
from codeword.errors import DataError, PlanError
from codeword.evaluate import eval_mode
from codeword.sources import TensorInfo

if TYPE_CHECKING:
    import torch

_BATCH = 256


def importance_from_data(model: torch.nn.Module, data: Iterable[Any] | Dataset) -> dict[str, np.ndarray]:
    """Second moment of the input each weight multiplies, for the weights of linear and convolution layers.

    With independent inputs the output error of a layer is the sum of input**2 * error**2 over its weights, so
    E[input**2] is what a squared error of the weight costs (the diagonal of the layer's Hessian; LeCun et al. 1990).
    data: a Dataset, or batches of inputs (a batch may be a tuple whose first item is the input; labels are not used).
    Weights that see only zeros keep a small floor, because other data may wake them. Raises DataError if there is no
    batch, the model does not take one, or none reaches a layer.
    """
    import torch
    from torch import nn

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    batches = 0

    def watch(name: str, module: nn.Module) -> Any:  # noqa: ANN401 - a hook handle
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            total, count = _input_moment(module, inputs[0].detach())
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + count

        return module.register_forward_pre_hook(hook)

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *_convs())) and "weight" in dict(module.named_parameters(recurse=False))
    }
    handles = [watch(name, module) for name, module in layers.items()]
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with eval_mode(model), torch.inference_mode():
            for batch in _batches(data):
                try:
                    model(batch.to(device))
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    raise DataError(
                        f"calibration: {type(model).__name__} does not take batch {batches} of shape "
                        f"{tuple(batch.shape)}, {batch.dtype}: {said}"
                    ) from error
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise DataError(f"calibration: {batches} batches reached none of {len(layers)} linear and convolution layers")
    found = {}
    for name, total in sums.items():
        per_input = (total / max(counts[name], 1)).cpu().numpy().astype(np.float32)
        weight = layers[name].get_parameter("weight")
        floor = 1e-3 * float(per_input.mean()) or 1.0
        found[f"{name}.weight"] = np.broadcast_to(np.maximum(per_input, floor), tuple(weight.shape)).copy()
    return found


def check_importance(importance: dict[str, np.ndarray], infos: Iterable[TensorInfo]) -> dict[str, np.ndarray]:
    """The importance, checked against the tensors it is for. Raises PlanError naming the tensor and both values."""
    known = {info.name: info for info in infos}
    for name, h in importance.items():
        if name not in known:
            raise PlanError(f"importance: there is no tensor {name!r}; leave it out")
        if h.shape != known[name].shape:
            raise PlanError(f"importance of {name!r} has shape {h.shape}, the tensor {known[name].shape}")
        wrong = ~(np.isfinite(h) & (h >= 0))
        if wrong.any():
            place = np.unravel_index(int(np.argmax(wrong)), h.shape)
            where = [int(i) for i in place]
            raise PlanError(f"importance of {name!r} is {h[place]} at {where}; it must be finite, >= 0")
        if h.size and not h.any():
            raise PlanError(f"importance of {name!r} is zero everywhere; leave it out to weigh all alike")
    return importance


def _convs() -> tuple[type, ...]:
    from torch import nn

    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _input_moment(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
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


def _batches(data: Iterable[Any] | Dataset) -> Iterable[torch.Tensor]:
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
