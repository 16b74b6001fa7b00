"""Finding out that training has diverged: a loss or a weight that is NaN or infinite, and where it was first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from codeword.train.processes import Process


class NotFiniteError(Exception):
    """Says where the first loss or weight is that is not finite; never leaves the loop, which raises TrainingError."""


class Losses:
    """The losses of an epoch, read a few at a time: each read waits for the accelerator and for other processes."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: list[Tensor] = []
        self._sum = 0.0
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """The loss of this process's part of a batch: one number, times the part's share."""
        self._waiting.append(loss)

    def read(self, epoch: int, at: int) -> None:
        """Raises NotFiniteError for the first loss that is not finite; `at` is the number of the last batch added."""
        if not self._waiting:
            return
        values = (self._process.total(torch.stack(self._waiting).double()) / self._process.count).tolist()
        first = at + 1 - len(values)
        self._waiting.clear()
        for place, value in enumerate(values, first):
            if not math.isfinite(value):
                raise NotFiniteError(f"the loss is {value} in epoch {epoch}, batch {place}")
        self._sum += math.fsum(values)
        self._count += len(values)

    @property
    def mean(self) -> float:
        """Over the batches read so far."""
        return self._sum / max(self._count, 1)


def check_weights(net: nn.Module, where: str) -> None:
    """Raises NotFiniteError if a parameter that trains holds NaN or infinity."""
    for name, value in net.named_parameters():
        if value.requires_grad and not bool(torch.isfinite(value.detach()).all()):
            raise NotFiniteError(f"{name!r} holds NaN or infinity after {where}")
