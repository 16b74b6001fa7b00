"""Pruning while a net trains: masks that come about along a ramp, of weights that may return until it ends.

A loop of one's own gains three lines:

    pruner = Pruner(0.9, steps=2 * len(loader))                  # 90 % zeros, after two epochs
    model = pruner.prepare(model.train())
    for epoch in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()
            pruner.step()
    pruner.finalize().save("model.cw")
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.errors import MismatchError, NonFiniteError, PlanError
from codeword.execute import Importance, run, tensor_seed
from codeword.math.ranking import Pattern, Ranked, macs_range, rank
from codeword.methods import Keep, Method, Prune
from codeword.methods.base import as_rows
from codeword.methods.prune import parse_pattern
from codeword.plan import Plan, parse_method, select
from codeword.sources import TensorInfo, open_source
from codeword.train.checks import check_mode, check_model
from codeword.train.macs import Counts, tally, uses
from codeword.train.weights import LayerWeight, bare, layer_weights

Criterion: TypeAlias = Literal["saliency", "magnitude", "random"]
Scope: TypeAlias = Literal["global", "kinds", "layer"]
_REMAKES = 25  # masks along a ramp, unless `every` says otherwise
_FADE = 0.8  # of the sums of gradients that is left when masks are made: a few steps alone are too noisy a sample
_LEAST = 0.1  # of the share that the net keeps, every tensor keeps this part at least


@dataclass(slots=True)
class _Masked:
    """A weight under training: what is pruned of it now, what that would be, and what its gradients were."""

    weight: LayerWeight
    pruned: Tensor  # bool; strides, device of the parameter, as are all three
    hidden: Tensor | None  # 0 where a weight stays; None once masks are final
    sums: Tensor | None  # of gradient magnitudes, older ones faded; None where nothing asks for them


class Pruner:
    """Makes the weights of linear, convolution and embedding layers zero while a net trains.

    sparsity: share of their weights that become zero; None keeps to the zeros that are there. steps: optimizer steps
    over which it comes about, after the first `begin`: at step t of them it is 1 - (1 - t / steps)**3 of the whole
    (Zhu & Gupta 2017), so that most go early and the last ones slowly; 0: at once. Masks are made anew each `every`
    steps (25 times by default); until the last time a pruned weight goes on being trained out of sight and returns
    when it has become worth more than another.

    criterion: what a weight is worth. "saliency": its square times the sum of its gradient's magnitudes over all steps
    so far (Jia 2019, but for the square: gradients are a noisy sample), as a share of the sum of those of its tensor
    that are worth no less, so that the scale of a layer does not decide and the last of a layer goes last; with each
    new mask what was summed fades to 0.8, for it is of another net. "magnitude"; "random". Saliency is ahead where few
    weights are left; while most are and training is a few hundred steps, magnitude may be.
    scope: what is ranked together, "global" all weights (layer rates follow by themselves), "kinds" convolutions apart
    from the rest, "layer" each tensor alone. No tensor is emptied: a tenth of what the net keeps on average stays in
    each. pattern: "2:4" for 2 of each 4 neighbouring inputs, "block 4x1" for whole blocks of 4 outputs and 1 input.
    macs: with scope "kinds", the share of multiply-accumulates to save as well, counted on `example`, a batch of
    inputs. include, exclude: globs on the names of weights.

    A weight under several names has one mask. Parameters stay parameters and hold zeros: any optimizer, mixed
    precision, torch.compile and DistributedDataParallel work as they do without. `skipped` says of every other
    parameter why it is left alone. Raises PlanError for options that are wrong.
    """

    def __init__(
        self,
        sparsity: float | None,
        *,
        steps: int = 0,
        begin: int = 0,
        every: int | None = None,
        criterion: Criterion = "saliency",
        scope: Scope = "global",
        pattern: str | None = None,
        macs: float | None = None,
        example: Tensor | tuple[Any, ...] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        Prune(sparsity, pattern=pattern)  # the same options, refused in the same words
        for name, value, least in (("steps", steps, 0), ("begin", begin, 0), ("every", every, 1), ("seed", seed, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise PlanError(f"Pruner: {name} must be a whole number >= {least}, got {value!r}")
        for name, word, words in (("criterion", criterion, Criterion), ("scope", scope, Scope)):
            if word not in get_args(words):
                raise PlanError(f"Pruner: {name} must be one of {', '.join(get_args(words))}, got {word!r}")
        self._pattern = None if pattern is None else Pattern(*parse_pattern(pattern))
        if sparsity is None and self._pattern is not None:
            sparsity = 1 - self._pattern.n / self._pattern.m
        if sparsity is not None and steps == 0 and criterion == "saliency":
            raise PlanError(
                'Pruner: saliency needs gradients, so steps >= 1; at once go criterion="magnitude" and "random"'
            )
        if macs is not None and (sparsity is None or scope != "kinds" or example is None or not 0 < macs < 1):
            raise PlanError(
                "Pruner: macs is a share in 0..1 of the multiply-accumulates to save beside a sparsity; it needs "
                f'scope="kinds" and an example input, got macs={macs!r}, sparsity={sparsity!r}, scope={scope!r}, '
                f"example={'none' if example is None else 'given'}"
            )
        self.sparsity = sparsity
        self.steps, self.begin, self.every = steps, begin, every or max(1, steps // _REMAKES)
        self.criterion, self.scope, self.pattern, self.macs = criterion, scope, pattern, macs
        self.include, self.exclude, self.seed = include, exclude, seed
        self.skipped: dict[str, str] = {}
        self._example = example
        self._model: nn.Module | None = None
        self._masked: list[_Masked] = []
        self._uses: dict[str, int] = {}
        self._taken = 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model itself, ready for a loop; to be wrapped for distribution or compiled before or after this.

        Raises MismatchError if its weights are not what trains, PlanError if nothing is left to prune, a glob matches
        nothing, or no masks could save that many multiply-accumulates.
        """
        self._model = None  # until all is well: a pruner that was refused a net is not ready for a loop
        check_model(model)
        net = bare(model)
        found, self.skipped = layer_weights(net)
        infos = [TensorInfo(it.name, tuple(it.parameter.shape), "float32", it.kind) for it in found]
        if infos:
            chosen = select(infos, self.include, self.exclude)
            self.skipped |= {
                name: "left out by include or exclude" for it in found for name in it.names if it.name not in chosen
            }
            found = [it for it in found if it.name in chosen]
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:5])
            raise PlanError(f"Pruner: this {type(net).__name__} has nothing to prune ({reasons}, ...)")
        self._taken = 0
        self._masked = [self._start(it) for it in found]
        self._uses = {} if self._example is None else uses(net, found, self._example)
        self._check_macs(infos, type(net).__name__)
        self._model = net
        if self.sparsity is not None and not self._last:
            self._remake(1.0)
        self._apply()
        return model

    def step(self) -> None:
        """To be called after each step of the optimizer, before gradients are cleared.

        Raises PlanError in eval mode, before `prepare`, or where saliency finds no gradient; NonFiniteError if a
        weight or its gradients are no longer finite when masks are made.
        """
        net = self._net()
        check_mode(net)
        self._taken += 1
        for it in self._masked:
            _follow(it)
        moving = self._taken <= self._last
        if moving and self.criterion == "saliency":
            self._gather()
        self._apply()
        at = self._taken - self.begin
        if moving and at > 0 and (at % self.every == 0 or self._taken == self._last):
            self._remake(1 - (1 - at / self.steps) ** 3)

    def finalize(
        self,
        method: Method | str | Plan | None = None,
        *,
        seed: int = 0,
        workers: int = 1,
        importance: Importance | None = None,
    ) -> Artifact:
        """The net as it is now as an artifact, zeros at their places: everything else lossless, or by a method or plan.

        method: for what stays of the pruned tensors, such as KMeans(16) or its text; a plan says what each tensor gets.
        Zeros stay zero under both. Warns if the ramp has not ended.
        """
        net = self._net()
        if not self.settled:
            now = self.report().sparsity
            warnings.warn(
                f"pruning ends early: {self._taken} of {self._last} steps were made, and {now:.1%} of the weights are "
                f"zero, not {self.sparsity:.1%}; give the Pruner fewer steps or train longer",
                stacklevel=2,
            )
        source = open_source(net)
        masked = {name for it in self._masked for name in it.weight.names}
        method = parse_method(method) if isinstance(method, str) else method
        if isinstance(method, Plan):
            methods = method.resolve(source.infos)
        else:
            own = [info.name for info in source.infos if info.tied_to is None]
            methods = {name: (method or Keep()) if name in masked else Keep() for name in own}
        methods = {
            name: Prune(None, then=it) if name in masked and not isinstance(it, Prune) else it  # type: ignore[arg-type]
            for name, it in methods.items()
        }
        return run(source, methods, seed=seed, workers=workers, importance=importance)

    def report(self) -> Counts:
        """Weights and multiply-accumulates (if there was an example) of each pruned tensor, dense and kept."""
        kept = {it.weight.name: int((~it.pruned).sum()) for it in self._masked}
        return tally(self._net(), [it.weight for it in self._masked], kept, self._uses)

    @property
    def settled(self) -> bool:
        """Whether masks are final; a net that is taken before has fewer zeros than were asked for."""
        return self._taken >= self._last

    @property
    def masks(self) -> dict[str, Tensor]:
        """Weight name -> what stays of it now, bool; of a shared weight under its first name."""
        return {it.weight.name: ~it.pruned for it in self._masked}

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """What the model and its optimizer do not hold: masks, hidden weights, sums of gradients, the step."""
        self._net()
        state: dict[str, Tensor | int | float | str] = {"step": self._taken, "options": self._options()}
        for it in self._masked:
            parts = {"pruned": it.pruned.to(torch.uint8), "hidden": it.hidden, "sums": it.sums}
            state |= {f"{part}.{it.weight.name}": value.clone() for part, value in parts.items() if value is not None}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state, after `prepare` on the same net with the same options.

        Raises MismatchError, naming both, where they are not the same.
        """
        self._net()
        if state.get("options") != self._options():
            raise MismatchError(f"the state is of Pruner({state.get('options')}), this is Pruner({self._options()})")
        moving = int(state["step"]) < self._last
        parts = ["pruned", *["hidden"] * moving, *["sums"] * (moving and self.criterion == "saliency")]
        for part, it in itertools.product(parts, self._masked):
            name, shape = f"{part}.{it.weight.name}", tuple(it.pruned.shape)
            found = tuple(state[name].shape) if name in state else "missing"
            if found != shape:
                raise MismatchError(f"{name!r} of the state is {found}, the weight {shape}")
        for it in self._masked:
            it.hidden = it.sums = None
            for part in parts:
                value = state[f"{part}.{it.weight.name}"]
                dtype = torch.bool if part == "pruned" else value.dtype
                setattr(it, part, torch.empty_like(it.pruned, dtype=dtype).copy_(value))
            _follow(it)
        self._taken = int(state["step"])
        self._apply()

    @property
    def _last(self) -> int:
        """The step whose masks stay."""
        return 0 if self.sparsity is None or not self.steps else self.begin + self.steps

    def _options(self) -> str:
        words = [f"{self.sparsity!r}"]
        for name in ("steps", "begin", "every", "criterion", "scope", "pattern", "macs", "include", "exclude", "seed"):
            words.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(words)

    def _net(self) -> nn.Module:
        if self._model is None:
            raise PlanError("Pruner: call prepare(model) first")
        return self._model

    def _start(self, weight: LayerWeight) -> _Masked:
        values = weight.parameter.detach()
        moving = self._last > 0
        pruned = values == 0 if self.sparsity is None else torch.zeros_like(values, dtype=torch.bool)
        sums = moving and self.criterion == "saliency"
        return _Masked(
            weight,
            pruned,
            torch.zeros_like(values) if moving else None,
            torch.zeros_like(values, dtype=torch.float32) if sums else None,
        )

    def _check_macs(self, infos: Sequence[TensorInfo], net: str) -> None:
        if self.macs is None or self.sparsity is None:
            return
        if len(self._groups()) < 2:
            raise PlanError(
                f"Pruner: macs needs convolutions and other layers to choose between, and this "
                f"{net} has only one of both to prune; leave macs out"
            )
        sizes = {info.name: info.size for info in infos}
        used = [it.weight.name for it in self._masked]
        low, high = macs_range(
            [sizes[name] for name in used], [self._uses.get(name, 0) for name in used], self.sparsity
        )
        if not low <= self.macs <= high:
            raise PlanError(
                f"Pruner: masks of {self.sparsity:.1%} zeros save from {low:.1%} to {high:.1%} of the "
                f"multiply-accumulates of this {net}, not {self.macs:.1%}; change either share"
            )

    @torch.no_grad()
    def _gather(self) -> None:
        """Adds the gradients of this step to the sums.

        Where a loss scaler has met an overflow, they are not finite and the optimizer was not run: nothing is added.
        """
        gradients = [it.weight.parameter.grad for it in self._masked]
        if all(gradient is None for gradient in gradients):
            raise PlanError(
                "Pruner: no weight has a gradient; call step() right after optimizer.step(), before zero_grad()"
            )
        for it, gradient in zip(self._masked, gradients, strict=True):
            if it.sums is not None and gradient is not None:
                it.sums.add_(gradient.abs().nan_to_num_(0, 0))

    @torch.no_grad()
    def _apply(self) -> None:
        """Makes pruned weights zero; what an optimizer's step has made of them is its update, and goes to the hidden.

        hidden + p - p is 0 to the last bit where a weight stays and its hidden part was 0.
        """
        for it in self._masked:
            parameter = it.weight.parameter
            if it.hidden is not None:
                it.hidden.add_(parameter)
            parameter.masked_fill_(it.pruned, 0)
            if it.hidden is not None:
                it.hidden.sub_(parameter)

    @torch.no_grad()
    def _remake(self, share: float) -> None:
        """Masks of that share of the sparsity; weights that return are what they were trained to be out of sight."""
        if self.sparsity is None:
            return
        weights = [_whole(it) for it in self._masked]
        ranked = [
            Ranked(as_rows(self._scores(it, weight)), self._uses.get(it.weight.name, 0))
            for it, weight in zip(self._masked, weights, strict=True)
        ]
        sparsity = self.sparsity * share
        masks = rank(
            ranked,
            self._groups(),
            sparsity,
            pattern=self._pattern,
            macs=None if self.macs is None else self.macs * share,
            least=0.0 if self.scope == "layer" else _LEAST * (1 - sparsity),
            adaptive=self.criterion == "saliency",
        )
        final = self.settled
        for it, weight, mask in zip(self._masked, weights, masks, strict=True):
            parameter = it.weight.parameter
            it.pruned.copy_(torch.from_numpy(~mask).reshape(parameter.shape))
            parameter.copy_(weight).masked_fill_(it.pruned, 0)
            it.hidden = None if final else weight.sub_(parameter)
            if it.sums is not None:
                it.sums = None if final else it.sums.mul_(_FADE)

    def _scores(self, it: _Masked, weight: Tensor) -> np.ndarray:
        """What the weights of a tensor are worth, float32 of its shape. `weight`: its values, hidden ones included.

        Held out, percent, LeNet-5 at 99 % after two epochs (two seeds) and ResNet-20 at 90 % after half a one: products
        of magnitude and gradient over their norm 98.5, 98.7 and 65.0; their squares as shares 98.6, 98.6 and 73.8, with
        the gradient to the first power, as here, 98.6, 98.5 and 77.0, without it 97.9, 98.0 and 75.5; global magnitude
        98.0, 98.0 and 72.5.
        """
        if self.criterion == "random":
            return tensor_seed(self.seed, it.weight.name).random(tuple(weight.shape), np.float32)
        scores = weight.abs().float()  # its own memory: changed below
        if it.sums is not None:
            scores.mul_(it.sums.sqrt())
        most = float(scores.max()) if scores.numel() else 0.0
        if not math.isfinite(most):
            raise NonFiniteError(
                f"{it.weight.name!r} or its gradients hold NaN or infinity at step {self._taken}: training diverged; "
                "go back to an earlier state and lower the learning rate"
            )
        if it.sums is not None and most > 0:
            scores.div_(most).square_()  # which would leave float32's range as they were
        return scores.cpu().contiguous().numpy()

    def _groups(self) -> list[list[int]]:
        """Indices of the weights that are ranked together."""
        count = range(len(self._masked))
        if self.scope == "layer":
            return [[at] for at in count]
        if self.scope == "global":
            return [list(count)]
        convs = [at for at in count if self._masked[at].weight.kind == "conv"]
        return [group for group in (convs, [at for at in count if at not in convs]) if group]


def _whole(it: _Masked) -> Tensor:
    """The weight with what is hidden of it."""
    values = it.weight.parameter.detach().clone()
    return values if it.hidden is None else values.add_(it.hidden)


def _follow(it: _Masked) -> None:
    """Puts the state of a weight where the weight is by now, should the model have been moved."""
    values = it.weight.parameter
    if it.pruned.device == values.device and it.pruned.stride() == values.stride():
        return
    for part in ("pruned", "hidden", "sums"):
        held: Tensor | None = getattr(it, part)
        if held is not None:
            setattr(it, part, torch.empty_like(values, dtype=held.dtype, requires_grad=False).copy_(held))
