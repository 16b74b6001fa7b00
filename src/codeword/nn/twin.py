"""The torch twin of `codeword.expr.decode`: the same bits, and gradients for every float leaf.

    twin = TorchExpr(expr)      twin() is decode(expr), differentiable      twin.to_expr() is an Expr again

Integer leaves (codes, positions, whole-number codebooks) are buffers in the dtype they came in; float leaves
(codebooks, scales, offsets, raw values) are parameters in float32, or float64 if they came so: float16, bfloat16 and
float8 widen exactly. So `twin()` is float32 where `decode` gives a narrower float, with the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from codeword.errors import MismatchError
from codeword.expr import DTYPES, FLOATS, Affine, Expr, Lookup, Permute, Raw, Reshape, Scatter, Sum, decode, dtype_name
from codeword.nn.state import as_tensor, torch_dtype

# torch has few operations for these, not even indexing; moving their bits under a signed name does as well.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_WIDE = ("float32", "float64")


class TorchExpr(nn.Module):
    """An expression whose float leaves can be trained.

    rounded_to: name of the dtype its tensor has in the file. As `Artifact.decode` does, the result is rounded to that
    (its values; it stays float32), and gradients pass the rounding unchanged. Only a narrow float makes a difference.
    Beyond the range of float8_e4m3 `decode` gives NaN, torch the largest value or NaN, as its version has it.

    `.to(dtype)`, `.half()` and the like leave the leaves as they are: Affine and Sum are defined in float32, and codes
    are no numbers to be rounded. Cast what `twin()` returns instead, as the coded modules do.
    Raises ExprError if a code has no codeword or positions do not rise within the size.
    """

    shadow: nn.Parameter | None

    def __init__(self, expr: Expr, *, rounded_to: str | None = None) -> None:
        super().__init__()
        # Decoding once is the check: past it, a code beyond its codebook would take another group's codeword.
        with np.errstate(over="ignore", invalid="ignore"):
            dense = decode(expr)
        self.shape: tuple[int, ...] = dense.shape
        rounds = rounded_to in FLOATS and rounded_to not in (dtype_name(dense.dtype), "float64")
        self.rounded_to = rounded_to if rounds else None
        self.root = _node(expr)
        self.register_parameter("shadow", None)

    def forward(self) -> Tensor:
        """The dense tensor; its memory may be a leaf's own (Raw), so do not write into it."""
        values = self.root()
        if self.rounded_to is not None:
            if not values.is_floating_point():  # whole numbers without an Affine
                values = values.to(torch.float32)
            values = _Round.apply(values, torch_dtype(self.rounded_to))
        return values if self.shadow is None else _Followed.apply(values, self.shadow, self._shadow_share)

    def free(self, path: str, unit: float, share: np.ndarray | None) -> nn.Parameter:
        """Makes a leaf, by its path in the expression, what trains: the parameter is the leaf times unit.

        unit: a power of two, so that nothing is rounded. share: of the leaf's shape, or broadcasting to it, times which
        its gradient reaches the parameter; None for 1 / unit, the gradient itself. Whole numbers may train too: they
        become a parameter in float32, for whoever holds it to keep whole.
        """
        node, name = self.owner(path)
        return node.free(name, unit, share)

    def owner(self, path: str) -> tuple[_Node, str]:
        """(module, name) that hold the leaf of a path."""
        inner, _, name = path.rpartition(".")
        node = self.root.get_submodule(inner.replace("[", ".").replace("]", ""))
        if not isinstance(node, _Node):
            raise MismatchError(f"the expression has no leaf {path!r}")
        return node, name

    def follow(self, unit: float = 1.0, pace: float = 1.0) -> None:
        """Gives the twin a shadow: a dense float32 parameter that takes the gradient of the whole tensor.

        It is how far each weight would be from what `twin()` returns if it shared nothing, and has no part in that; it
        begins at 0. unit: of the steps of an optimizer whose steps are of one length, over those of the shadow. pace:
        by which both those and steps along the gradient are shortened.
        """
        self._shadow_unit, self._shadow_share = unit / pace, unit
        self.shadow = nn.Parameter(torch.zeros(self.shape))

    @property
    def wanted(self) -> Tensor:
        """Where each weight would be if it shared nothing."""
        values = self().detach().to(torch.float32)
        return values if self.shadow is None else values + self.shadow.detach() / self._shadow_unit

    @torch.no_grad()
    def want(self, target: Tensor) -> None:
        """Sets the shadow, for the values as they are now."""
        if self.shadow is not None:
            self.shadow.copy_((target.to(self.shadow) - self()) * self._shadow_unit)

    def to_expr(self) -> Expr:
        """The expression as it is now; it decodes to the bits of `twin()` before rounding to the tensor's dtype.

        A float leaf returns in the dtype it came in if that still holds its values exactly, as it does untrained, and
        else in float32: narrowing trained values is for the caller to decide.
        """
        return self.root.to_expr()

    def extra_repr(self) -> str:
        """Shape and rounding, for print(model)."""
        return f"{self.shape}" + (f", rounded_to={self.rounded_to}" if self.rounded_to else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtype, recurse)


class _Round(torch.autograd.Function):
    """Values rounded to a narrower dtype; the gradient passes at full width, where a pair of casts would round it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        del ctx
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        del ctx
        return grads[0], None


class _Followed(torch.autograd.Function):
    """The values; a share of their gradient goes to the shadow too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shadow: Tensor, share: float) -> Tensor:  # noqa: ANN401
        del shadow
        ctx.share = share
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        return grads[0], grads[0] * ctx.share, None


class _Freed(torch.autograd.Function):
    """A leaf from its parameter, which is in other units; the gradient arrives in shares."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: Tensor, unit: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(share)
        return parameter * (1 / unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (share,) = ctx.saved_tensors
        return grads[0] * share, None, None


class _Node(nn.Module):
    """One node: its leaves under their names in the expression, `forward` as in `decode`, and the way back."""

    def __init__(self) -> None:
        super().__init__()
        self._dtypes: dict[str, str] = {}  # leaf -> dtype it came in
        self._units: dict[str, float] = {}  # leaf that was freed -> parameter over leaf

    def to_expr(self) -> Expr:
        """This node over the leaves' present values."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # pickle writes torch's uint16, uint32 and uint64 tensors so that it cannot read them: the same bits, signed.
        buffers = {
            name: value if value is None else value.view(_SIGNED.get(value.dtype, value.dtype))
            for name, value in self._buffers.items()
        }
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in self._buffers.items():
            if value is not None and name in self._dtypes:  # shares of gradients are not leaves
                self._buffers[name] = value.view(torch_dtype(self._dtypes[name]))

    def _leaf(self, name: str, array: np.ndarray | None) -> None:
        if array is None:
            self.register_buffer(name, None)
            return
        dtype = self._dtypes[name] = dtype_name(array.dtype)
        tensor = as_tensor(array)
        if dtype not in FLOATS:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor if dtype in _WIDE else tensor.float()))

    def free(self, name: str, unit: float, share: np.ndarray | None) -> nn.Parameter:
        """As of TorchExpr, for a leaf by its name."""
        leaf: Tensor = getattr(self, name)
        wide = leaf.detach() if leaf.dtype == torch.float64 else leaf.detach().to(torch.float32)
        parameter = nn.Parameter(wide * unit)
        delattr(self, name)
        self.register_parameter(name, parameter)
        if share is not None or unit != 1:
            self._units[name] = unit
            times = np.full((1,) * leaf.dim(), 1 / unit) if share is None else share
            self.register_buffer(f"{name}_share", as_tensor(times).to(wide))
        return parameter

    def _value(self, name: str) -> Tensor:
        """A leaf as the expression has it."""
        leaf = getattr(self, name)
        unit = self._units.get(name)
        return leaf if unit is None else _Freed.apply(leaf, getattr(self, f"{name}_share"), unit)

    def _array(self, name: str) -> np.ndarray:
        array = getattr(self, name).detach().cpu().numpy().copy()
        if name in self._units:
            array *= 1 / self._units[name]
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found by looking
            narrow = array.astype(DTYPES[self._dtypes[name]])
        same = np.array_equal(narrow.astype(array.dtype), array, equal_nan=array.dtype.kind == "f")
        return narrow if same else array


class _Raw(_Node):
    values: Tensor

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self._leaf("values", values)

    def forward(self) -> Tensor:
        return self._value("values")

    def to_expr(self) -> Expr:
        return Raw(self._array("values"))


class _Lookup(_Node):
    codes: Tensor  # (g, r, c)
    codebook: Tensor  # (g, k, d)

    def __init__(self, codes: np.ndarray, codebook: np.ndarray) -> None:
        super().__init__()
        self._leaf("codes", codes)
        self._leaf("codebook", codebook)

    def forward(self, scale: Tensor | None = None) -> Tensor:
        """scale: one number that all codewords are multiplied by, as each value would be behind the lookup."""
        groups, rows, columns = self.codes.shape
        k, d = self.codebook.shape[1:]
        # torch indexes by int32 and int64 only, so codes widen here and are kept small between calls. The gradient of
        # rows is 2.5 times as fast with int64 indices; that of a flat codebook is as fast with int32, half the memory.
        width = torch.int32 if d == 1 and groups * k < 2**31 else torch.int64
        index = self.codes.to(width)
        if groups > 1:
            index = index + k * torch.arange(groups, dtype=width, device=index.device).reshape(groups, 1, 1)
        flat = (groups * k,) if d == 1 else (groups * k, d)
        book = self._value("codebook")
        if scale is not None:
            book = book.to(torch.float32) * scale
        picked = _moving(book, lambda codebook: codebook.reshape(flat).index_select(0, index.reshape(-1)))
        return picked.reshape(groups * rows, columns, d)

    def to_expr(self) -> Expr:
        return Lookup(self._array("codes"), self._array("codebook"))


class _Affine(_Node):
    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, inner: Expr, scale: np.ndarray | None, offset: np.ndarray | None) -> None:
        super().__init__()
        self.inner = _node(inner)
        self._leaf("scale", scale)
        self._leaf("offset", offset)

    def forward(self) -> Tensor:
        scale = None if self.scale is None else self._value("scale").to(torch.float32)
        # Two operations and two roundings, as decode has it: addcmul may fuse them into one.
        if scale is None:
            values = self.inner().to(torch.float32)
        elif scale.numel() == 1 and isinstance(self.inner, _Lookup):
            values = self.inner(scale.reshape(()))
        else:
            values = self.inner().to(torch.float32) * scale
        return values if self.offset is None else values + self._value("offset").to(torch.float32)

    def to_expr(self) -> Expr:
        scale = None if self.scale is None else self._array("scale")
        offset = None if self.offset is None else self._array("offset")
        return Affine(self.inner.to_expr(), scale, offset)


class _Sum(_Node):
    def __init__(self, terms: tuple[Expr, ...]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(_node(term) for term in terms)

    def forward(self) -> Tensor:
        total = self.terms[0]().to(torch.float32)
        for term in self.terms[1:]:
            total = total + term().to(torch.float32)
        return total

    def to_expr(self) -> Expr:
        return Sum(tuple(term.to_expr() for term in self.terms if isinstance(term, _Node)))


class _Scatter(_Node):
    positions: Tensor  # (n,)

    def __init__(self, size: int, positions: np.ndarray, inner: Expr) -> None:
        super().__init__()
        self.size = size
        self._leaf("positions", positions)
        self.inner = _node(inner)

    def forward(self) -> Tensor:
        index = self.positions.to(torch.int64)
        return _moving(
            self.inner().reshape(-1),
            lambda values: values.new_zeros(self.size).index_copy(0, index, values),
        )

    def to_expr(self) -> Expr:
        return Scatter(self.size, self._array("positions"), self.inner.to_expr())


class _Permute(_Node):
    def __init__(self, inner: Expr, order: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = _node(inner)
        self.order = order

    def forward(self) -> Tensor:
        return self.inner().permute(self.order)

    def to_expr(self) -> Expr:
        return Permute(self.inner.to_expr(), self.order)


class _Reshape(_Node):
    def __init__(self, inner: Expr, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = _node(inner)
        self.shape = shape

    def forward(self) -> Tensor:
        return self.inner().reshape(self.shape)

    def to_expr(self) -> Expr:
        return Reshape(self.inner.to_expr(), self.shape)


def _node(expr: Expr) -> _Node:
    """The module of a node and all below it."""
    match expr:
        case Raw(values):
            return _Raw(values)
        case Lookup(codes, codebook):
            return _Lookup(codes, codebook)
        case Affine(inner, scale, offset):
            return _Affine(inner, scale, offset)
        case Sum(terms):
            return _Sum(terms)
        case Scatter(size, positions, inner):
            return _Scatter(size, positions, inner)
        case Permute(inner, order):
            return _Permute(inner, order)
        case Reshape(inner, shape):
            return _Reshape(inner, shape)


def _moving(values: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """move(values) for an operation that copies values and computes nothing, whatever their dtype."""
    signed = _SIGNED.get(values.dtype)
    return move(values) if signed is None else move(values.view(signed)).view(values.dtype)
