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

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact, Entry, Writer, code_tensor, tied_tensor
from codeword.coding import encode_leaf
from codeword.errors import MismatchError, PlanError
from codeword.expr import DTYPES, FLOATS, Affine, Expr, Raw, dtype_name, leaves
from codeword.fold import METADATA
from codeword.nn.swap import root_of, swap_with
from codeword.train.checks import check_mode, check_model
from codeword.train.coded import Coded, Options, diverged
from codeword.train.leaves import KINDS, Form, Held, Kind, mantissa_bits
from codeword.train.processes import keep_codes_here

_STRIDE = 2.0  # steps of a dense weight that a shadow goes between two sets of codes
State: TypeAlias = dict[str, Tensor | int | float | str]


class _Steps(NamedTuple):
    """How the file holds a vector in fixed point: whole numbers of this dtype, times the step."""

    step: np.ndarray
    dtype: np.dtype


class Tuner:
    """Trains the float leaves of a compressed net, and takes its codes anew: one code path for every method.

    reassign_every: steps of the optimizer between new codes; None: codes stay. New codes are those that fit a shadow
    best, a dense copy of the weights that trains beside the codewords. rate "hold": they take no more bytes than the
    codes of the file given, or what makes a file of `nbytes` or less; "free": they are the nearest codewords, whatever
    these cost. start: the values that shadows begin with, "model" for those of the model given, normally the weights
    that were compressed, or "decoded". pace: the learning rate of shadows over that of dense weights; None for
    2 / reassign_every, at most 1: between two sets of codes gradients are taken at one place, and a shadow that
    follows them at full rate overshoots.

    zeros "fixed": codewords, factors and matrix entries that are exactly zero stay so, and weights that are zero in
    both model and file keep their code; "free": only what a mask prunes stays zero. gradient "mean": a codeword takes
    the mean over its members, not the sum (and a factor that over the weights it multiplies), so that one learning rate
    suits codewords and dense weights. train: kinds of leaves that train, of `leaves.KINDS`; None for all but the step
    of a codebook, as its codewords move anyway, and 8-bit factors of rows, which can only jump and which a norm
    cancels.

    Tensors without a coded form (`swap_report`) and frozen weights stay as the file has them: `fixed` lists them.
    Raises PlanError for options that are wrong, and for a file whose batch norms are folded.
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
        pace: float | None = None,
        nbytes: int | None = None,
    ) -> None:
        if reassign_every is not None and (type(reassign_every) is not int or reassign_every < 1):
            raise PlanError(
                f"tuner: reassign_every must be a whole number >= 1, got {reassign_every!r}; None never reassigns"
            )
        kinds = None if train is None else frozenset(train)
        for name, value, known in (
            ("rate", rate, ("hold", "free")),
            ("start", start, ("model", "decoded")),
            ("zeros", zeros, ("fixed", "free")),
            ("gradient", gradient, ("mean", "sum")),
            *(("train", kind, KINDS) for kind in sorted(kinds or ())),
        ):
            if value not in known:
                raise PlanError(f"tuner: {name} must be of {', '.join(known)}, got {value!r}")
        if pace is not None and not 0 < pace <= 1:
            raise PlanError(f"tuner: pace must lie above 0 and up to 1, got {pace}")
        if nbytes is not None and (nbytes < 1 or reassign_every is None or rate == "free"):
            raise PlanError(
                f"tuner: nbytes is the size that new codes keep to, at least 1; got {nbytes} with "
                f'reassign_every={reassign_every} and rate="{rate}"'
            )
        if METADATA in artifact.metadata:
            raise PlanError(
                "tuner: batch norms of this file are folded, which training would undo; compress with fold_norms=False "
                "(--no-fold-norms), or train in one call: finetune=Finetune(...)"
            )
        self.artifact = artifact
        self.fixed: dict[str, str] = {}  # tensor -> why it does not train
        self._every, self._nbytes = reassign_every, nbytes
        self._options = Options(
            shadows=reassign_every is not None,
            hold_rate=rate == "hold",
            start_decoded=start == "decoded",
            fix_zeros=zeros == "fixed",
            mean=gradient == "mean",
            pace=_pace(reassign_every) if pace is None else pace,
            kinds=kinds,
        )
        self._net: nn.Module | None = None
        self._steps = 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of the model that runs from the artifact and trains; the model is not changed.

        Raises MismatchError if they do not fit each other, or nothing would train.
        """
        check_model(model)
        self._net, self._steps = None, 0
        self._coded = Coded(self.artifact, self._options)
        net, swapped = swap_with(model, self.artifact, self._coded.make)
        self.fixed = dict.fromkeys(self._coded.frozen, "requires_grad is False")
        self._held = dict(self._coded.free())
        self._dense: dict[str, tuple[nn.Module, str]] = {}  # tensor of the file -> module and name that hold it
        self._given: dict[str, int] = {}  # and its bytes in that file, if it were coded alone
        self._steps_of: dict[str, _Steps] = {}  # of those that the file holds in fixed point
        self._sources: dict[str, str] = {}  # tensor of the net -> of the file
        finest = self._finest()
        for place, why in swapped:
            if place.source is None:
                continue
            self._sources |= dict.fromkeys(place.names, place.source)
            if why is not None:
                self._hold_dense(net, place.names[0], place.source, why, finest)
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise MismatchError(
                f"nothing of this {type(model).__name__} trains: {self.fixed}; name other kinds in train, of "
                f"{', '.join(KINDS)}, or unfreeze weights"
            )
        self._net = net
        keep_codes_here(net)
        if self._nbytes is not None and self._nbytes < self.artifact.nbytes:
            self.reassign()
        return net

    def step(self) -> None:
        """To be called after each step of the optimizer: rounds what runs to what the file holds, and takes codes anew
        when it is time. Raises PlanError in eval mode or before `prepare`, NonFiniteError as `reassign` does.
        """
        check_mode(self._prepared())
        self._settle()
        self._steps += 1
        if self._every is not None and self._steps % self._every == 0:
            self.reassign()

    def reassign(self) -> None:
        """New codes for all tensors with a shadow that trains; `step` calls this every `reassign_every` steps.

        Raises NonFiniteError if a tensor has come to hold NaN or infinity.
        """
        self._prepared()
        self._coded.reassign(self._spare() if self._options.hold_rate else 0.0)

    def finalize(self, metadata: Mapping[str, str] | None = None) -> Artifact:
        """The file of the net as it is now: it decodes to the very values that run. Training may go on after it.

        metadata: in place of the artifact's own. Raises NonFiniteError if training made a value NaN or infinite.
        """
        self._prepared()
        self._settle()
        exprs = self._coded.compacted()
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
        return state | {f"price.{name}": price for name, price in self._coded.prices.items()}

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
        masters = {name: held.master for name, held in self._held.items() if held.master is not None}
        for name, master in masters.items():
            found = state[f"master.{name}"]
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != tuple(master.shape):
                raise MismatchError(f"'master.{name}' of the state is {shape}, here it is {tuple(master.shape)}")
        self._steps = int(state["steps"])
        self._coded.set_prices({name: float(state[f"price.{name}"]) for name in self._coded})
        for name, held in self._held.items():
            master = state.get(f"master.{name}")
            if isinstance(master, Tensor):
                held.load(master)

    def _hold_dense(self, net: nn.Module, name: str, source: str, why: str, finest: int | None) -> None:
        """A tensor of the file that runs dense: held to what the file can hold, or left as it is."""
        module, _, attribute = name.rpartition(".")
        owner = net.get_submodule(module)
        tensor: Tensor = getattr(owner, attribute)
        parameter = isinstance(tensor, nn.Parameter)
        if parameter and (why != "raw" or not self._options.wants("raw") or not tensor.requires_grad):
            self.fixed[name] = "requires_grad is False" if not tensor.requires_grad else why
            tensor.requires_grad_(False)
            return
        self._dense[source] = owner, attribute
        expr = self.artifact[source]
        self._given[source] = _coded_nbytes(expr)
        if not tensor.is_floating_point():
            return
        values = self.artifact.decode(source)
        form = Form(dtype_name(values.dtype), mantissa_bits(values) or finest, 1.0)
        match expr:
            case Affine(Raw(whole), np.ndarray() as step, None):
                self._steps_of[source] = _Steps(step, whole.dtype)
                form = Form(dtype_name(whole.dtype), None, float(step.reshape(-1)[0]))
        zero = (values == 0) & (parameter and values.ndim > 1 and self._options.fix_zeros)
        if zero.any() or not form.exact:
            self._held[source] = Held(owner, attribute, form, zero)

    def _finest(self) -> int | None:
        """The most bits of mantissa that a raw tensor was rounded to: for those whose values do not tell."""
        raw = (entry for entry in self.artifact.entries.values() if isinstance(entry.skeleton, Raw))
        found = (mantissa_bits(self.artifact.decode(entry.name)) for entry in raw if entry.dtype in FLOATS)
        return max((bits for bits in found if bits is not None), default=None)

    def _settle(self) -> None:
        for held in self._held.values():
            held.settle()

    def _spare(self) -> float:
        """Bytes that there are for codes over those in the file given, and in relation to these: tensors that run
        dense may take less by now, and the file to be made may be of another size.
        """
        given, now = 0 if self._nbytes is None else self._nbytes - self.artifact.nbytes, 0
        for source, (owner, attribute) in self._dense.items():
            given += self._given[source]
            now += _coded_nbytes(self._as_filed(source, self._array(source, owner, attribute)))
        return (given - now) / max(self._coded.nbytes, 1)

    def _array(self, source: str, owner: nn.Module, attribute: str) -> np.ndarray:
        """A dense tensor in the dtype the file has it in."""
        tensor: Tensor = getattr(owner, attribute).detach().cpu()
        name = self.artifact.entries[source].dtype
        wide = tensor if name not in FLOATS or tensor.dtype == torch.float64 else tensor.float()
        return wide.numpy().astype(DTYPES[name])

    def _final(self, entry: Entry, exprs: Mapping[str, Expr]) -> Expr:
        holder = self._holder(entry.name)
        if holder in exprs:
            return exprs[holder]
        if holder in self._dense:
            values = self._array(holder, *self._dense[holder])
            if not np.isfinite(values).all() and np.isfinite(self.artifact.decode(holder)).all():
                raise diverged(holder)
            return self._as_filed(holder, values)
        return self.artifact[entry.name]

    def _as_filed(self, source: str, values: np.ndarray) -> Expr:
        """The values of a dense tensor as the file holds them: themselves, or as whole numbers of a step."""
        steps = self._steps_of.get(source)
        return (
            Raw(values) if steps is None else Affine(Raw(np.rint(values / steps.step).astype(steps.dtype)), steps.step)
        )

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


def _coded_nbytes(expr: Expr) -> int:
    """Bytes of all leaves, each coded alone: what a pool makes of several is not known before the file is made."""
    return sum(len(encode_leaf(array)[1]) for _, array in leaves(expr))


def _pace(every: int | None) -> float:
    return min(1.0, _STRIDE / (every or 1))
