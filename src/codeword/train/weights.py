"""The weights worth pruning: those of linear, convolution and embedding layers, each once however many names it has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from codeword.sources import Kind

_KINDS: dict[type[nn.Module], tuple[Kind, tuple[str, ...]]] = {
    nn.Linear: ("linear", ("weight",)),
    nn.Bilinear: ("linear", ("weight",)),
    nn.modules.conv._ConvNd: ("conv", ("weight",)),
    nn.Embedding: ("embedding", ("weight",)),
    nn.EmbeddingBag: ("embedding", ("weight",)),
    nn.MultiheadAttention: ("linear", ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
}


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """A weight in its place: `names` of the parameter, first the one it has in the net's state dict; its layers."""

    names: tuple[str, ...]
    kind: Kind
    owner: nn.Module
    leaf: str

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: looked up, because a net may have been given another one since."""
        return self.owner.get_parameter(self.leaf)


def layer_weights(model: nn.Module) -> tuple[list[LayerWeight], dict[str, str]]:
    """(weights in the order of the model, name of each other parameter -> why it is not among them)."""
    kinds: dict[int, tuple[Kind, nn.Module, str]] = {}
    types: dict[int, str] = {}
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            key = id(parameter)
            parameters[key] = parameter
            names.setdefault(key, []).append(f"{prefix}.{leaf}" if prefix else leaf)
            types.setdefault(key, f"{leaf} of a {type(module).__name__}")
            for cls, (kind, leaves) in _KINDS.items():
                if isinstance(module, cls) and leaf in leaves:
                    kinds.setdefault(key, (kind, module, leaf))
    found, skipped = [], {}
    for key, parameter in parameters.items():
        if key not in kinds or parameter.dim() < 2 or not parameter.is_floating_point():
            skipped |= dict.fromkeys(
                names[key], f"{types[key]}: not the weight of a linear, convolution or embedding layer"
            )
        elif not parameter.requires_grad:
            skipped |= dict.fromkeys(names[key], "frozen: requires_grad is False")
        elif not parameter.numel():
            skipped |= dict.fromkeys(names[key], "holds no values")
        else:
            found.append(LayerWeight(tuple(names[key]), *kinds[key]))
    return found, skipped


def bare(model: nn.Module) -> nn.Module:
    """The net within DistributedDataParallel, DataParallel and torch.compile, which all change its names."""
    wrapped = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    while True:
        if isinstance(model, wrapped):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
