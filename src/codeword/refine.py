"""A second look at a compressed net, layer by layer, for the inputs that its layers have by then.

The net and its compressed form run side by side on the same examples. Where the second reaches a layer, that layer's
weights are compressed anew: for the inputs x' that reach it there, and so that outputs come near those of the first
net, whose inputs are x. The weights W' of least E|W x - W' x'|**2 are W E[x x'^T] E[x' x'^T]^-1 (Li et al. 2025, GPTAQ)
and their codes are found as ever, with errors that cancel under E[x' x'^T].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from codeword.artifact import Artifact, CodedTensor, Writer, code_tensor, tied_tensor
from codeword.calibrate import Visit, is_narrow, multiplied, run_on, watching, weight_layers
from codeword.errors import DataError
from codeword.evaluate import eval_mode
from codeword.execute import express, tensor_seed
from codeword.expr import decode
from codeword.math.moments import Moments
from codeword.methods import Method
from codeword.methods.base import MomentsMethod
from codeword.steer import Steering

if TYPE_CHECKING:
    import torch
    from torch import nn

_MOST_ACTIVATIONS = 1 << 28  # values of the widest layer's input, all examples together: 1 GB
_PATIENCE = 0.1  # seconds between looks at whether the other net has failed


def refined(
    artifact: Artifact,
    methods: Mapping[str, Method],
    seed: int = 0,
    *,
    model: nn.Module,
    data: Sequence[torch.Tensor],
    steering: Steering | None = None,
) -> Artifact:
    """The artifact with the weights of linear and convolution layers compressed anew by their methods, in order.

    artifact: of the model, by these methods. data: batches; those of the first one's shape are used, and fewer where
    activations are large, for those of all examples must be held at once. Weights whose methods make no use of moments,
    and layers that the two nets do not reach in the same order, stay as they are. steering: chooses methods instead,
    as layers are reached. The model is not changed.
    Raises DataError if there is no example or the model does not take them, MismatchError if the artifact is of
    another model.
    """
    from codeword.nn import load_into

    coded = copy.deepcopy(model)
    load_into(coded, artifact)
    names = {f"{name}.weight" for name, module in weight_layers(model).items() if is_narrow(module)}
    wanted = {
        name for name in names & artifact.entries.keys() & methods.keys() if isinstance(methods[name], MomentsMethod)
    }
    found: dict[str, CodedTensor] = {}

    def compress(name: str, module: nn.Module, theirs: torch.Tensor, own: torch.Tensor) -> None:
        import torch

        weight = module.get_parameter("weight")
        dense = model.get_parameter(name).detach()
        moments, target = _moments_and_target(dense, theirs, own)
        if moments is None:
            return
        method = methods[name] if steering is None else steering.choose(name)
        expr = express(target.cpu().numpy().reshape(weight.shape), method, name, seed, moments)
        entry = artifact.entries[name]
        found[name] = code_tensor(name, entry.dtype, entry.shape, expr)
        if steering is not None:
            steering.made(name, found[name].nbytes)
        weight.copy_(torch.from_numpy(np.ascontiguousarray(decode(expr).astype(np.float32))))

    _side_by_side(model, coded, wanted, _examples(model, data), compress)
    return _with(artifact, found)


def _moments_and_target(
    weight: torch.Tensor, theirs: torch.Tensor, own: torch.Tensor
) -> tuple[Moments | None, torch.Tensor]:
    """(moments of a layer's inputs, weights (g, r / g, c) of least error at its output for them), None if all are 0.

    weight (r, ...); theirs and own (g, n, c): inputs in the first net and in the second.
    """
    import torch

    groups, n, columns = own.shape
    second = (own.transpose(1, 2) @ own).double() / n
    rows = weight.reshape(groups, -1, columns)
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    if not bool((mean > 0).all()):
        return None, rows
    change = ((theirs - own).transpose(1, 2) @ own).double() / n
    moments = Moments(second.float().cpu().numpy(), n)
    unit = torch.eye(columns, dtype=second.dtype, device=second.device)
    damped = second + (moments.damping * mean)[:, None, None] * unit
    shift = torch.linalg.solve(damped, change, left=False)
    return moments, (rows.double() + rows.double() @ shift).float()


def _side_by_side(
    first: nn.Module,
    second: nn.Module,
    wanted: set[str],
    x: torch.Tensor,
    meet: Callable[[str, nn.Module, torch.Tensor, torch.Tensor], None],
) -> None:
    """Runs both nets on x and calls meet(weight's name, layer of the second, inputs (g, n, c) of both) at each layer.

    Each layer once; only as long as both reach the same layers in the same order.
    """
    feed: Queue[tuple[str, torch.Tensor] | None] = Queue(maxsize=1)
    over = Event()  # the second net takes no more

    def offer(item: tuple[str, torch.Tensor] | None) -> None:
        while not over.is_set():
            try:
                feed.put(item, timeout=_PATIENCE)
            except Full:
                continue
            break

    def give(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        offer((name, _inputs(name, module, inputs)))

    def take(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        if over.is_set():
            return
        found = feed.get()
        if found is None or found[0] != name:
            over.set()
            return
        meet(name, module, found[1], _inputs(name, module, inputs))

    def lead() -> None:
        try:
            _walk(first, wanted, x, give)
        finally:
            offer(None)

    with ThreadPoolExecutor(1) as pool:
        leading = pool.submit(lead)
        try:
            _walk(second, wanted, x, take)
        finally:
            over.set()
        leading.result()


def _inputs(name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(g, n, c) of one layer: both nets are looked at in the same places."""
    import torch

    seed = int(tensor_seed(0, name).integers(1 << 62))
    return multiplied(module, x, torch.Generator().manual_seed(seed))


def _walk(model: nn.Module, wanted: set[str], x: torch.Tensor, visit: Visit) -> None:
    """Runs a net on x in eval mode, visiting each layer of a wanted weight when it is reached first."""
    import torch

    seen: set[str] = set()

    def first(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        if name not in seen:
            seen.add(name)
            visit(name, module, inputs)

    layers = {f"{name}.weight": module for name, module in weight_layers(model).items()}
    layers = {name: module for name, module in layers.items() if name in wanted}
    with watching(layers, first), eval_mode(model), torch.no_grad():
        run_on(model, x, f"{len(x)} examples")


def _examples(model: nn.Module, data: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inputs on the model's device, as many as are used. Raises DataError if there is none."""
    import torch

    device = next((parameter.device for parameter in model.parameters()), None)
    parts = [batch for batch in data if batch.shape[1:] == data[0].shape[1:]]
    if not sum(map(len, parts)):
        raise DataError("calibration: no example came from the data; give at least one")
    x, most = torch.cat(parts).to(device), 1

    def watch(_: str, __: nn.Module, inputs: torch.Tensor) -> None:
        nonlocal most
        most = max(most, inputs.numel())

    _walk(model, {f"{name}.weight" for name in weight_layers(model)}, x[:1], watch)
    return x[: max(1, _MOST_ACTIVATIONS // most)]


def _with(artifact: Artifact, coded: Mapping[str, CodedTensor]) -> Artifact:
    """The artifact with some tensors coded otherwise."""
    writer, index = Writer(), dict[str, int]()
    for entry in artifact.entries.values():
        if entry.tied_to is not None:
            writer.add(tied_tensor(entry.name, entry.dtype, entry.shape, index[entry.tied_to]))
            continue
        same = coded.get(entry.name) or code_tensor(entry.name, entry.dtype, entry.shape, artifact[entry.name])
        index[entry.name] = writer.add(same)
    return writer.finish(dict(artifact.metadata))
