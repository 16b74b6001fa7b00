"""The optimizer, its learning rate over the steps, and the precision to compute in, as `Finetune` says."""

from __future__ import annotations

import math

import torch
from torch import nn

from codeword.finetune import Finetune

_WARM_UP = 0.05  # of all steps, during which the rate rises


def make_optimizer(net: nn.Module, options: Finetune) -> torch.optim.Optimizer:
    """Over all parameters that train; its rate is for `set_rate` to set at each step."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    match options.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, rate, 0.9, weight_decay=decay, nesterov=True)


def set_rate(optimizer: torch.optim.Optimizer, options: Finetune, epoch: int, at: int, steps: int | None) -> float:
    """Set the learning rate of step `at` (from 0) of an epoch (from 1) of `steps` steps, and return it.

    While nobody knows how many steps an epoch has, all of them go at the rate of its middle.
    """
    part = (at + 0.5) / max(steps, at + 1) if steps else 0.5
    done = (epoch - 1 + part) / options.epochs
    rate = options.learning_rate * min(1.0, done / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def computes_in_bf16(options: Finetune, device: torch.device) -> bool:
    """Whether to compute in bfloat16: on a processor without matrix units for it, it is slower than float32."""
    if options.mixed != "auto":
        return options.mixed == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
