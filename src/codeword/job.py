"""One compression, without training: of a net, to a target, by a plan or by one method for all; and how it came about.

made = Job(target="30x", ...).run(open_source("model.safetensors"))
made.artifact.save("model.cw")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast, get_args

import numpy as np

from codeword import allocate, drop
from codeword.artifact import Artifact
from codeword.cache import Cache, Results
from codeword.calibrate import examples, importance_from_data
from codeword.candidates import Candidates
from codeword.curves import Curve, Fixed, Point, curves_of
from codeword.data import Dataset
from codeword.errors import PlanError
from codeword.execute import Importance, Progress, run
from codeword.expr import FLOATS, Raw
from codeword.finetune import History
from codeword.fold import Folded, Norm, foldable, norms_of
from codeword.methods import Keep, Method, Prune, is_lossless
from codeword.methods.base import MomentsMethod
from codeword.methods.prune import Then
from codeword.plan import Plan, select
from codeword.refine import refined
from codeword.sensitivity import from_data
from codeword.sources import Source
from codeword.steer import Steering
from codeword.target import Target

if TYPE_CHECKING:
    import torch

DEFAULT_TARGET = "8x"
_TURNS = 4  # files made anew at most, each steered by what the last came to
_TRAINED_TOLERANCE = 0.02  # below the target: what counts as reached where training has the last word
_AIM = 0.997  # of the budget: what they are steered to

_CONSTANT_BITS = 8.0  # that a vector of one value takes, with others of its kind
_FINEST = 22  # bits of mantissa, of float32's 23

# A file, the methods it was made by, their seed, what chooses others -> the file made anew, as `refine.refined` does.
Anew: TypeAlias = Callable[[Artifact, Mapping[str, Method], int, Steering | None], Artifact]


@dataclass(frozen=True, slots=True)
class Compressed:
    """A net that was compressed: the artifact, and how it came about."""

    artifact: Artifact
    # Of this very artifact, or of what was trained from: compressing by it again gives the same bytes, given the same
    # data too if there were any, unless a tensor had to stay out of what they improve for the target to be met.
    plan: Plan
    kept: dict[str, str]  # tensor -> why it was kept losslessly
    target_nbytes: int | None  # what the target meant in bytes; None if a plan was run
    missed: str | None  # what to tell the user if the target was missed
    histories: tuple[History, ...] = ()  # of training, stage by stage
    measured: drop.Measured | None = None  # what was lost, if the file was made to a largest drop

    def trained(self, artifact: Artifact, histories: tuple[History, ...]) -> Compressed:
        """The same after training, which may have changed the file's size."""
        missed = None
        if self.target_nbytes is not None and self.plan.target is not None:
            least = (1 - _TRAINED_TOLERANCE) * self.target_nbytes
            if not least <= artifact.nbytes <= self.target_nbytes:
                wanted = Target.parse(self.plan.target)
                missed = _missed(wanted, self.target_nbytes, artifact, "file that training left")
        return replace(self, artifact=artifact, histories=histories, missed=missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to make of a net. At most one of target, plan, method and limit is given; with none the target is 8x.

    method: for all matrices and kernels; the rest is kept. importance: what errors cost, by tensor; sensitivity: how
    much tensors count, if data tell. anew: what is made of each file in the end, which may change its size. limit: what
    the net may lose. include, exclude: globs on tensor names; what they leave out is kept. fold_norms: whether to fold
    batch norms where a target or a limit decides; eps: theirs, if a module tells. cache: where coded tensors are kept
    for other files, of this job and of others. candidates: what a target's plan is made of.
    """

    target: str | float | None
    plan: Plan | None
    method: Method | None
    importance: Importance | None
    anew: Anew | None
    include: Sequence[str]
    exclude: Sequence[str]
    seed: int
    workers: int
    keep_nonfinite: bool
    metadata: Mapping[str, str] | None
    progress: Progress | None
    sensitivity: Mapping[str, float] | None = None
    limit: drop.Limit | None = None
    fold_norms: bool = False
    eps: Mapping[str, float] | None = None
    cache: Cache = field(default_factory=Cache)
    candidates: Candidates = "fast"

    def folded(self, source: Source) -> Folded:
        """The source as this job sees it, with those norms folded that can be."""
        lossy = select(source.infos, self.include, self.exclude)
        return Folded(source, foldable(source, lossy, self.eps) if self.fold_norms else {})

    def curves(self, source: Source) -> dict[str, Curve]:
        """What each tensor offers, whatever the target. Raises PlanError, SourceError."""
        folded = self.folded(source)
        found = curves_of(
            folded,
            select(source.infos, self.include, self.exclude),
            importance=self.importance,
            sensitivity=self.sensitivity,
            keep_nonfinite=self.keep_nonfinite,
            candidates=self.candidates,
            seed=self.seed,
            results=Results(self.cache, folded, self.importance),
            progress=self.progress,
        )
        for norm in folded.norms:
            found |= {name: _NeverExact(found[name]) for name in (norm.weight, norm.bias)}
            found |= dict.fromkeys((norm.running_mean, norm.running_var), Fixed(_CONSTANT_BITS))
        return found

    def budget(self, source: Source) -> tuple[Target, int]:
        """The target, and the bytes that it means for this net. Raises TargetError."""
        wanted = Target.parse(DEFAULT_TARGET if self.target is None else self.target)
        own = [info for info in source.infos if info.tied_to is None]
        return wanted, wanted.nbytes(sum(info.dense_nbytes for info in own), sum(info.size for info in own))

    def run(
        self,
        source: Source,
        zeros: frozenset[str] = frozenset(),
        aim: float = 1.0,
        curves: Mapping[str, Curve] | None = None,
    ) -> Compressed:
        """Compress it.

        zeros: tensors whose zeros stay zero. aim: the size to make, over that of the target. curves: those of this
        job, if they are known from another target. Raises PlanError, TargetError, SourceError.
        """
        lossy = select(source.infos, self.include, self.exclude)
        if self.method is not None:
            plan = _plan_of(self.method, source, lossy, self.seed)
            return self._by_plan(source, plan, lossy, zeros, "not a matrix or kernel")
        if self.plan is not None:
            return self._by_plan(source, self.plan, lossy, zeros, "chosen by the plan")
        if self.limit is not None:
            return self._to_drop(source, lossy, self.limit)
        return self._to_target(source, lossy, zeros, aim, curves)

    def _by_plan(self, source: Source, plan: Plan, lossy: set[str], zeros: frozenset[str], chosen: str) -> Compressed:
        methods = {name: m if name in lossy else Keep() for name, m in plan.resolve(source.infos).items()}
        methods = {name: _with_zeros(m) if name in zeros else m for name, m in methods.items()}
        if self.include or self.exclude or zeros:
            plan = Plan.of(methods, source.infos, plan.seed, plan.target, fold_norms=plan.fold_norms)
        folded = Folded(source, {})
        if plan.fold_norms:
            known = norms_of(source.infos)
            eps = foldable(source, lossy, self.eps)
            folded = Folded(source, {place: it for place, it in eps.items() if _folds(known[place], methods)})
        results = Results(self.cache, folded, self.importance) if self.cache.lasts else None
        artifact = self._execute(folded, methods, plan.seed, results)
        if self.anew is not None:
            artifact = self.anew(artifact, methods, plan.seed, None)
        kept = _kept(folded, methods, lossy, artifact, self.keep_nonfinite, chosen)
        return Compressed(artifact, plan, kept, None, None)

    def _to_target(
        self,
        source: Source,
        lossy: set[str],
        zeros: frozenset[str],
        aim: float,
        curves: Mapping[str, Curve] | None,
    ) -> Compressed:
        wanted, budget = self.budget(source)
        curves = self.curves(source) if curves is None else curves
        curves = {name: _ZerosStay(curve) if name in zeros else curve for name, curve in curves.items()}
        folded = self.folded(source)
        found = self._fit(folded, curves, round(aim * budget))
        made = plan_for(folded, found.methods, self.seed, wanted.text)
        below = "lossless file" if is_lossless(found.methods.values()) else "nearest file below it"
        what = "smallest file there is" if found.artifact.nbytes > budget else below
        missed = None if found.reached else _missed(wanted, budget, found.artifact, what)
        why = "not worth an error at this target"
        kept = _kept(folded, found.methods, lossy, found.artifact, self.keep_nonfinite, why)
        return Compressed(found.artifact, made, kept, budget, missed)

    def _to_drop(self, source: Source, lossy: set[str], limit: drop.Limit) -> Compressed:
        folded = self.folded(source)
        results = Results(self.cache, folded, self.importance)

        def make(methods: dict[str, Method]) -> Artifact:
            artifact = self._execute(folded, methods, self.seed, results)
            if self.anew is None or not any(isinstance(method, MomentsMethod) for method in methods.values()):
                return artifact
            return self.anew(artifact, methods, self.seed, None)

        found = drop.smallest(self.curves(source), limit, make)
        plan = plan_for(folded, found.methods, self.seed, None)
        why = "not worth an error at this drop"
        kept = _kept(folded, found.methods, lossy, found.artifact, self.keep_nonfinite, why)
        return Compressed(found.artifact, plan, kept, None, None, measured=found.measured)

    def _fit(self, source: Folded, curves: dict[str, Curve], budget: int) -> allocate.Fit:
        """The best file within the budget, made anew, which changes its size: so it is steered, and made again."""
        results = Results(self.cache, source, self.importance)
        first = allocate.fit(curves, budget, lambda methods: self._execute(source, methods, self.seed, results))
        again = {name: method for name, method in first.methods.items() if isinstance(method, MomentsMethod)}
        if self.anew is None or not again:
            return first
        if not first.reached:
            return replace(first, artifact=self.anew(first.artifact, again, self.seed, None))
        best, goal, factor = first, _AIM * budget, 1.0
        for _ in range(_TURNS):
            steering = Steering(curves, first.artifact, again, goal, factor)
            artifact = self.anew(first.artifact, again, self.seed, steering)
            reached = (1 - allocate.TOLERANCE) * budget <= artifact.nbytes <= budget
            if reached or (artifact.nbytes <= budget and (best is first or artifact.nbytes > best.artifact.nbytes)):
                best = allocate.Fit(artifact, first.methods | steering.methods, reached)
            if reached:
                break
            goal, factor = goal * _AIM * budget / artifact.nbytes, steering.factor
        return best

    def _execute(self, source: Folded, methods: Mapping[str, Method], seed: int, results: Results | None) -> Artifact:
        if is_lossless(methods.values()):  # lossless means what there was
            source, results = Folded(source.source, {}), None
        return run(
            source,
            methods,
            seed=seed,
            workers=self.workers,
            importance=self.importance,
            keep_nonfinite=self.keep_nonfinite,
            metadata=source.metadata | dict(self.metadata or {}),
            progress=self.progress,
            results=results,
        )


def runnable(source: Source, model: Any) -> torch.nn.Module:  # noqa: ANN401
    """The module that data can run through. Raises PlanError if it is none."""
    if hasattr(model, "named_modules"):
        return model
    raise PlanError(f"data needs a model to run; {source.location} is only weights: pass the torch module as net")


def plan_for(folded: Folded, methods: Mapping[str, Method], seed: int, target: str | None) -> Plan:
    """The plan that says these methods, and to fold norms again unless it keeps every bit."""
    folds = bool(folded.eps) and not is_lossless(methods.values())
    return Plan.of(methods, folded.infos, seed, target, fold_norms=folds)


class Calibrated(NamedTuple):
    """What a `Job` makes of data: the fields of those names."""

    importance: Importance
    sensitivity: Mapping[str, float]
    anew: Anew


def calibrated(source: Source, model: torch.nn.Module, data: Iterable[Any] | Dataset) -> Calibrated:
    """What data that run through the module of a source tell. Raises DataError."""
    seen = examples(data)
    names = {info.name for info in source.infos}  # of a tied weight, file and module may each have one name
    importance = {name: cost for name, cost in importance_from_data(model, seen).items() if name in names}

    def anew(artifact: Artifact, methods: Mapping[str, Method], seed: int, steering: Steering | None) -> Artifact:
        return refined(artifact, methods, seed, model=model, data=seen, steering=steering)

    return Calibrated(importance, from_data(model, seen, importance), anew)


@dataclass(frozen=True, slots=True)
class _NeverExact:
    """The curve of a tensor that is another already than the original's: to keep every bit of it is no use."""

    curve: Curve

    def at(self, lam: float) -> Point:
        """The point of the curve, at most with the most bits of mantissa that rounding leaves."""
        point = self.curve.at(lam)
        return point._replace(method=Keep(_FINEST)) if point.method == Keep() else point


def _folds(norm: Norm, methods: Mapping[str, Method]) -> bool:
    """Whether methods make something else of a norm's weight and bias, and nothing of its statistics."""
    changed = all(methods[name] != Keep() for name in (norm.weight, norm.bias))
    return changed and all(methods[name] == Keep() for name in (norm.running_mean, norm.running_var))


@dataclass(frozen=True, slots=True)
class _ZerosStay:
    """The curve of a pruned tensor: its zeros are no matter of lambda."""

    curve: Curve

    def at(self, lam: float) -> Point:
        """The point of the weights that are there."""
        point = self.curve.at(lam)
        return point._replace(method=_with_zeros(point.method))


def _with_zeros(method: Method) -> Method:
    """The method for a tensor whose zeros stay zero."""
    wraps = isinstance(method, get_args(Then)) and not isinstance(method, Keep)
    return Prune(then=cast(Then, method)) if wraps else method


def _plan_of(method: Method, source: Source, lossy: set[str], seed: int) -> Plan:
    """One method for the tensors worth clustering: those of two dimensions and more."""
    chosen: dict[str, Method] = {
        info.name: method
        for info in source.infos
        if info.name in lossy and len(info.shape) > 1 and info.dtype in FLOATS and info.tied_to is None
    }
    if not chosen:
        raise PlanError(f"{source.location}: no tensor of floats with two dimensions or more to apply {method!r} to")
    return Plan.of(chosen, source.infos, seed, None)


def _missed(target: Target, budget: int, artifact: Artifact, what: str) -> str:
    off = f", {artifact.nbytes / budget - 1:+.1%}"
    return (
        f"target {target.text} is {budget} bytes; the {what} has {artifact.nbytes} bytes ({artifact.ratio:.2f}x{off})"
    )


def _kept(
    source: Folded,
    methods: Mapping[str, Method],
    lossy: set[str],
    artifact: Artifact,
    keep_nonfinite: bool,
    chosen: str,
) -> dict[str, str]:
    """Why each tensor that is stored losslessly is; `chosen` says who decided where there was a choice."""
    reasons: dict[str, str] = {}
    folded = {} if is_lossless(methods.values()) else _constants(source)
    for info in source.infos:
        if info.tied_to is not None:
            continue
        if keep_nonfinite and info.name in lossy and info.dtype in FLOATS and not _finite(artifact.decode(info.name)):
            reasons[info.name] = "holds NaN or infinity, or values that float32 cannot hold"
            continue
        if methods[info.name] != Keep():
            raw = isinstance(artifact.entries[info.name].skeleton, Raw)
            if raw and not isinstance(methods[info.name], Keep) and info.dtype in FLOATS:
                reasons[info.name] = (
                    "too near the largest value of its dtype, or too small for float32, to be approximated"
                    if info.size
                    else "empty"
                )
            continue
        if info.name not in lossy:
            reasons[info.name] = "left out by include or exclude"
        elif info.dtype not in FLOATS:
            reasons[info.name] = f"{info.dtype} values are never approximated"
        elif not info.size:
            reasons[info.name] = "empty"
        else:
            reasons[info.name] = folded.get(info.name, chosen)
    return reasons


def _constants(source: Folded) -> dict[str, str]:
    """Statistics of folded norms, which are constants now."""
    names = (name for norm in source.norms for name in (norm.running_mean, norm.running_var))
    return dict.fromkeys(names, "folded into their norms' weight and bias")


def _finite(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())  # in float32, where clustering works
