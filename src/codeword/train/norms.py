"""The running statistics of batch norms, measured anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from codeword.train.batches import Batch
from codeword.train.scoring import BatchLoss

_BATCHES = 200  # that they are measured on


@torch.no_grad()
def reestimate(net: nn.Module, modules: Iterable[nn.Module], batches: Iterable[Batch], loss: BatchLoss) -> None:
    """Set them, for the batch norms among these modules of a net, to their plain means over batches.

    The rest of the net is in eval mode meanwhile; all of it is afterwards but for these norms.
    """
    norms = [
        module
        for module in modules
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with loss.autocast():
            for batch in itertools.islice(batches, _BATCHES):
                net(batch.x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
