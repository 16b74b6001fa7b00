"""What training is to make small: the task's own loss, the distance from the uncompressed net, or both.

classify(output, target)             cross entropy
distillation(output, teacher, T)     Hinton, Vinyals & Dean 2015: the cross entropy of softened classes
Objective(task, teacher, ...)        loss of a batch, task and distillation mixed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codeword.errors import DataError, PlanError

Loss: TypeAlias = Callable[[Any, Any], Tensor]


def classify(output: Any, target: Tensor) -> Tensor:  # noqa: ANN401 - whatever the net gives
    """Cross entropy of logits (n, classes, ...) and classes (n, ...), the task of most nets."""
    return F.cross_entropy(logits(output), target)


def distillation(output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over examples of T**2 * KL(softmax(teacher / T) || softmax(output / T)); classes are in dimension 1.

    output, teacher: logits (n, classes, ...). T**2 keeps the gradient's size whatever the temperature.
    """
    log_student = F.log_softmax(output.float() / temperature, 1)
    log_teacher = F.log_softmax(teacher.float() / temperature, 1)
    found = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * found.mean()


class Objective:
    """The loss of a batch: (1 - distill) * task(output, target) + distill * distance from the teacher's output.

    task: (output, target) -> scalar. teacher: the uncompressed net; it runs in eval mode and without gradients.
    """

    def __init__(
        self, task: Loss = classify, teacher: nn.Module | None = None, *, distill: float, temperature: float
    ) -> None:
        if distill and teacher is None:
            raise PlanError(f"distill is {distill}, but there is no uncompressed net to learn from; give teacher=")
        self.task = task
        self.teacher = teacher.eval() if teacher is not None and distill else None
        self.distill = distill
        self.temperature = temperature

    @property
    def needs_labels(self) -> bool:
        """Whether a batch must have a target."""
        return self.distill < 1

    def __call__(self, output: Any, x: Any, target: Any) -> Tensor:  # noqa: ANN401 - whatever the net gives
        """The loss of an output for a batch x and its target. Raises DataError for what cannot be distilled."""
        loss = (1 - self.distill) * self.task(output, target) if self.needs_labels else None
        if self.teacher is None:
            return loss if loss is not None else self.task(output, target)
        with torch.no_grad():
            expected = logits(self.teacher(x))
        found = logits(output)
        if found.shape != expected.shape or found.dim() < 2 or found.shape[1] < 2:
            raise DataError(
                f"the net gives {tuple(found.shape)} and the uncompressed one {tuple(expected.shape)}; distillation "
                "needs logits (n, classes, ...) of two classes and more: set distill=0 and give a loss of your own"
            )
        distance = self.distill * distillation(found, expected, self.temperature)
        return distance if loss is None else loss + distance


def logits(output: Any) -> Tensor:  # noqa: ANN401
    """The logits of an output: itself, or its `logits` where a net gives more than them. Raises DataError."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise DataError(
            f"the net gives a {type(output).__name__}, not logits; give a loss of your own and set distill=0"
        )
    return found
