"""The factored convolution: inputs meet each template once, then a 1x1 convolution mixes what comes out.

A weight whose kernels are a * template + b needs no dense form. With y(c, t) = input channel c convolved with template
t, output o is the sum over c of a(o, c) * y(c, t(o, c)) + b(o, c) * (channel c under a box of ones). That is one
template convolution for each pair (c, t) that occurs instead of one kernel for each (o, c): fewer multiplications where
outputs are many and templates few, and `pays` says so. That is a count, for hardware that is paid by the
multiplication: in PyTorch on a CPU the dense convolution is several times as fast, for its kernels are tuned and the
mixing here multiplies by the zeros too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codeword.errors import MismatchError
from codeword.expr import Affine, Expr, Lookup, Reshape, shape
from codeword.nn.state import as_tensor


class FactoredConv2d(nn.Module):
    """nn.Conv2d whose weight is an expression of templates (`KernelTemplates`, `ProductQuantization` of whole kernels).

    templates (k, d), gains (out, blocks) or None for all 1, offsets (out, blocks) or None for all 0 are parameters,
    in float32. A block is one input channel under kernels of d entries, or d channels under kernels of one.
    """

    templates: nn.Parameter
    gains: nn.Parameter | None
    offsets: nn.Parameter | None
    pair_of: Tensor  # (out, blocks) the pair that each output reads of each block
    pair_block: Tensor  # (pairs,) input block
    pair_template: Tensor  # (pairs,)
    offset_block: Tensor  # (out, blocks) input block

    def __init__(self, layer: nn.Conv2d, expr: Expr) -> None:
        """From a layer, for its settings and bias (shared, not copied), and the expression of its weight.

        Raises MismatchError if the shapes differ or the expression has no factored form.
        """
        super().__init__()
        if shape(expr) != tuple(layer.weight.shape):
            raise MismatchError(f"the layer's weight is {tuple(layer.weight.shape)}, the expression {shape(expr)}")
        lookup, gains, offsets = _parts(expr)
        out, per_group, *kernel = layer.weight.shape
        k, d = lookup.codebook.shape[1:]
        area = math.prod(kernel)
        codes = lookup.codes.reshape(out, -1).astype(np.int64)
        if lookup.codes.shape[0] != 1 or d % area or per_group % (d // area) or codes.shape[1] * d != per_group * area:
            raise MismatchError(f"vectors of {d} over kernels of {area} and {per_group} channels have no factored form")
        self.settings = (layer.stride, layer.padding, layer.dilation)
        self.padding_mode, self.padded = layer.padding_mode, layer._reversed_padding_repeated_twice
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, out, (kernel[0], kernel[1])
        self.channels = d // area  # input channels of a block
        # Outputs of group g see the blocks of that group only.
        blocks = codes.shape[1]
        first = np.arange(out)[:, None] // (out // layer.groups) * blocks
        pairs, index = np.unique((first + np.arange(blocks)) * k + codes, return_inverse=True)
        templates = lookup.codebook[0].astype(np.float32)
        if gains is not None:  # templates of norm 1: what trains together should be of one size
            norms = np.linalg.norm(templates, axis=1, keepdims=True)
            norms[norms == 0] = 1
            templates, gains = templates / norms, gains * norms[codes]
        self.templates = nn.Parameter(as_tensor(templates))
        for name, values in (("gains", gains), ("offsets", offsets)):
            full = None if values is None else np.broadcast_to(values[..., 0], (out, blocks)).copy()
            self.register_parameter(name, None if full is None else nn.Parameter(as_tensor(full)))
        self.register_buffer("pair_of", torch.from_numpy(index.reshape(out, blocks)))
        self.register_buffer("pair_block", torch.from_numpy(pairs // k))
        self.register_buffer("pair_template", torch.from_numpy(pairs % k))
        self.register_buffer("offset_block", torch.from_numpy(first + np.arange(blocks)))
        self.bias = layer.bias
        self.to(layer.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """([n,] in_channels, height, width) -> ([n,] out_channels, height', width')."""
        stride, padding, dilation = self.settings
        batched = input if input.dim() == 4 else input[None]
        if self.padding_mode != "zeros":  # convolutions pad with zeros only
            batched, padding = F.pad(batched, self.padded, mode=self.padding_mode), 0
        blocks = batched.unflatten(1, (-1, self.channels))

        def convolve(some: Tensor, kernels: Tensor) -> Tensor:
            """Blocks (n, m, channels, h, w), each under a kernel of its own (m, d), to (n, m, h', w')."""
            weight = kernels.reshape(-1, self.channels, *self.kernel_size)
            return F.conv2d(some.flatten(1, 2), weight, None, stride, padding, dilation, groups=len(weight))

        found = convolve(blocks.index_select(1, self.pair_block), self.templates.index_select(0, self.pair_template))
        gains = torch.ones_like(self.pair_of, dtype=found.dtype) if self.gains is None else self.gains
        total = F.conv2d(found, self._mixing(gains, self.pair_of, len(self.pair_block)), self.bias)
        if self.offsets is not None:
            count = blocks.shape[1]
            sums = convolve(blocks, self.templates.new_ones(count, self.templates.shape[1]))
            total = total + F.conv2d(sums, self._mixing(self.offsets, self.offset_block, count))
        return total if input.dim() == 4 else total[0]

    @staticmethod
    def _mixing(values: Tensor, index: Tensor, count: int) -> Tensor:
        """(out, count, 1, 1): values (out, blocks) at their places of a 1x1 convolution, 0 elsewhere."""
        return values.new_zeros(len(values), count).scatter(1, index, values)[:, :, None, None]

    def multiplications(self, input_shape: tuple[int, ...]) -> int:
        """Multiplications that the factored form needs for an input: those of zeros in the mixing are not counted."""
        return self._positions(input_shape) * self._factored

    def dense_multiplications(self, input_shape: tuple[int, ...]) -> int:
        """Multiplications of the dense convolution for an input."""
        return self._positions(input_shape) * self._dense

    @property
    def pays(self) -> bool:
        """Whether the factored form needs fewer multiplications than the dense one."""
        return self._factored < self._dense

    @property
    def _factored(self) -> int:
        mixed = sum(0 if values is None else values.numel() for values in (self.gains, self.offsets))
        return len(self.pair_block) * self.templates.shape[1] + mixed

    @property
    def _dense(self) -> int:
        return self.pair_of.numel() * self.templates.shape[1]

    def _positions(self, input_shape: tuple[int, ...]) -> int:
        """Pixels of an output map times images."""
        stride, padding, dilation = self.settings
        blank = torch.empty(input_shape, device="meta")
        weight = torch.empty(1, self.in_channels, *self.kernel_size, device="meta")
        if self.padding_mode != "zeros":
            blank, padding = F.pad(blank, self.padded), 0
        return F.conv2d(blank, weight, None, stride, padding, dilation).numel()

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        stride, padding, dilation = self.settings
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={stride}, "
            f"padding={padding}, dilation={dilation}, templates={len(self.templates)}, pairs={len(self.pair_block)}"
        )


def _parts(expr: Expr) -> tuple[Lookup, np.ndarray | None, np.ndarray | None]:
    """(lookup, gains, offsets), the latter of shape (out or 1, blocks or 1, 1) float32, of Affines over a Lookup."""
    match expr:
        case Lookup():
            return expr, None, None
        case Reshape(Lookup() | Affine() as inner):
            return _parts(inner)
        case Affine(Lookup() | Affine() as inner, scale, offset) if all(
            array is None or (array.ndim == 3 and array.shape[2] == 1) for array in (scale, offset)
        ):
            lookup, gains, offsets = _parts(inner)
            if scale is not None:
                wide: Any = scale.astype(np.float32)
                gains = wide if gains is None else gains * wide
                offsets = None if offsets is None else offsets * wide
            if offset is not None:
                offsets = offset.astype(np.float32) + (0 if offsets is None else offsets)
            return lookup, gains, offsets
        case _:
            raise MismatchError(f"no factored form for {type(expr).__name__} here: only for Affines over one Lookup")
