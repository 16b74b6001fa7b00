"""What all zoo models share: they take images in [0, 1] and normalise them themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """A model that normalises its input: (x - mean) / std, a mean and a std for each channel.

    Both are buffers that the state dict leaves out, so that a checkpoint holds the net's own tensors only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """x (n, c, h, w) in [0, 1], normalised; ValueError if c is not this model's (it would broadcast in silence)."""
        channels = self.mean.shape[1]
        # A trace would record the comparison as a constant, and warn.
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if not tracing and (x.ndim != 4 or x.shape[1] != channels):
            raise ValueError(f"{type(self).__name__} takes images (n, {channels}, h, w), got {tuple(x.shape)}")
        return (x - self.mean) / self.std
