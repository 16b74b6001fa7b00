"""Training of what a file holds: codewords, scales, gains and offsets, norms and biases, and the codes themselves.

    tuner = Tuner(artifact, reassign_every=50)
    net = tuner.prepare(model)                       a copy that runs from the artifact's expressions
    for x, y in batches:
        loss(net(x), y).backward(); optimizer.step(); optimizer.zero_grad()
        tuner.step()                                 the one line a loop gains
    tuner.finalize().save("model.cw")

What runs is at every step what the file would hold, rounded as the file holds it; what an optimizer adds is kept in
master copies, so that no step is too small to count (`leaves.Held`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact, Entry, Writer, code_tensor, tied_tensor
from codeword.coding import encode_leaf
from codeword.errors import MismatchError, PlanError
from codeword.expr import DTYPES, FLOATS, Expr, Raw, dtype_name, leaves, lookups, with_leaves
from codeword.kernels.assign import code_dtype
from codeword.nn.state import as_tensor
from codeword.nn.swap import root_of, swap_with
from codeword.nn.twin import TorchExpr
from codeword.train.checks import check_mode, check_model
from codeword.train.leaves import (
    KINDS,
    Form,
    Held,
    Kind,
    Leaf,
    coarser,
    finer,
    mantissa_bits,
    stays_zero,
    trainable,
    unit_of,
)
from codeword.train.reassign import code_bits, reassigned, reassigned_within

State: TypeAlias = dict[str, Tensor | int | float | str]
_Place: TypeAlias = tuple[str, str]  # tensor of the file, path of a leaf in its expression

_PRUNED = 1e4  # importance of weights that stay zero over that of others
_TRIES = 4  # budgets tried until coded bytes are within what a tensor may take
_NARROW = ("float8_e4m3", "float8_e5m2")


@dataclass(slots=True)
class _Coded:
    """A tensor that runs from its expression."""

    twin: TorchExpr
    frozen: bool
    nbytes: int = 0  # of its leaves in the file that was given
    bits: float = 0.0  # entropy of its codes there
    lam: float = 0.0  # what a bit cost last
    pruned: np.ndarray | None = None  # where the dense weight was zero and decoded to it


class Tuner:
    """Trains the leaves of a compressed net: one code path for every method.

    reassign_every: steps between new codes, taken from a shadow of the dense weights that trains beside them; None:
    codes stay. rate "hold": new codes take no more bytes than the file that was given; "free": the nearest codewords.
    start: where shadows begin, "model" at the weights of the model given, which are normally those that were
    compressed, or "decoded". zeros "fixed": codewords, factors and matrix entries that are exactly zero stay so, and
    weights that are zero in both model and file keep their code; "free": only masks and positions do. gradient "mean":
    that of a codeword is the mean, not the sum, over its members (and likewise of factors, over the weights they
    serve), so that one learning rate suits them and dense weights. train: kinds of leaves that train, of
    `leaves.KINDS`; None for all but the step of a codebook, which moves with it, and factors of rows in 8 bits, whose
    jumps a norm takes back anyway.

    Tensors without a coded form (`swap_report`) and frozen weights stay as the file has them: `fixed` lists them.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        reassign_every: int | None = None,
        rate: Literal["hold", "free"] = "hold",
        start: Literal["model", "decoded"] = "model",
        zeros: Literal["fixed", "free"] = "fixed",
        gradient: Literal["mean", "sum"] = "mean",
        train: Iterable[Kind] | None = None,
    ) -> None:
        if reassign_every is not None and reassign_every < 1:
            raise PlanError(f"tuner: reassign_every must be at least 1, got {reassign_every}; None never reassigns")
        for name, value, known in (
            ("rate", rate, ("hold", "free")),
            ("start", start, ("model", "decoded")),
            ("zeros", zeros, ("fixed", "free")),
            ("gradient", gradient, ("mean", "sum")),
            *(("train", kind, KINDS) for kind in train or ()),
        ):
            if value not in known:
                raise PlanError(f"tuner: {name} must be of {', '.join(known)}, got {value!r}")
        self.artifact = artifact
        self.fixed: dict[str, str] = {}  # tensor -> why it does not train
        self._every, self._rate, self._start = reassign_every, rate, start
        self._zeros, self._gradient = zeros == "fixed", gradient
        self._kinds = None if train is None else frozenset(train)
        self._net: nn.Module | None = None
        self._steps = 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of the model that runs from the artifact and trains; the model is not changed.

        Raises MismatchError if they do not fit each other, or nothing would train.
        """
        check_model(model)
        self.fixed, self._steps = {}, 0
        self._coded: dict[str, _Coded] = {}
        self._dense: dict[str, tuple[nn.Module, str]] = {}  # tensor of the file -> module and name that hold it
        self._held: dict[str, Held] = {}
        self._units: dict[_Place, float] = {}  # of leaves that train
        self._default = self._finest()
        net, swapped = swap_with(model, self.artifact, self._make)
        self._sources = {
            name: item.place.source for item in swapped for name in item.place.names if item.place.source is not None
        }
        self._free_coded()
        for place, why in swapped:
            if place.source is not None and why is not None:
                self._hold_dense(net, place.names[0], place.source, why)
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise MismatchError(
                f"nothing of this {type(model).__name__} trains: {self.fixed}; name other kinds in train, of "
                f"{', '.join(KINDS)}, or unfreeze weights"
            )
        self._net = net
        return net

    def step(self) -> None:
        """After each step of the optimizer: keeps what runs as the file holds it; takes codes anew when it is time."""
        check_mode(self._prepared())
        self._settle()
        self._steps += 1
        if self._every is not None and self._steps % self._every == 0:
            self.reassign()

    def finalize(self, metadata: Mapping[str, str] | None = None) -> Artifact:
        """The file of the net as it is now: it decodes to the very values that run. Training may go on after it.

        metadata: in place of the artifact's own.
        """
        self._prepared()
        self._settle()
        exprs = self._compacted()
        writer, index = Writer(), dict[str, int]()
        for entry in self.artifact.entries.values():
            tied = entry.tied_to
            if tied is not None and self._holder(entry.name) == self._holder(tied):
                writer.add(tied_tensor(entry.name, entry.dtype, entry.shape, index[tied]))
                continue
            expr = self._final(entry, exprs)
            index[entry.name] = writer.add(code_tensor(entry.name, entry.dtype, entry.shape, expr))
        return writer.finish(dict(self.artifact.metadata if metadata is None else metadata))

    def state_dict(self) -> State:
        """What the net's state and the optimizer's do not hold: steps taken, master copies, prices."""
        self._prepared()
        state: State = {"steps": self._steps}
        state |= {f"master.{name}": held.master.clone() for name, held in self._held.items() if held.master is not None}
        return state | {f"lam.{name}": coded.lam for name, coded in self._coded.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Goes on where another tuner stood, of the same artifact, options and model; the net's state loads apart.

        Raises MismatchError if the state is of another net.
        """
        expected = self.state_dict().keys()
        if expected != state.keys():
            odd = sorted(expected ^ state.keys())
            raise MismatchError(
                f"the state of another tuner: {len(odd)} entries differ, such as {odd[0]!r}; "
                "prepare with the artifact, model and options it was saved with"
            )
        self._steps = int(state["steps"])
        for name, coded in self._coded.items():
            coded.lam = float(state[f"lam.{name}"])
        for name, held in self._held.items():
            master = state.get(f"master.{name}")
            if isinstance(master, Tensor):
                held.load(master)

    @torch.no_grad()
    def reassign(self) -> None:
        """New codes for all tensors with a shadow; `step` calls this every `reassign_every` steps."""
        self._prepared()
        spare = self._spare() if self._rate == "hold" else 0.0
        for coded in self._coded.values():
            if coded.twin.shadow is None:
                continue
            target = coded.twin.shadow.detach().cpu().numpy()
            importance = np.ones((1,) * target.ndim)
            if coded.pruned is not None:
                importance = np.where(coded.pruned, _PRUNED, 1.0)
                target = np.where(coded.pruned, np.float32(0), target)
            found = self._new_codes(coded, coded.twin.to_expr(), target, importance, spare)
            for path, array in leaves(found):
                if path.endswith("codes"):
                    owner, name = coded.twin.owner(path)
                    getattr(owner, name).copy_(as_tensor(array))
        self._weigh()

    def _new_codes(self, coded: _Coded, expr: Expr, target: np.ndarray, importance: np.ndarray, spare: float) -> Expr:
        if self._rate == "free":
            return reassigned(expr, target, importance, 0.0)
        most = coded.nbytes * (1 + spare) - _leaf_nbytes(expr, codes=False)
        bits, found = coded.bits, expr
        for _ in range(_TRIES):
            found, coded.lam = reassigned_within(expr, target, importance, bits, coded.lam)
            taken = _leaf_nbytes(found, codes=True)
            if taken <= most:
                break
            bits = min(bits, code_bits(found)) * min(max(most, 1) / taken, 1.0) * 0.999
        return found

    def _make(self, source: str, dense: Tensor) -> TorchExpr:
        """The expression of a tensor of the file, in place of a dense weight of the model."""
        expr, frozen = self.artifact[source], not dense.requires_grad
        if frozen:
            self.fixed[source] = "requires_grad is False"
        fine = expr if frozen or not self._wants("codebook") else finer(expr)
        twin = TorchExpr(fine, rounded_to=self.artifact.entries[source].dtype).requires_grad_(False)
        coded = self._coded[source] = _Coded(twin, frozen)
        own, decoded = dense.detach().float().cpu(), twin().detach().float()
        pruned = (own == 0) & (decoded == 0)
        if self._zeros and bool(pruned.any()):
            coded.pruned = pruned.numpy()
        if self._every is not None and not frozen and any(lookups(expr)):
            twin.follow(own if self._start == "model" else decoded)
            coded.bits = code_bits(expr)
            coded.nbytes = _leaf_nbytes(expr, codes=True) + _leaf_nbytes(expr, codes=False)
        return twin

    def _wants(self, kind: Kind, dtype: str = "float32") -> bool:
        if self._kinds is not None:
            return kind in self._kinds
        return kind != "step" and not (kind == "scale" and dtype in _NARROW)

    def _free_coded(self) -> None:
        """Makes parameters of the leaves that train, one of a codebook that tensors share."""
        self._books = self._shared_books()
        for place, members in self._grouped().items():
            leaf = members[0][1]
            if not self._wants(leaf.kind, dtype_name(leaf.values.dtype)):
                continue
            unit = unit_of(np.asarray(sum(one.pull for _, one in members)), sum(one.reach for _, one in members))
            share = self._share(unit, members)
            freed = [self._coded[name].twin.free(one.path, unit, share) for name, one in members]
            for name, one in members[1:]:
                owner, attribute = self._coded[name].twin.owner(one.path)
                setattr(owner, attribute, freed[0])
            self._units[place] = unit
            bits = None if leaf.kind == "codebook" else mantissa_bits(leaf.values)
            form = Form(dtype_name(leaf.values.dtype), bits, unit)
            owner, attribute = self._coded[place[0]].twin.owner(place[1])
            pruned = any(self._coded[name].pruned is not None for name, _ in members)
            self._hold(".".join(place), owner, attribute, form, stays_zero(leaf, entries=pruned))

    def _grouped(self) -> dict[_Place, list[tuple[str, Leaf]]]:
        """Every leaf that could train, with its tensor; those of a shared codebook together under the first."""
        groups: dict[_Place, list[tuple[str, Leaf]]] = defaultdict(list)
        for name, coded in self._coded.items():
            if not coded.frozen:
                for leaf in trainable(coded.twin.to_expr()):
                    groups[self._books.get((name, leaf.path), (name, leaf.path))].append((name, leaf))
        return groups

    def _share(self, unit: float, members: list[tuple[str, Leaf]]) -> np.ndarray | None:
        if self._gradient == "sum":
            return None
        pull = np.asarray(sum(leaf.pull for _, leaf in members), np.float64)
        return np.divide(unit, pull, out=np.zeros_like(pull), where=pull > 0).astype(np.float32)

    @torch.no_grad()
    def _weigh(self) -> None:
        """The shares of gradients, for codes as they are now."""
        for place, members in self._grouped().items():
            share = self._share(self._units[place], members) if place in self._units else None
            for name, leaf in members if share is not None else ():
                owner, attribute = self._coded[name].twin.owner(leaf.path)
                getattr(owner, f"{attribute}_share").copy_(torch.from_numpy(share))

    def _shared_books(self) -> dict[_Place, _Place]:
        """Codebook that the file stores once for several tensors -> where it stands first.

        Whole numbers that count, one after the other, are equal by chance: each tensor has a step of its own.
        """
        names = list(self.artifact.entries)
        books: dict[_Place, _Place] = {}
        for name, coded in self._coded.items():
            paths = dict(leaves(coded.twin.to_expr()))
            for (path, book), info in zip(paths.items(), self.artifact.entries[name].leaves, strict=True):
                if info.lender is None or not path.endswith("codebook") or coded.frozen or _counts(book):
                    continue
                lender = names[info.lender.tensor]
                if lender in self._coded and not self._coded[lender].frozen:
                    first, same = list(leaves(self._coded[lender].twin.to_expr()))[info.lender.leaf]
                    if first.endswith("codebook") and np.array_equal(same, book):
                        books[name, path] = lender, first
        return books

    def _hold_dense(self, net: nn.Module, name: str, source: str, why: str) -> None:
        """A tensor of the file that runs dense: held to what the file can hold, or left as it is."""
        module, _, attribute = name.rpartition(".")
        owner = net.get_submodule(module)
        tensor: Tensor = getattr(owner, attribute)
        parameter = isinstance(tensor, nn.Parameter)
        if parameter and (why != "raw" or not self._wants("raw") or not tensor.requires_grad):
            self.fixed[name] = "requires_grad is False" if not tensor.requires_grad else why
            tensor.requires_grad_(False)
            return
        self._dense[source] = owner, attribute
        if not tensor.is_floating_point():
            return
        values = self.artifact.decode(source)
        form = Form(dtype_name(values.dtype), mantissa_bits(values) or self._default, 1.0)
        zero = (values == 0) & (parameter and values.ndim > 1)
        self._hold(source, owner, attribute, form, zero)

    def _finest(self) -> int | None:
        """The most bits of mantissa that a raw tensor was rounded to: for those whose values do not tell."""
        raw = (entry for entry in self.artifact.entries.values() if isinstance(entry.skeleton, Raw))
        found = (mantissa_bits(self.artifact.decode(entry.name)) for entry in raw if entry.dtype in FLOATS)
        return max((bits for bits in found if bits is not None), default=None)

    def _hold(self, name: str, owner: nn.Module, attribute: str, form: Form, zero: np.ndarray) -> None:
        mask = torch.from_numpy(zero.copy()) if self._zeros and zero.any() else None
        if mask is not None or not form.exact:
            self._held[name] = Held(owner, attribute, form, mask)

    def _settle(self) -> None:
        for held in self._held.values():
            held.settle()

    def _spare(self) -> float:
        """Bytes that tensors which run dense take less than in the file given, over those of the codes."""
        given = now = 0
        for source, (owner, attribute) in self._dense.items():
            given += sum(leaf.nbytes for leaf in self.artifact.entries[source].leaves)
            now += len(encode_leaf(self._array(source, owner, attribute))[1])
        return (given - now) / max(sum(coded.nbytes for coded in self._coded.values()), 1)

    def _array(self, source: str, owner: nn.Module, attribute: str) -> np.ndarray:
        """A dense tensor in the dtype the file has it in."""
        tensor: Tensor = getattr(owner, attribute).detach().cpu()
        name = self.artifact.entries[source].dtype
        wide = tensor if name not in FLOATS or tensor.dtype == torch.float64 else tensor.float()
        return wide.numpy().astype(DTYPES[name])

    def _compacted(self) -> dict[str, Expr]:
        """The expressions without codewords that no code names, in a codebook's every use."""
        arrays = {name: dict(leaves(coded.twin.to_expr())) for name, coded in self._coded.items()}
        uses: dict[_Place, list[_Place]] = defaultdict(list)
        for name, coded in self._coded.items():
            for path in () if coded.frozen else arrays[name]:
                if path.endswith("codebook"):
                    uses[self._books.get((name, path), (name, path))].append((name, path))
        for members in uses.values():
            codes = [arrays[name][path.removesuffix("codebook") + "codes"] for name, path in members]
            k = arrays[members[0][0]][members[0][1]].shape[1]
            used = np.sum([np.bincount(some.reshape(-1), minlength=k) for some in codes], axis=0) > 0
            used[0] |= not used.any()
            place = (np.cumsum(used) - 1).astype(code_dtype(int(used.sum())))
            for (name, path), some in zip(members, codes, strict=True):
                arrays[name][path.removesuffix("codebook") + "codes"] = place[some]
                arrays[name][path] = arrays[name][path][:, used]
        return {
            name: coarser(with_leaves(coded.twin.to_expr(), iter(arrays[name].values())))
            for name, coded in self._coded.items()
        }

    def _final(self, entry: Entry, exprs: Mapping[str, Expr]) -> Expr:
        holder = self._holder(entry.name)
        if holder in exprs:
            return exprs[holder]
        if holder in self._dense:
            return Raw(self._array(holder, *self._dense[holder]))
        return self.artifact[entry.name]

    def _holder(self, name: str) -> str:
        """The tensor of the file that stands for this one in the net."""
        source = self._sources[name]
        root = root_of(self.artifact, source)
        if root in self._coded:
            return root
        return source if source in self._dense else self.artifact.entries[source].tied_to or source

    def _prepared(self) -> nn.Module:
        if self._net is None:
            raise PlanError("this tuner has no net yet; net = tuner.prepare(model) first, and train that")
        return self._net


def _leaf_nbytes(expr: Expr, *, codes: bool) -> int:
    """Bytes that the codes of an expression take in a file, or all its other leaves."""
    return sum(len(encode_leaf(array)[1]) for path, array in leaves(coarser(expr)) if path.endswith("codes") == codes)


def _counts(book: np.ndarray) -> bool:
    """Whether scalar codewords are whole numbers one after the other."""
    return (
        book.dtype.kind == "i" and book.shape[2] == 1 and bool(np.all(np.diff(np.unique(book.astype(np.int64))) == 1))
    )
