"""The main path on one screen: a trained net in, one small verified file out, and back.

import codeword
artifact = codeword.compress("model.safetensors", target="30x")
artifact.save("model.cw")
model.load_state_dict(codeword.state_dict(codeword.load("model.cw")))
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

import numpy as np

from codeword import allocate, report
from codeword.artifact import Artifact
from codeword.calibrate import check_importance, importance_from_data
from codeword.data import Dataset, load_data
from codeword.errors import PlanError
from codeword.evaluate import Score
from codeword.evaluate import evaluate as score
from codeword.execute import Importance, Progress, run
from codeword.expr import FLOATS, Raw
from codeword.finetune import Finetune, History
from codeword.methods import Keep, Method, Prune
from codeword.methods.prune import Then
from codeword.plan import Plan, parse_method, select
from codeword.safetensors_file import write_safetensors
from codeword.sources import Source, open_source
from codeword.target import Target

if TYPE_CHECKING:
    import torch

Path: TypeAlias = str | os.PathLike[str]
DEFAULT_TARGET = "8x"


class TargetMissed(UserWarning):
    """The file is the nearest there is to the target, not within 2 % below it."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A net that was compressed: the artifact, and how it came about."""

    artifact: Artifact
    plan: Plan  # of this very artifact, or of what was trained from: compressing by it again gives the same bytes
    kept: dict[str, str]  # tensor -> why it was kept losslessly
    target_nbytes: int | None  # what the target meant in bytes; None if a plan was run
    missed: str | None  # what to tell the user if the target was missed
    histories: tuple[History, ...] = ()  # of training, stage by stage

    def trained(self, artifact: Artifact, histories: tuple[History, ...]) -> Compressed:
        """The same after training, which may have changed the file's size."""
        missed = None
        if self.target_nbytes is not None and self.plan.target is not None:
            least = (1 - allocate.TOLERANCE) * self.target_nbytes
            if not least <= artifact.nbytes <= self.target_nbytes:
                wanted = Target.parse(self.plan.target)
                missed = _missed(wanted, self.target_nbytes, artifact, "file that training left")
        return replace(self, artifact=artifact, histories=histories, missed=missed)


def fit(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    data: Iterable[Any] | Dataset | str | None = None,
    importance: Importance | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    finetune: Finetune | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    validation: Iterable[Any] | Dataset | str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[History], None] | None = None,
) -> Compressed:
    """Compress a net and tell how; the arguments are those of `compress`."""
    source = open_source(model)
    if type(seed) is not int or seed < 0:
        raise PlanError(f"seed must be a whole number >= 0, got {seed!r}")
    if method is not None and (target is not None or plan is not None):
        raise PlanError("give method alone: a target chooses methods by itself, and a plan names its own")
    if plan is not None and target is not None:
        raise PlanError("give target or plan, not both: a plan says all that a target would decide")
    data, validation = (load_data(it) if isinstance(it, str) else it for it in (data, validation))
    if data is not None:
        if importance is not None and finetune is None:
            raise PlanError("give data or importance, not both: data is what importance is made from")
        if not hasattr(model, "named_modules"):
            raise PlanError(f"data needs a model to run; {source.location} is only weights: pass the torch module")
        if finetune is None:
            importance = importance_from_data(model, data)
    job = _Job(
        target=target,
        plan=plan,
        method=parse_method(method) if isinstance(method, str) else method,
        importance=check_importance(importance, source.infos) if importance is not None else None,
        include=include,
        exclude=exclude,
        seed=seed,
        workers=workers,
        keep_nonfinite=keep_nonfinite,
        metadata=metadata,
        progress=progress,
    )
    if finetune is None:
        if loss is not None or validation is not None or checkpoint is not None or resume:
            raise PlanError("loss, validation, checkpoint and resume are for training; give finetune=Finetune(...) too")
        return job.run(source)
    if not isinstance(finetune, Finetune):
        raise PlanError(f"finetune must be options, Finetune(epochs=10) for instance, got {finetune!r}")
    if data is None:
        raise PlanError("finetune needs data to train on: give data=, a Dataset, the name of one or a loader")
    from codeword.train.pipeline import Start
    from codeword.train.pipeline import finetune as train

    made: list[Compressed] = []

    def compress_once(net: torch.nn.Module, zeros: frozenset[str], aim: float) -> Start:
        made.append(job.run(open_source(net), zeros, aim))
        return Start(made[-1].artifact, made[-1].target_nbytes)

    found = train(
        model,
        data,
        finetune,
        compress_once,
        loss=loss,
        validation=validation,
        checkpoint=None if checkpoint is None else FilePath(checkpoint),
        resume=resume,
        progress=progress,
        on_epoch=on_epoch,
    )
    return made[-1].trained(found.artifact, found.histories)


def compress(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    data: Iterable[Any] | Dataset | str | None = None,
    importance: Importance | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    finetune: Finetune | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    validation: Iterable[Any] | Dataset | str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[History], None] | None = None,
) -> Artifact:
    """Compress a net to a target, or by a plan.

    model: a path (safetensors, also sharded; a torch checkpoint), a torch module, or a mapping of arrays. target: "30x"
    (float32 bytes over file bytes), "120KB", "2.5bpw", or a number of bytes; 8x if neither target nor plan is given.
    data: batches of inputs, a Dataset or the name of one, to make errors cancel at the outputs of layers, where they do
    harm (needs a module; labels are not used). importance: the same by hand, tensor name -> what a squared error of
    each weight costs, an array of its shape, or `Moments` of what its rows multiply. plan: a `Plan`, or the path of
    one. method: one for all matrices and kernels, everything else kept: an object such as `KMeans(16)`, or
    "kmeans:n_clusters=16". include, exclude: globs on tensor names; what they leave out is kept losslessly. The same
    input, plan and seed give the same bytes with any number of workers.

    finetune: train the compressed net on `data`, batches (x, y) or a Dataset, and learn from the uncompressed one;
    nothing else is made of the data then. loss: (output, target) -> scalar, instead of cross entropy. validation: what
    is scored after each epoch, instead of a part of a Dataset that is held out. checkpoint: a folder for the state
    after each epoch; resume: go on from there. on_epoch: told of each epoch.

    Warns with TargetMissed if the nearest file is not within 2 % below the target. Raises SourceError, PlanError,
    TargetError, DataError; with finetune also MismatchError and TrainingError.
    """
    result = fit(
        model,
        target,
        data=data,
        importance=importance,
        plan=plan,
        method=method,
        include=include,
        exclude=exclude,
        finetune=finetune,
        loss=loss,
        validation=validation,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
        workers=workers,
        keep_nonfinite=keep_nonfinite,
        metadata=metadata,
        progress=progress,
        on_epoch=on_epoch,
    )
    if result.missed is not None:
        warnings.warn(result.missed, TargetMissed, stacklevel=2)
    return result.artifact


def load(path: Path, **options: int) -> Artifact:
    """Open a .cw file; reads the header only. Options are those of `Artifact.open`. Raises FormatError."""
    return Artifact.open(path, **options)


def state_dict(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All tensors decoded, for `model.load_state_dict`."""
    from codeword import nn

    return nn.state_dict(artifact)


def swap(model: torch.nn.Module, artifact: Artifact) -> torch.nn.Module:
    """A copy of the model whose layers hold their weights as expressions and run from them. Raises MismatchError."""
    from codeword import nn

    return nn.swap(model, artifact)


def inspect(file: Artifact | Path, original: Any = None) -> report.Report:  # noqa: ANN401
    """Measure a file: method, codewords, sparsity, bytes of each tensor; with an original also the errors."""
    return report.inspect(_opened(file), None if original is None else open_source(original))


def verify(file: Artifact | Path, original: Any = None) -> list[report.Difference]:  # noqa: ANN401
    """Read back every tensor, and compare with an original; what must not differ and does. Raises FormatError."""
    return list(report.verify(_opened(file), None if original is None else open_source(original)))


def decompress(file: Artifact | Path, path: Path) -> None:
    """Write the dense net as safetensors, tensor by tensor, in its own dtypes. Raises FormatError, WriteError."""
    artifact = _opened(file)
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in artifact.entries.values()]
    write_safetensors(path, tensors, artifact.decode)


def evaluate(
    file: Artifact | Path | torch.nn.Module,
    data: Dataset | str,
    *,
    model: torch.nn.Module | None = None,
    limit: int | None = None,
    batch_size: int = 500,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Score:
    """Top-1 and top-5 of a module, or of a file in the module it belongs to (`model`, which is not changed)."""
    dataset = load_data(data, limit=limit) if isinstance(data, str) else data
    if isinstance(file, (str, os.PathLike, Artifact)):
        if model is None:
            raise PlanError("evaluating a file needs the module it belongs to: give model=")
        net = swap(model, _opened(file))
    else:
        net = file
    return score(net, dataset, batch_size=batch_size, mean=mean, std=std)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What to make of a source in one go, without training."""

    target: str | float | None
    plan: Plan | Path | None
    method: Method | None
    importance: Importance | None
    include: Sequence[str]
    exclude: Sequence[str]
    seed: int
    workers: int
    keep_nonfinite: bool
    metadata: Mapping[str, str] | None
    progress: Progress | None

    def run(self, source: Source, zeros: frozenset[str] = frozenset(), aim: float = 1.0) -> Compressed:
        """Compress it. zeros: tensors whose zeros stay zero. aim: the size wanted over that of the target."""
        lossy = select(source.infos, self.include, self.exclude)
        plan, chosen = self.plan, "chosen by the plan"
        if self.method is not None:
            plan = _plan_of(self.method, source, lossy, self.seed)
            chosen = "not a matrix or kernel"
        if plan is not None:
            plan = plan if isinstance(plan, Plan) else Plan.load(plan)
            methods = {name: m if name in lossy else Keep() for name, m in plan.resolve(source.infos).items()}
            methods = {name: _with_zeros(m) if name in zeros else m for name, m in methods.items()}
            if self.include or self.exclude or zeros:
                plan = Plan.of(methods, source.infos, plan.seed, plan.target)
            artifact = self._execute(source, methods, plan.seed)
            kept = _kept(source, methods, lossy, artifact, self.keep_nonfinite, chosen)
            return Compressed(artifact, plan, kept, None, None)

        wanted = Target.parse(DEFAULT_TARGET if self.target is None else self.target)
        own = [info for info in source.infos if info.tied_to is None]
        budget = wanted.nbytes(sum(info.dense_nbytes for info in own), sum(info.size for info in own))
        curves = allocate.curves(
            source,
            lossy,
            importance=self.importance,
            keep_nonfinite=self.keep_nonfinite,
            progress=self.progress,
        )
        curves = {name: _ZerosStay(curve) if name in zeros else curve for name, curve in curves.items()}
        found = allocate.fit(curves, round(aim * budget), lambda methods: self._execute(source, methods, self.seed))
        made = Plan.of(found.methods, source.infos, self.seed, wanted.text)
        lossless = all(method == Keep() for method in found.methods.values())
        below = "lossless file" if lossless else "nearest file below it"
        what = "smallest file there is" if found.artifact.nbytes > budget else below
        missed = None if found.reached else _missed(wanted, budget, found.artifact, what)
        why = "not worth an error at this target"
        kept = _kept(source, found.methods, lossy, found.artifact, self.keep_nonfinite, why)
        return Compressed(found.artifact, made, kept, budget, missed)

    def _execute(self, source: Source, methods: Mapping[str, Method], seed: int) -> Artifact:
        return run(
            source,
            methods,
            seed=seed,
            workers=self.workers,
            importance=self.importance,
            keep_nonfinite=self.keep_nonfinite,
            metadata=self.metadata,
            progress=self.progress,
        )


@dataclass(frozen=True, slots=True)
class _ZerosStay:
    """The curve of a pruned tensor: its zeros are no matter of lambda."""

    curve: allocate.Curve

    def at(self, lam: float) -> allocate.Point:
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


def _opened(file: Artifact | Path) -> Artifact:
    return file if isinstance(file, Artifact) else Artifact.open(file)


def _missed(target: Target, budget: int, artifact: Artifact, what: str) -> str:
    off = f", {artifact.nbytes / budget - 1:+.1%}"
    return (
        f"target {target.text} is {budget} bytes; the {what} has {artifact.nbytes} bytes ({artifact.ratio:.2f}x{off})"
    )


def _kept(
    source: Source,
    methods: Mapping[str, Method],
    lossy: set[str],
    artifact: Artifact,
    keep_nonfinite: bool,
    chosen: str,
) -> dict[str, str]:
    """Why each tensor that is stored losslessly is; `chosen` says who decided where there was a choice."""
    reasons: dict[str, str] = {}
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
            reasons[info.name] = chosen
    return reasons


def _finite(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())  # in float32, where clustering works
