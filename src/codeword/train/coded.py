"""The tensors of a net that run from their expressions: which of their leaves train, and their codes anew.

A codebook that the file stores once for several tensors is one parameter. Everything here goes by the shape of the
expressions, never by the method that made them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from codeword.artifact import Artifact
from codeword.coding import encode_leaf
from codeword.errors import NonFiniteError
from codeword.expr import Expr, dtype_name, is_float, leaves, lookups, with_leaves
from codeword.kernels.assign import code_dtype
from codeword.nn.state import as_tensor
from codeword.nn.twin import TorchExpr
from codeword.train.leaves import (
    Form,
    Held,
    Kind,
    Leaf,
    coarser,
    finer,
    mantissa_bits,
    size_of,
    stays_zero,
    trainable,
    unit_of,
)
from codeword.train.reassign import code_bits, reassigned, reassigned_within

_PRUNED = 1e4  # importance of weights that stay zero over that of others
_TRIES = 4  # budgets tried until coded bytes are within what a tensor may take
_NARROW = ("float8_e4m3", "float8_e5m2")


class Options(NamedTuple):
    """What a `Tuner` was told."""

    shadows: bool
    hold_rate: bool
    start_decoded: bool
    fix_zeros: bool
    mean: bool
    pace: float  # of shadows, over the learning rate
    kinds: frozenset[Kind] | None

    def wants(self, kind: Kind, dtype: str = "float32") -> bool:
        """Whether leaves of this kind train. Left to itself: not the step of a codebook, which moves with it, nor
        factors of rows in 8 bits, whose jumps are large and which a norm takes back anyway.
        """
        if self.kinds is not None:
            return kind in self.kinds
        return kind != "step" and not (kind == "scale" and dtype in _NARROW)


class Place(NamedTuple):
    """Where a leaf is: tensor of the file, path in its expression."""

    tensor: str
    path: str


_Groups: TypeAlias = dict[Place, list[tuple[str, Leaf]]]


@dataclass(slots=True)
class _Tensor:
    """What training keeps of one tensor of the file."""

    twin: TorchExpr
    frozen: bool
    size: float  # of its weights
    pruned: np.ndarray | None  # where the dense weight was zero and decoded to it; None if nowhere
    nbytes: int = 0  # of its leaves in the file
    lam: float = 0.0  # price of a bit when its codes were last chosen


class Coded(Mapping[str, TorchExpr]):
    """Name in the file -> expression in the net."""

    def __init__(self, artifact: Artifact, options: Options) -> None:
        self._artifact, self._options = artifact, options
        self._tensors: dict[str, _Tensor] = {}
        self._units: dict[Place, float] = {}  # of leaves that train
        self._books: dict[Place, Place] = {}  # a shared codebook -> where it stands first

    def __getitem__(self, name: str) -> TorchExpr:
        return self._tensors[name].twin

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def frozen(self) -> list[str]:
        """Names of the tensors that do not train: the model had them frozen."""
        return [name for name, tensor in self._tensors.items() if tensor.frozen]

    @property
    def nbytes(self) -> int:
        """Bytes in the file of all leaves of the tensors with a shadow."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def prices(self) -> dict[str, float]:
        """Tensor -> the price of a bit when its codes were last chosen; 0 if they never were."""
        return {name: tensor.lam for name, tensor in self._tensors.items()}

    def set_prices(self, prices: Mapping[str, float]) -> None:
        """Start the next search from these, as `prices` gave them."""
        for name, lam in prices.items():
            self._tensors[name].lam = lam

    def make(self, source: str, dense: Tensor) -> TorchExpr:
        """The expression of a tensor of the file, in place of a dense weight of the model."""
        expr, frozen, options = self._artifact[source], not dense.requires_grad, self._options
        fine = finer(expr) if options.wants("codebook") and not frozen else expr
        twin = TorchExpr(fine, rounded_to=self._artifact.entries[source].dtype).requires_grad_(False)
        own, decoded = dense.detach().float().cpu(), twin().detach().float()
        pruned = (own == 0) & (decoded == 0)
        found = pruned.numpy() if options.fix_zeros and bool(pruned.any()) else None
        size = size_of(decoded.numpy())
        tensor = self._tensors[source] = _Tensor(twin, frozen, size, found)
        if options.shadows and not frozen and any(lookups(expr)):
            twin.follow(1 / size, options.pace)
            if not options.start_decoded:
                twin.want(own.reshape(twin.shape))
            tensor.nbytes = _nbytes(expr, codes=True) + _nbytes(expr, codes=False)
        return twin

    def free(self) -> Iterator[tuple[str, Held]]:
        """Makes parameters of the leaves that train; what is to be held to the file's values, by name."""
        self._books = self._shared_books()
        for place, members in self._grouped().items():
            leaf, options = members[0][1], self._options
            dtype = dtype_name(leaf.values.dtype)
            if not options.wants(leaf.kind, dtype):
                continue
            # An optimizer whose steps are of one length (Adam) then moves all tensors by the same part of themselves.
            pull = sum(float(one.pull.sum()) / self._tensors[name].size ** 2 for name, one in members)
            unit = unit_of(pull, sum(one.reach for _, one in members))
            self._units[place] = unit
            share = _share(unit, members) if options.mean else None
            first = self[place.tensor].free(place.path, unit, share)
            for name, one in members:
                if (name, one.path) != place:
                    self[name].free(one.path, unit, share)
                    owner, attribute = self[name].owner(one.path)
                    setattr(owner, attribute, first)
            told = leaf.kind != "codebook" and is_float(leaf.values)
            form = Form(dtype, mantissa_bits(leaf.values) if told else None, unit)
            pruned = any(self._tensors[name].pruned is not None for name, _ in members)
            zero = stays_zero(leaf, entries=pruned) & options.fix_zeros
            if zero.any() or not form.exact:
                yield ".".join(place), Held(*self[place.tensor].owner(place.path), form, zero)

    @torch.no_grad()
    def reassign(self, spare: float) -> None:
        """New codes for all tensors with a shadow, in (1 + spare) times the bytes that they took in the file.

        A shadow that was frozen since keeps its tensor's codes. Raises NonFiniteError.
        """
        for name, tensor in self._tensors.items():
            if tensor.twin.shadow is None or not tensor.twin.shadow.requires_grad:
                continue
            wanted = tensor.twin.wanted
            if not bool(wanted.isfinite().all()):
                raise diverged(name)
            target = wanted.cpu().numpy()
            importance = np.ones((1,) * target.ndim)
            if tensor.pruned is not None:
                importance = np.where(tensor.pruned, _PRUNED, 1.0)
                target = np.where(tensor.pruned, np.float32(0), target)
            found = self._new_codes(tensor, target, importance, spare)
            for path, array in leaves(found):
                if path.endswith("codes"):
                    owner, name = tensor.twin.owner(path)
                    getattr(owner, name).copy_(as_tensor(array))
            tensor.twin.want(wanted)
        if self._options.mean:
            self._weigh()

    def _new_codes(self, tensor: _Tensor, target: np.ndarray, importance: np.ndarray, spare: float) -> Expr:
        expr = tensor.twin.to_expr()
        if not self._options.hold_rate:
            return reassigned(expr, target, importance, 0.0)
        most = max(tensor.nbytes * (1 + spare) - _nbytes(expr, codes=False), 1.0)
        bits, found = most * code_bits(expr) / max(_nbytes(expr, codes=True), 1), expr
        for _ in range(_TRIES):
            found, tensor.lam = reassigned_within(expr, target, importance, bits, tensor.lam)
            taken = _nbytes(found, codes=True)
            if taken <= most:
                break
            bits = min(bits, code_bits(found)) * min(most / taken, 0.999)
        return found

    def compacted(self) -> dict[str, Expr]:
        """The expressions as the file may hold them: without codewords that no code names in any use of a codebook.

        Raises NonFiniteError.
        """
        exprs = {name: tensor.twin.to_expr() for name, tensor in self._tensors.items()}
        arrays = {name: dict(leaves(expr)) for name, expr in exprs.items()}
        for name, found in arrays.items():
            if not all(np.isfinite(array).all() for array in found.values() if is_float(array)):
                raise diverged(name)
        uses: dict[Place, list[Place]] = defaultdict(list)
        for name, tensor in self._tensors.items():
            for path in () if tensor.frozen else arrays[name]:
                if path.endswith("codebook"):
                    uses[self._books.get(Place(name, path), Place(name, path))].append(Place(name, path))
        for place, members in uses.items():
            codes = [arrays[name][_codes_of(path)] for name, path in members]
            k = arrays[place.tensor][place.path].shape[1]
            used = np.sum([np.bincount(some.reshape(-1), minlength=k) for some in codes], axis=0) > 0
            used[0] |= not used.any()
            index = (np.cumsum(used) - 1).astype(code_dtype(int(used.sum())))
            for (name, path), some in zip(members, codes, strict=True):
                arrays[name][_codes_of(path)] = index[some]
                arrays[name][path] = arrays[name][path][:, used]
        return {name: coarser(with_leaves(expr, iter(arrays[name].values()))) for name, expr in exprs.items()}

    def _grouped(self) -> _Groups:
        """Every leaf that could train, with its tensor; those of a shared codebook together, where it stands first."""
        groups: _Groups = defaultdict(list)
        for name, tensor in self._tensors.items():
            if not tensor.frozen:
                for leaf in trainable(tensor.twin.to_expr()):
                    place = Place(name, leaf.path)
                    groups[self._books.get(place, place)].append((name, leaf))
        return groups

    def _weigh(self) -> None:
        """The shares of gradients, for codes as they are now."""
        for place, members in self._grouped().items():
            if place in self._units:
                share = torch.from_numpy(_share(self._units[place], members))
                for name, leaf in members:
                    owner, attribute = self[name].owner(leaf.path)
                    getattr(owner, f"{attribute}_share").copy_(share)

    def _shared_books(self) -> dict[Place, Place]:
        """Codebook that the file stores once for several tensors -> where it stands first.

        Whole numbers that count, one after the other, are equal by chance: each tensor has a step of its own.
        """
        names = list(self._artifact.entries)
        found = {name: list(leaves(tensor.twin.to_expr())) for name, tensor in self._tensors.items()}
        books: dict[Place, Place] = {}
        for name, arrays in found.items():
            for (path, book), info in zip(arrays, self._artifact.entries[name].leaves, strict=True):
                lender = None if info.lender is None else names[info.lender.tensor]
                if info.lender is None or lender not in found or self._tensors[lender].frozen:
                    continue
                first, same = found[lender][info.lender.leaf]
                both = path.endswith("codebook") and first.endswith("codebook") and np.array_equal(same, book)
                if both and not self._tensors[name].frozen and not _counts(book):
                    books[Place(name, path)] = Place(lender, first)
        return books


def diverged(name: str) -> NonFiniteError:
    """The error for a tensor that has values no file should hold."""
    return NonFiniteError(
        f"{name!r} has come to hold NaN or infinity: training diverged; go back to an earlier state and lower the "
        "learning rate"
    )


def _share(unit: float, members: list[tuple[str, Leaf]]) -> np.ndarray:
    """What makes the gradient of a parameter the mean over the weights it serves, by how far each follows it."""
    pull = np.asarray(sum(leaf.pull for _, leaf in members), np.float64)
    return np.divide(unit, pull, out=np.zeros_like(pull), where=pull > 0).astype(np.float32)


def _codes_of(path: str) -> str:
    """The path of the codes of a codebook."""
    return path.removesuffix("codebook") + "codes"


def _nbytes(expr: Expr, *, codes: bool) -> int:
    """Bytes that the codes of an expression take in a file, or all its other leaves."""
    return sum(len(encode_leaf(array)[1]) for path, array in leaves(coarser(expr)) if path.endswith("codes") == codes)


def _counts(book: np.ndarray) -> bool:
    """Whether scalar codewords are whole numbers one after the other, in whatever grid."""
    if book.dtype.kind != "i" or book.shape[2] > 1:
        return False
    return len(np.unique(np.diff(np.unique(book.astype(np.int64))))) < 2
