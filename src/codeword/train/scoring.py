"""What a net makes of a batch, its data checked against it, and of all that is held out.

loss = BatchLoss(objective, device, bf16=False)
output, value = loss(net, batch, "epoch 1, batch 0")
score(net, batches, loss, process)      mean loss and top-1, in eval mode
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codeword.errors import DataError, PlanError
from codeword.evaluate import eval_mode
from codeword.train.batches import Batch, Batches
from codeword.train.losses import Objective, classify, find_logits, logits
from codeword.train.processes import Process
from codeword.train.weights import bare

_IGNORED = -100  # the label that cross entropy leaves out


class BatchLoss:
    """The forward pass and the loss of a batch, in bfloat16 if that is asked for; data that do not fit are named."""

    def __init__(self, objective: Objective, device: torch.device, *, bf16: bool) -> None:
        self.device = device
        self._objective, self._bf16 = objective, bf16

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    @property
    def of_task(self) -> BatchLoss:
        """The same without a teacher."""
        return BatchLoss(self._objective.of_task, self.device, bf16=self._bf16)

    def __call__(self, forward: Callable[[Tensor], Any], batch: Batch, where: str) -> tuple[Any, Tensor]:
        """(output, loss) of a batch. Raises DataError, begun with `where`, if it does not fit the net or the loss."""
        output = None
        try:
            with self.autocast():
                output = forward(batch.x)
                self._check_labels(output, batch, where)
                loss = self._objective(output, batch.x, batch.y)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{where}: {_refusal(forward, batch, output, error)}") from error
        if not isinstance(loss, Tensor) or loss.dim():
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"the loss of a batch must be a tensor of a single number, got {found}; give its mean")
        return output, loss

    def _check_labels(self, output: Any, batch: Batch, where: str) -> None:  # noqa: ANN401
        """Raises DataError if a label is missing or no class of the net: an accelerator would stop for good."""
        if batch.y is None:
            if self._objective.needs_labels:
                raise DataError(f"{where} has no labels; give (x, y), or learn from outputs alone with distill=1")
        elif self._objective.task is classify and not batch.y.is_floating_point() and batch.y.numel():
            classes = logits(output).shape[1]
            wrong = (batch.y >= classes) | ((batch.y < 0) & (batch.y != _IGNORED))
            if bool(wrong.any()):
                raise DataError(
                    f"{where}: label {int(batch.y[wrong][0])} but the net has {classes} classes (0 to {classes - 1}); "
                    "the data and the net are of different tasks"
                )


class Score(NamedTuple):
    """How well a net does on what is held out."""

    loss: float | None  # None where there are no labels, or where it is not finite
    top1: float | None  # percent; None where the task is no classification


def score(model: nn.Module, held_out: Batches, loss: BatchLoss, process: Process) -> Score:
    """Mean loss of the task and top-1 over all processes' batches, in eval mode; the same on each process.

    Raises DataError if there is no batch, or one does not fit the net.
    """
    of_task = loss.of_task
    sums = torch.zeros(5, dtype=torch.float64)  # batches, loss, examples, right, judged
    # not inference_mode: what a module decodes and keeps would be of no use to training
    with eval_mode(model), torch.no_grad():
        for at, batch in enumerate(held_out.in_order()):
            sums[0] += 1
            if batch.y is not None:
                output, value = of_task(model, batch, f"held out, batch {at}")
                n = len(batch.x)
                sums[1:] += torch.tensor([n * float(value), n, *_hits(output, batch.y)], dtype=torch.float64)
    count, total, examples, right, judged = process.total(sums.to(loss.device)).tolist()
    if not count:
        raise DataError("held out: the data gave no batch; expected at least one")
    mean = total / examples if examples else math.nan
    return Score(mean if math.isfinite(mean) else None, 100 * right / judged if judged else None)


def is_worse(found: Score, best: Score) -> bool:
    """By top-1, or by loss where that is all there is."""
    if found.top1 is not None and best.top1 is not None:
        return found.top1 < best.top1
    return (math.inf if found.loss is None else found.loss) > (math.inf if best.loss is None else best.loss)


def _hits(output: Any, target: Tensor) -> tuple[int, int]:  # noqa: ANN401
    """(right, judged) of a batch: of logits (n, two classes or more) and one class each; else nothing is judged."""
    found = find_logits(output)
    if found is None or found.dim() != 2 or found.shape[1] < 2 or target.dim() != 1 or target.is_floating_point():
        return 0, 0
    return int((found.argmax(1) == target).sum()), int((target != _IGNORED).sum())


def _refusal(forward: Any, batch: Batch, output: Any, error: Exception) -> str:  # noqa: ANN401
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if output is None:
        given = f"x {tuple(batch.x.shape)} {str(batch.x.dtype).removeprefix('torch.')}"
        return f"{type(bare(forward)).__name__} does not take {given}: {said}"
    found, target = (getattr(value, "shape", type(value).__name__) for value in (output, batch.y))
    return f"no loss of an output {tuple(found)} and a target {tuple(target)}: {said}"
