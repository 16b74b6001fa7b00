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
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, TypeAlias

from codeword import report
from codeword.artifact import Artifact
from codeword.cache import Cache
from codeword.calibrate import check_importance
from codeword.candidates import Candidates
from codeword.data import Dataset, load_data
from codeword.drop import Labelled, Limit, Scored, Trial, check_most
from codeword.errors import DataError, PlanError
from codeword.evaluate import Score
from codeword.evaluate import evaluate as score_of
from codeword.execute import Importance, Progress
from codeword.finetune import Finetune, History
from codeword.fold import eps_of
from codeword.job import Calibrated, Compressed, Job, calibrated, runnable
from codeword.methods import Method
from codeword.plan import Plan, parse_method
from codeword.safetensors_file import write_safetensors
from codeword.sources import open_source

if TYPE_CHECKING:
    import torch

Path: TypeAlias = str | os.PathLike[str]


class TargetMissed(UserWarning):
    """The file is the nearest there is to the target, not within 1 % below it (2 % after training)."""


def fit(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    max_drop: float | None = None,
    data: Iterable[Any] | Dataset | str | None = None,
    net: torch.nn.Module | None = None,
    importance: Importance | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold_norms: bool = True,
    finetune: Finetune | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    validation: Iterable[Any] | Dataset | str | None = None,
    score: Callable[[torch.nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    cache: Cache | Path | bool = False,
    candidates: Candidates = "fast",
    progress: Progress | None = None,
    on_epoch: Callable[[History], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Compressed:
    """Compress a net and tell how; the arguments are those of `compress`."""
    source = open_source(model)
    if type(seed) is not int or seed < 0:
        raise PlanError(f"seed must be a whole number >= 0, got {seed!r}")
    if method is not None and (target is not None or plan is not None):
        raise PlanError("give method alone: a target chooses methods by itself, and a plan names its own")
    if plan is not None and target is not None:
        raise PlanError("give target or plan, not both: a plan says all that a target would decide")
    if max_drop is not None:
        max_drop = check_most(max_drop)
        if target is not None or plan is not None or method is not None:
            raise PlanError("give max_drop alone: a target, a plan or a method says itself how small the file shall be")
        if finetune is not None:
            raise PlanError(
                "max_drop is for files without training, which would move the drop; train to a target instead, 30x for "
                "instance, and compare the accuracies that its history tells"
            )
    elif score is not None or on_trial is not None:
        raise PlanError("score and on_trial are for a largest drop; give max_drop=0.5 for instance too")
    data, validation = (load_data(it) if isinstance(it, str) else it for it in (data, validation))
    module = model if net is None else net
    told: Calibrated | None = None
    if data is not None:
        if importance is not None and finetune is None:
            raise PlanError("give data or importance, not both: data is what importance is made from")
        runs = runnable(source, module if finetune is None else model)
        if finetune is None:
            told = calibrated(source, runs, data)
            importance = told.importance
    elif net is not None and max_drop is None:
        raise PlanError("net is what data runs through: give data too")
    limit = None if max_drop is None else _limit(max_drop, module, data, validation, score, on_trial)
    job = Job(
        target=target,
        plan=plan if plan is None or isinstance(plan, Plan) else Plan.load(plan),
        method=parse_method(method) if isinstance(method, str) else method,
        importance=check_importance(importance, source.infos) if importance is not None else None,
        sensitivity=None if told is None else told.sensitivity,
        anew=None if told is None else told.anew,
        include=include,
        exclude=exclude,
        fold_norms=fold_norms and finetune is None,
        eps=eps_of(module),
        seed=seed,
        workers=workers,
        keep_nonfinite=keep_nonfinite,
        metadata=metadata,
        progress=progress,
        limit=limit,
        cache=cache if isinstance(cache, Cache) else Cache.of(cache),
        candidates=candidates,
    )
    if finetune is None:
        if loss is not None or (validation is not None and limit is None) or checkpoint is not None or resume:
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


def _limit(
    most: float,
    net: Any,  # noqa: ANN401
    data: Iterable[Any] | Dataset | None,
    validation: Iterable[Any] | Dataset | None,
    score: Callable[[torch.nn.Module], float] | None,
    on_trial: Callable[[Trial], None] | None,
) -> Limit:
    """What may be lost, and who measures it: the user's function, or top-1 on labelled data."""
    if not hasattr(net, "named_modules"):
        raise PlanError("max_drop needs a model to run: pass the torch module as net")
    if score is not None:
        if validation is not None:
            raise PlanError("give score or validation, not both: each says how accuracy is measured")
        return Limit(most, Scored(net, score), on_trial)
    labelled = data if validation is None else validation
    if labelled is None:
        raise PlanError("max_drop measures accuracy: give data= or validation=, a labelled Dataset, or score=")
    if not isinstance(labelled, Dataset):
        raise DataError(
            f"max_drop needs labels, which a {type(labelled).__name__} of batches may lack: give a Dataset or the name "
            "of one as data= or validation=, or score=, a function of the net"
        )
    return Limit(most, Labelled(net, labelled, calibrated=validation is None), on_trial)


def compress(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    max_drop: float | None = None,
    data: Iterable[Any] | Dataset | str | None = None,
    net: torch.nn.Module | None = None,
    importance: Importance | None = None,
    plan: Plan | Path | None = None,
    method: Method | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold_norms: bool = True,
    finetune: Finetune | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    validation: Iterable[Any] | Dataset | str | None = None,
    score: Callable[[torch.nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    keep_nonfinite: bool = False,
    metadata: Mapping[str, str] | None = None,
    cache: Cache | Path | bool = False,
    candidates: Candidates = "fast",
    progress: Progress | None = None,
    on_epoch: Callable[[History], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Artifact:
    """Compress a net to a target, or by a plan.

    model: a path (safetensors, also sharded; a torch checkpoint), a torch module, or a mapping of arrays. target: "30x"
    (float32 bytes over file bytes), "120KB", "2.5bpw", or a number of bytes; 8x if nothing else is given. data: batches
    of inputs, a Dataset or the name of one, of which up to 1,024 examples make errors cancel at the outputs of layers,
    where they do harm; labels are not used. net: the module to run them, where `model` is only weights. importance:
    what errors cost, by hand: tensor name -> that of a squared error of each weight, an array of its shape, or
    `Moments` of what its rows multiply. plan: a `Plan`, or the path of one. method: one for all matrices and kernels,
    everything else kept: an object such as `KMeans(16)`, or "kmeans:n_clusters=16". include, exclude: globs on tensor
    names; what they leave out is kept losslessly. fold_norms: let a target, or max_drop, store batch norms as two
    vectors and two constants, which computes the same in eval mode; False for a net that is to be trained from the
    file. The same input, plan and seed give the same bytes with any number of workers. cache: a folder for what was
    coded, so that another target takes seconds; True is the platform's own, or $CODEWORD_CACHE. The file does not
    depend on it. candidates: what the plan for a target is made of. "fast" is rate-aware scalars and rounded floats,
    which nothing else comes near on convolutions; "all" tries vectors, templates, k-means and pruning on each tensor
    too, which may win a lot on large matrices, best with data, and takes minutes.

    max_drop: the smallest file that loses at most so many points of top-1 on `data`, a labelled Dataset or the name of
    one, or on `validation`; better not the test set, which then would measure nothing. score: a function of the net,
    in eval mode with the decoded weights, that is measured instead; higher is better. on_trial: told of each file that
    was measured. What was measured is `Compressed.measured` of `fit`.

    finetune: train the compressed net on `data`, batches (x, y) or a Dataset, and learn from the uncompressed one;
    nothing else is made of the data then. loss: (output, target) -> scalar, instead of cross entropy. validation: what
    is scored after each epoch, instead of a part of a Dataset that is held out. checkpoint: a folder for the state
    after each epoch; resume: go on from there. on_epoch: told of each epoch.

    Warns with TargetMissed if the nearest file is not within 1 % below the target, 2 % after training. Raises
    SourceError, PlanError, TargetError, DataError; with finetune also MismatchError and TrainingError.
    """
    result = fit(
        model,
        target,
        max_drop=max_drop,
        data=data,
        net=net,
        importance=importance,
        plan=plan,
        method=method,
        include=include,
        exclude=exclude,
        fold_norms=fold_norms,
        finetune=finetune,
        loss=loss,
        validation=validation,
        score=score,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
        workers=workers,
        keep_nonfinite=keep_nonfinite,
        metadata=metadata,
        cache=cache,
        candidates=candidates,
        progress=progress,
        on_epoch=on_epoch,
        on_trial=on_trial,
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
    return score_of(net, dataset, batch_size=batch_size, mean=mean, std=std)


def _opened(file: Artifact | Path) -> Artifact:
    return file if isinstance(file, Artifact) else Artifact.open(file)
