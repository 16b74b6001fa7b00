"""From a trained net to a compressed one that was trained as such: prune if asked for, compress, tune.

The net that comes in is not changed: what trains are copies, on the accelerator where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.data import Dataset
from codeword.errors import PlanError
from codeword.execute import Progress
from codeword.finetune import Finetune, History
from codeword.train.batches import count_of, hold_out
from codeword.train.checkpoint import check_unused, state_path
from codeword.train.checks import check_model
from codeword.train.loop import OnEpoch, train
from codeword.train.losses import Loss, classify
from codeword.train.processes import best_device, group
from codeword.train.prune import Pruner
from codeword.train.tune import Tuner

_RAMP = 0.6  # of pruning's steps, in which weights go; the rest is to recover with masks that stay
# Of the budget: what training starts from. Finer codewords than the budget has room for, their codes then chosen by
# what they cost, are far better than coarse ones (LeNet-5 at 100x: 97.6 % before any step instead of 92.6 %). Where
# cancelled errors matter more they begin far lower (ResNet-20 at 23x, held out: 21 % instead of 79 %), because new
# codes do not cancel; after two epochs both ended alike there.
_AIM = 1.25
_FIXED_AIM = 0.985  # with codes that stay: trained codewords take more bytes than round ones
_MARGIN = 0.997  # of the budget: what new codes keep to, as codewords go on to train after the last of them


class Start(NamedTuple):
    """What training starts from."""

    artifact: Artifact
    nbytes: int | None  # what the file may take in the end; None for what this one takes


class Finetuned(NamedTuple):
    """What came of it."""

    artifact: Artifact
    histories: tuple[History, ...]  # of pruning, if there was any, and of tuning


def finetune(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    options: Finetune,
    compress: Callable[[nn.Module, frozenset[str], float], Start],
    *,
    loss: Loss | None = None,
    validation: Dataset | Iterable[Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> Finetuned:
    """Prune by training if `options` say so, compress, train what the file holds.

    compress: (net, names of the tensors whose zeros must stay, by how much the budget may be exceeded) -> what to start
    from. The rest is as for `train`, whose errors these are; MismatchError if the model's weights are not what would
    train.
    """
    check_model(model)
    if validation is None and isinstance(data, Dataset):
        data, validation = hold_out(data, options)
    device = best_device()
    with group(device) as process:
        if resume and checkpoint is None:
            raise PlanError("resume needs a checkpoint folder to go on from; give checkpoint=")
        if checkpoint is not None and not resume:
            check_unused([state_path(checkpoint, stage) for stage in (Pruner, Tuner)], process)
        teacher = copy.deepcopy(model).to(device).requires_grad_(False)
        net = copy.deepcopy(model).to(device)
        if not net.training:  # else some modules of it may be in eval mode on purpose
            net.train()
        modes = [(module, module.training) for module in net.modules()]
        rest: dict[str, Any] = {
            "teacher": teacher,
            "loss": loss or classify,
            "validation": validation,
            "checkpoint": checkpoint,
            "resume": checkpoint is not None,  # a folder that must not be used was refused above
            "progress": progress,
            "on_epoch": on_epoch,
        }
        histories: list[History] = []
        zeros: frozenset[str] = frozenset()
        if options.sparsity is not None:
            pruning = msgspec.structs.replace(options, epochs=options.prune_epochs or options.epochs, keep="last")
            pruner = Pruner(options.sparsity, steps=_ramp(data, pruning), seed=options.seed)
            with _counters_of(model, net):
                histories.append(train(pruner.prepare(net), pruner, data, pruning, **rest))
            zeros = frozenset(pruner.masks)
        for module, training in modes:
            module.training = training
        tuner, tuned, budget = _start(net, options, lambda aim: compress(net, zeros, aim))
        with _counters_of(model, tuned):
            histories.append(train(tuned, tuner, data, options, **rest))
        return Finetuned(_within(tuner, budget), tuple(histories))


def _start(
    net: nn.Module, options: Finetune, compress: Callable[[float], Start]
) -> tuple[Tuner, nn.Module, int | None]:
    """(tuner, its net, budget): from a file that is larger than the budget, where new codes can bring it down."""
    if options.reassign_every is None:
        start = compress(_FIXED_AIM)
        tuner = Tuner(start.artifact)
        return tuner, tuner.prepare(net), None
    for aim in (_AIM, 1.0):
        start = compress(aim)
        most = None if start.nbytes is None else int(_MARGIN * start.nbytes)
        tuner = Tuner(start.artifact, reassign_every=options.reassign_every, nbytes=most)
        tuned = tuner.prepare(net)
        if start.nbytes is None or aim == 1 or tuner.finalize().nbytes <= start.nbytes:
            break
    return tuner, tuned, start.nbytes


def _within(tuner: Tuner, budget: int | None) -> Artifact:
    """What was trained, its codes once more made to keep to the budget if what else there is has grown past that."""
    artifact = tuner.finalize()
    if budget is not None and artifact.nbytes > budget:
        tuner.reassign()
        artifact = tuner.finalize()
    return artifact


def _ramp(data: Dataset | Iterable[Any], options: Finetune) -> int:
    """Steps in which weights are pruned. Raises PlanError for a loader that does not say how long it is."""
    steps = count_of(data, options.batch_size)
    if steps is None:
        raise PlanError("pruning along a ramp needs data with a length; give the loader a __len__")
    return max(round(_RAMP * options.epochs * steps), 1)


@contextmanager
def _counters_of(model: nn.Module, net: nn.Module) -> Iterator[None]:
    """Afterwards the net's integer buffers are the model's again: batches that norms have counted are no weights."""
    yield
    state: Mapping[str, Tensor] = model.state_dict()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name in state and not buffer.is_floating_point():
                buffer.copy_(state[name])
