"""What a net costs to keep and to run, dense and pruned: weights, and multiply-accumulates of one example.

print(count(model, example))        a table; what is zero counts as pruned
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codeword.errors import DataError
from codeword.evaluate import eval_mode
from codeword.train.weights import LayerWeight, bare, layer_weights


@dataclass(frozen=True, slots=True)
class Count:
    """One weight tensor: how many weights it has, how many are not pruned, how often each is used for one example.

    uses: multiply-accumulates of one weight, 0 for an embedding, which looks up; None if no example has told.
    """

    name: str
    weights: int
    kept: int
    uses: int | None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of the dense tensor for one example."""
        return None if self.uses is None else self.weights * self.uses

    @property
    def kept_macs(self) -> int | None:
        """Those that are left where pruned weights are skipped."""
        return None if self.uses is None else self.kept * self.uses


@dataclass(frozen=True, slots=True)
class Counts:
    """Every weight tensor of a net that can be pruned; `others`: the values of all its other parameters."""

    tensors: tuple[Count, ...]
    others: int

    @property
    def weights(self) -> int:
        """In all tensors, pruned or not."""
        return sum(it.weights for it in self.tensors)

    @property
    def kept(self) -> int:
        """In all tensors, not pruned."""
        return sum(it.kept for it in self.tensors)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense net for one example, as far as they are known."""
        return sum(it.macs or 0 for it in self.tensors)

    @property
    def kept_macs(self) -> int:
        """Those that are left where pruned weights are skipped."""
        return sum(it.kept_macs or 0 for it in self.tensors)

    @property
    def macs_saved(self) -> float:
        """Share of the multiply-accumulates that pruning saves."""
        return 1 - self.kept_macs / self.macs if self.macs else 0.0

    def __str__(self) -> str:
        rows = [("tensor", "weights", "kept", "", "MACs", "kept", "")]
        for it in self.tensors:
            rows.append((it.name, *_part(it.weights, it.kept), *_part(it.macs, it.kept_macs)))
        rows.append(("total", *_part(self.weights, self.kept), *_part(self.macs or None, self.kept_macs)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join([*lines, f"other parameters, never pruned: {self.others:,}"])


def _part(whole: int | None, kept: int | None) -> tuple[str, str, str]:
    """Both numbers and the share of one in the other; nothing where they are not known."""
    if whole is None or kept is None:
        return "", "", ""
    return f"{whole:,}", f"{kept:,}", f"{100 * kept / whole:.1f} %" if whole else ""


def count(model: nn.Module, example: Tensor | tuple[Any, ...] | None = None) -> Counts:
    """Weights of a net and, with an example input, the multiply-accumulates; what is zero counts as pruned.

    example: what the model takes, a tuple for several arguments; the first axis of the first is the batch. Raises
    DataError if the model does not take it.
    """
    net = bare(model)
    found, _ = layer_weights(net)
    kept = {weight.name: int(weight.parameter.detach().count_nonzero()) for weight in found}
    return tally(net, found, kept, {} if example is None else uses(net, found, example))


def tally(net: nn.Module, weights: Sequence[LayerWeight], kept: Mapping[str, int], used: Mapping[str, int]) -> Counts:
    """The counts of some weights of a net, of which `kept` are not pruned and each is `used` so often."""
    rows = tuple(Count(it.name, it.parameter.numel(), kept[it.name], used.get(it.name)) for it in weights)
    return Counts(rows, sum(p.numel() for p in net.parameters()) - sum(row.weights for row in rows))


def uses(model: nn.Module, weights: Sequence[LayerWeight], example: Tensor | tuple[Any, ...]) -> dict[str, int]:
    """Weight name -> in how many multiply-accumulates each of its weights takes part, for one example.

    Every output position counts alike: padding is not taken off. Of layers that do not run (or run past their own
    forward, as some of nn.MultiheadAttention do) nothing is known, and nothing is said.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].dim() or not len(inputs[0]):
        raise DataError("the example must be a batch of inputs, its first axis the examples, and hold at least one")
    totals: dict[int, int] = {}
    named = {id(weight.parameter): weight.name for weight in weights}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        key = id(module.weight)
        given = args[0] if args else kwargs["input"]
        totals[key] = totals.get(key, 0) + _positions(module, given, output)

    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    handles = [it.register_forward_hook(hook, with_kwargs=True) for it in model.modules() if isinstance(it, layers)]
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with eval_mode(model), torch.no_grad():
            model(*(it.to(device) if isinstance(it, Tensor) else it for it in inputs))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        shape = tuple(inputs[0].shape)
        raise DataError(f"{type(model).__name__} does not take the example of shape {shape}: {said}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {named[key]: total // len(inputs[0]) for key, total in totals.items() if key in named}


def _positions(module: nn.Module, given: Tensor, output: Tensor) -> int:
    """How often a call of a layer has used each of its weights."""
    match module:
        case nn.Linear():
            return output.numel() // max(module.out_features, 1)
        case nn.modules.conv._ConvTransposeNd():
            return given.numel() // module.in_channels
        case nn.modules.conv._ConvNd():
            return output.numel() // module.out_channels
        case _:
            return 0
