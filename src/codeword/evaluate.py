"""How good a model is on labelled data: top-1, top-5, how often two models agree. Imports torch only when called."""

from __future__ import annotations

import difflib
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codeword.data import Dataset
from codeword.errors import DataError, MissingDependencyError, SourceError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Score:
    """What a model scored.

    top1, top5: percent of n examples whose label is the first, or among the first five, by logit (equal logits: the
    lower class number first). top5 is None with fewer than six classes, where it says nothing. seconds: wall time.
    """

    top1: float
    top5: float | None
    n: int
    seconds: float


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 500,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Score:
    """Top-1 and top-5 of a classifier that maps a batch of x to logits (batch, classes).

    mean, std: one value for each channel, for a model that does not normalise its input itself; x becomes
    (x - mean) / std. The model runs in eval mode on the device it is on; every module's mode is put back afterwards.
    Raises DataError if the set is empty, the model does not take its shape, a label is no class of the model, or a
    logit is NaN; MissingDependencyError without torch.
    """
    return _score(model, dataset, batch_size, mean, std)[0]


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 500,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Score, Score, float]:
    """The scores of two models, and the percent of examples on which they have the same top-1 class.

    Each model runs once. Options and errors as for `evaluate`.
    """
    score_a, first_a = _score(model_a, dataset, batch_size, mean, std)
    score_b, first_b = _score(model_b, dataset, batch_size, mean, std)
    return score_a, score_b, 100 * int((first_a == first_b).sum()) / len(dataset)


def hits(model: nn.Module, dataset: Dataset, *, batch_size: int = 500, nan_is_wrong: bool = False) -> np.ndarray:
    """(n,) bool: whether each example's label is the top-1 class; nan_is_wrong: NaN logits are no error but no hit.

    The rest as for `evaluate`.
    """
    return classes(model, dataset, batch_size=batch_size, nan_is_none=nan_is_wrong) == dataset.y


def classes(model: nn.Module, dataset: Dataset, *, batch_size: int = 500, nan_is_none: bool = False) -> np.ndarray:
    """(n,) the top-1 class of each example; nan_is_none: of NaN logits it is -1, and no error.

    The rest as for `evaluate`.
    """
    return _top5(model, dataset, batch_size, None, None, nan_is_wrong=nan_is_none)[0][:, 0]


def _score(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[Score, np.ndarray]:
    """The score and the top-1 class of every example (n,)."""
    start = time.perf_counter()
    top, classes = _top5(model, dataset, batch_size, mean, std)
    hits = top == dataset.y[:, None]
    n = len(dataset)
    top5 = 100 * int(hits.sum()) / n if classes > 5 else None
    return Score(100 * int(hits[:, 0].sum()) / n, top5, n, time.perf_counter() - start), top[:, 0]


def load_factory(name: str) -> Callable[..., Any]:
    """The callable that "module:factory" names, e.g. "codeword.zoo:lenet5".

    Modules of the current folder are found too, after those that are installed. Raises SourceError if the name has
    another form, the module cannot be imported, or it has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or ":" in attribute:
        raise SourceError(f"{name!r} names no model; expected 'module:factory', e.g. 'codeword.zoo:lenet5'")
    folder = str(Path.cwd())
    if folder not in sys.path:
        # It stays: a factory may import its neighbours when it is called. Last, so that it hides nothing installed.
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SourceError(f"{name!r}: no module {error.name!r}, neither installed nor in {folder}") from error
        what = f"{name!r}: module {module_name!r} needs {error.name!r}, which is not installed"
        if error.name == "torch":
            raise MissingDependencyError(f'{what}: pip install "codeword[torch]"') from error
        raise SourceError(what) from error
    except Exception as error:
        # A user's module may raise anything; the cause is kept.
        raise SourceError(f"{name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if callable(factory):
        return factory
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(attribute, public, n=1)
    where = f"module {module_name!r} ({getattr(module, '__file__', None) or 'no file'})"
    found = f"{attribute!r} is a {type(factory).__name__}, not callable" if hasattr(module, attribute) else ""
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SourceError(f"{name!r}: {where}: {found or f'has no {attribute!r}'}{hint}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own mode again (a frozen BatchNorm in a training net stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _top5(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    nan_is_wrong: bool = False,
) -> tuple[np.ndarray, int]:
    """The five best classes of every example, best first, equal logits by class number: (n, at most 5); and classes.

    nan_is_wrong: where a logit is NaN all five are -1, which is no class. Raises what `evaluate` raises; about labels
    after the first batch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("evaluating a model needs torch: pip install 'codeword[torch]'") from error
    if batch_size <= 0:
        raise DataError(f"batch_size must be a positive number of examples, got {batch_size}")
    if not len(dataset):
        raise DataError(f"{dataset.name}: no examples; expected at least one")
    shift, scale = _per_channel("mean", mean, dataset), _per_channel("std", std, dataset)
    if scale is not None and not (scale > 0).all():
        raise DataError(f"std must be positive, got {std}")
    # Buffers too: a model that runs from codes may have no parameters.
    tensor = next(chain(model.parameters(), model.buffers()), None)
    best: list[np.ndarray] = []
    classes = 0
    with eval_mode(model), torch.inference_mode():
        for first in range(0, len(dataset), batch_size):
            x = dataset.x[first : first + batch_size]
            x = x if shift is None else x - shift
            x = x if scale is None else x / scale
            # torch wants to own what it shares; a view of a read-only file is copied, a batch at a time.
            batch = torch.from_numpy(np.require(x, requirements=["C", "W"]))
            try:
                logits = model(batch if tensor is None else batch.to(tensor.device))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise DataError(_refusal(model, dataset, x.shape, error)) from error
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.numel():
                found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
                raise DataError(f"{type(model).__name__} returned {found}; expected logits ({len(x)}, classes)")
            bad = torch.isnan(logits).any(1)
            if not nan_is_wrong and bool(bad.any()):
                example = first + int(bad.nonzero()[0, 0])
                raise DataError(
                    f"{dataset.name}: {type(model).__name__} gives NaN logits for {int(bad.sum())} of the examples "
                    f"{first} to {first + len(x) - 1}, first for {example}; check the weights, mean and std"
                )
            if not first:
                _check_labels(dataset, logits.shape[1])
            classes = logits.shape[1]
            order = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
            best.append(order.masked_fill(bad[:, None], -1).cpu().numpy())
    return np.concatenate(best), classes


def _check_labels(dataset: Dataset, classes: int) -> None:
    """DataError if a label is no class of the model."""
    wrong = dataset.y[(dataset.y < 0) | (dataset.y >= classes)]
    if len(wrong):
        raise DataError(
            f"{dataset.name}: label {int(wrong[0])} but the model has {classes} classes (0 to {classes - 1}); "
            "the data and the model are of different tasks"
        )


def _per_channel(name: str, values: Sequence[float] | None, dataset: Dataset) -> np.ndarray | None:
    """mean or std as float32 (1, c, 1, 1); DataError if the data are no images with that many channels."""
    if values is None:
        return None
    if dataset.x.ndim != 4 or dataset.x.dtype.kind != "f" or dataset.x.shape[1] != len(values):
        raise DataError(
            f"{name} has {len(values)} values but {dataset.name} is {dataset.x.dtype} {dataset.x.shape}; "
            "expected float images (n, c, h, w) and one value for each channel"
        )
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


def _refusal(model: nn.Module, dataset: Dataset, shape: tuple[int, ...], error: Exception) -> str:
    """The message for a model that raises on a batch: what it was given, what it starts with, what it said."""
    # By modules and not by parameters: those of a layer that runs from codes are no weights.
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    start = next(((f"{name}.weight", tuple(w.shape)) for name, w in weights if w is not None), None)
    begins = f" (its first weight is {start[0]} {start[1]})" if start else ""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{dataset.name}: {type(model).__name__}{begins} does not take a batch {shape}: {said[0]}"
