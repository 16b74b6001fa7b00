"""Layers that hold their weight as an expression and decode it in `forward`: between calls there is no dense weight.

    CodedModule.take(layer, expr)      nn.Linear -> CodedLinear, nn.Conv1d/2d/3d -> CodedConv, nn.Embedding -> ...

Plain torch.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from codeword.errors import MismatchError
from codeword.nn.twin import TorchExpr


class CodedModule(nn.Module):
    """Base of layers whose weight is an expression: `expr` is the TorchExpr, which tied layers share."""

    expr: TorchExpr
    bias: Tensor | None
    _like: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight, decoded anew at each access, in the dtype the model was moved to; differentiable."""
        return self.expr().to(self._like.dtype)

    @staticmethod
    def take(layer: nn.Module, expr: TorchExpr) -> CodedModule:
        """Turn `layer` itself into its coded counterpart, its dense weight dropped; returns it.

        Everything else stays: settings, bias, hooks, mode, dtype, and every reference to it in the model.
        Raises MismatchError if the layer's type has no coded form or the shapes differ; nothing is changed then.
        """
        form = coded_form(layer)
        if form is None:
            raise MismatchError(f"a {type(layer).__name__} has no coded form; load the decoded weight into it")
        weight: Any = layer.weight
        if tuple(weight.shape) != expr.shape:
            raise MismatchError(f"the layer's weight is {tuple(weight.shape)}, the expression {expr.shape}")
        del layer.weight
        # As torch's own parametrizations do it: a new object would lose hooks and be unknown to who holds the old one.
        layer.__class__ = form
        coded = cast(CodedModule, layer)
        coded.expr = expr.to(weight.device)
        # Empty, but it follows .to(): the dtype that decoded weights are cast to.
        coded.register_buffer("_like", weight.detach().new_empty(0), persistent=False)
        return coded


class CodedLinear(CodedModule):
    """nn.Linear from an expression of shape (out_features, in_features)."""

    in_features: int
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class CodedConv(CodedModule):
    """nn.Conv1d, Conv2d or Conv3d from an expression of shape (out_channels, in_channels / groups, *kernel_size)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        """([n,] in_channels, *size) -> ([n,] out_channels, *size)."""
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        padding = self.padding
        if self.padding_mode != "zeros":  # convolutions pad with zeros only
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return convolve(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode}"
        )


class CodedEmbedding(CodedModule):
    """nn.Embedding from an expression of shape (num_embeddings, embedding_dim).

    `max_norm` acts on the decoded rows and leaves the expression alone; `sparse` is ignored, as the gradient of a
    shared codeword is dense.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        """(...) integers -> (..., embedding_dim)."""
        weight = self.weight
        if self.max_norm is not None:
            weight = weight.clone()  # it is written into, and may be a leaf's own memory
        return F.embedding(
            input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, sparse=False
        )

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


# Types by name, not by isinstance: a subclass may compute something else with its weight.
_FORMS: dict[type[nn.Module], type[CodedModule]] = {
    nn.Linear: CodedLinear,
    NonDynamicallyQuantizableLinear: CodedLinear,  # nn.MultiheadAttention's out_proj: a Linear by another name
    nn.Conv1d: CodedConv,
    nn.Conv2d: CodedConv,
    nn.Conv3d: CodedConv,
    nn.Embedding: CodedEmbedding,
}


def coded_form(layer: nn.Module) -> type[CodedModule] | None:
    """The coded counterpart of a layer, None if its type has none."""
    return _FORMS.get(type(layer))
