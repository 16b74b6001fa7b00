"""The main path on one screen: a trained net in, one small verified file out, and back.

import codeword
artifact = codeword.compress("model.safetensors", target="30x")
artifact.save("model.cw")
model.load_state_dict(codeword.state_dict(codeword.load("model.cw")))
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from codeword import allocate, report
from codeword.artifact import Artifact
from codeword.calibrate import check_importance, importance_from_data
from codeword.data import Dataset, load_data
from codeword.errors import PlanError
from codeword.evaluate import Score
from codeword.evaluate import evaluate as score
from codeword.execute import Progress, run
from codeword.expr import FLOATS, Raw
from codeword.methods import Keep, Method
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
    plan: Plan  # of this very artifact: compressing by it again gives the same bytes
    kept: dict[str, str]  # tensor -> why it was kept losslessly
    target_nbytes: int | None  # what the target meant in bytes; None if a plan was run
    missed: str | None  # what to tell the user if the target was missed


def fit(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    data: Iterable[Any] | Dataset | str | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a net and tell how; the arguments are those of `compress`."""
    source = open_source(model)
    if type(seed) is not int or seed < 0:
        raise PlanError(f"seed must be a whole number >= 0, got {seed!r}")
    if isinstance(data, str):
        data = load_data(data)
    if data is not None:
        if importance is not None:
            raise PlanError("give data or importance, not both: data is what importance is made from")
        if not hasattr(model, "named_modules"):
            raise PlanError(f"data needs a model to run; {source.location} is only weights: pass the torch module")
        importance = importance_from_data(model, data)
    weights = check_importance(dict(importance), source.infos) if importance is not None else None
    lossy = select(source.infos, include, exclude)
    chosen = "chosen by the plan"

    def execute(methods: Mapping[str, Method]) -> Artifact:
        return run(
            source,
            methods,
            seed=seed,
            workers=workers,
            importance=weights,
            keep_nonfinite=keep_nonfinite,
            metadata=metadata,
            progress=progress,
        )

    if method is not None:
        if target is not None or plan is not None:
            raise PlanError("give method alone: a target chooses methods by itself, and a plan names its own")
        plan = _plan_of(parse_method(method) if isinstance(method, str) else method, source, lossy, seed)
        chosen = "not a matrix or kernel"
    if plan is not None:
        if target is not None:
            raise PlanError("give target or plan, not both: a plan says all that a target would decide")
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        seed = plan.seed
        methods = {name: m if name in lossy else Keep() for name, m in plan.resolve(source.infos).items()}
        if include or exclude:
            plan = Plan.of(methods, source.infos, seed, plan.target)
        artifact = execute(methods)
        return Compressed(artifact, plan, _kept(source, methods, lossy, artifact, keep_nonfinite, chosen), None, None)

    wanted = Target.parse(DEFAULT_TARGET if target is None else target)
    own = [info for info in source.infos if info.tied_to is None]
    budget = wanted.nbytes(sum(info.dense_nbytes for info in own), sum(info.size for info in own))
    curves = allocate.curves(source, lossy, importance=weights, keep_nonfinite=keep_nonfinite, progress=progress)
    found = allocate.fit(curves, budget, execute)
    made = Plan.of(found.methods, source.infos, seed, wanted.text)
    lossless = all(method == Keep() for method in found.methods.values())
    missed = None if found.reached else _missed(wanted, budget, found.artifact, lossless)
    kept = _kept(source, found.methods, lossy, found.artifact, keep_nonfinite, "not worth an error at this target")
    return Compressed(found.artifact, made, kept, budget, missed)


def compress(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    data: Iterable[Any] | Dataset | str | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compress a net to a target, or by a plan.

    model: a path (safetensors, also sharded; a torch checkpoint), a torch module, or a mapping of arrays. target: "30x"
    (float32 bytes over file bytes), "120KB", "2.5bpw", or a number of bytes; 8x if neither target nor plan is given.
    data: batches of inputs, a Dataset or the name of one, to weigh errors by (needs a module; labels are not used).
    importance: the same by hand, tensor name -> array of its shape. plan: a `Plan`, or the path of one. method: one for
    all matrices and kernels, everything else kept: an object such as `KMeans(16)`, or "kmeans:n_clusters=16". include,
    exclude: globs on tensor names; what they leave out is kept losslessly. The same input, plan and seed give the same
    bytes with any number of workers.

    Warns with TargetMissed if the nearest file is not within 2 % below the target. Raises SourceError, PlanError,
    TargetError, DataError.
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
        seed=seed,
        workers=workers,
        keep_nonfinite=keep_nonfinite,
        metadata=metadata,
        progress=progress,
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


def _missed(target: Target, budget: int, artifact: Artifact, lossless: bool) -> str:
    off = f", {artifact.nbytes / budget - 1:+.1%}"
    if artifact.nbytes > budget:
        word = "smallest file there is"
    else:
        word = "lossless file" if lossless else "nearest file below it"
    return (
        f"target {target.text} is {budget} bytes; the {word} has {artifact.nbytes} bytes ({artifact.ratio:.2f}x{off})"
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
