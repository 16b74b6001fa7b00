"""Pruning: most weights become zero, and another method sees to the rest."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import numpy as np

from codeword.errors import PlanError
from codeword.expr import Affine, Expr, Raw, Reshape, Scatter, decode
from codeword.math.masks import block_mask, n_of_m_mask, top_mask
from codeword.methods.base import as_rows
from codeword.methods.rate_aware import RateAware
from codeword.methods.scalar import Keep, KMeans
from codeword.methods.scalar_starts import Birch, DensityKMeans, Lloyd, RowScaled
from codeword.methods.vector import KernelTemplates, ProductQuantization

Then: TypeAlias = (
    Keep | KMeans | RateAware | Lloyd | DensityKMeans | Birch | RowScaled | ProductQuantization | KernelTemplates
)


class Prune(msgspec.Struct, frozen=True, tag_field="method", tag="prune", forbid_unknown_fields=True):
    """The weights of least magnitude (times the root of their importance) become 0, the others go to `then`.

    sparsity: the share of weights that become 0; None keeps to the zeros that are there, such as training has left.
    pattern: "2:4" keeps 2 of each 4 neighbouring inputs, "block 4x1" whole blocks of 4 outputs and 1 input; None any
    weight. Positions are stored as a Scatter over the weights that stay. Where `then` needs weights in their places
    (errors that cancel, rows with scales or groups, vectors, kernels), pruned ones have importance 0 and come back as
    exact zeros: by a code of their own, or else under an Affine of zeros and ones.
    """

    sparsity: float | None = None
    then: Then = Keep()
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise PlanError(f"prune: sparsity must lie in 0..1, below 1, got {self.sparsity}")
        if self.pattern is not None:
            n, m, block = parse_pattern(self.pattern)
            if block is None and self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-9:
                raise PlanError(f"prune: pattern {self.pattern!r} is a sparsity of {1 - n / m:g}, not {self.sparsity}")
            if block is not None and self.sparsity is None:
                raise PlanError(f"prune: pattern {self.pattern!r} needs a sparsity")

    def compress(self, weight: np.ndarray, importance: np.ndarray | None, *, generator: np.random.Generator) -> Expr:
        """A Scatter of what stays, or the whole under a mask."""
        if not weight.size:
            return Raw(weight)
        mask = self.mask(weight, importance)
        if mask.all():
            return self.then.compress(weight, importance, generator=generator)
        if _in_place(self.then) and mask.any():
            h = np.where(mask, 1 if importance is None else importance, 0).astype(np.float32)
            inner = self.then.compress(np.where(mask, weight, 0).astype(weight.dtype), h, generator=generator)
            if not decode(inner)[~mask].any():  # zero has a code of its own: a mask would say it twice
                return inner
            return Affine(inner, mask.astype(np.uint8))
        (positions,) = np.nonzero(mask.reshape(-1))
        h = None if importance is None else importance[mask]
        inner = self.then.compress(weight[mask], h, generator=generator)
        places = positions.astype(np.min_scalar_type(weight.size))
        return Reshape(Scatter(weight.size, places, inner), weight.shape)

    def mask(self, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """True for the weights that stay, of weight's shape."""
        if self.sparsity is None and self.pattern is None:
            return weight != 0
        scores = np.abs(weight.astype(np.float32))
        if importance is not None:
            scores = scores * np.sqrt(importance.astype(np.float32))
        if self.pattern is None:
            return top_mask(scores, weight.size - round((self.sparsity or 0) * weight.size)) & (weight != 0)
        n, m, block = parse_pattern(self.pattern)
        rows = as_rows(scores)
        if block is None:
            mask = n_of_m_mask(rows, n, m)
        else:
            mask = block_mask(rows, block, weight.size - round((self.sparsity or 0) * weight.size))
        return mask.reshape(weight.shape) & (weight != 0)


def _in_place(method: Then) -> bool:
    """Whether a method looks at where in its tensor a weight stands."""
    if isinstance(method, (RateAware, RowScaled, ProductQuantization, KernelTemplates)):
        return True
    return getattr(method, "granularity", "tensor") == "row" or getattr(method, "group_size", None) is not None


def parse_pattern(pattern: str) -> tuple[int, int, tuple[int, int] | None]:
    """(n, m, None) of "n:m", (0, 0, (rows, columns)) of "block RxC"; PlanError for another text."""
    try:
        if pattern.startswith("block "):
            rows, columns = (int(part) for part in pattern.removeprefix("block ").split("x"))
            if rows > 0 and columns > 0:
                return 0, 0, (rows, columns)
        else:
            n, m = (int(part) for part in pattern.split(":"))
            if 0 < n < m:
                return n, m, None
    except ValueError:
        pass
    raise PlanError(f'prune: pattern must be such as "2:4" or "block 4x1", got {pattern!r}')
