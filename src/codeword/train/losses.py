"""What training minimizes: the task's own loss, the distance from the uncompressed net, or both.

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


def distillation(output: Tensor, teacher: Tensor, temperature: float, dim: int = 1) -> Tensor:
    """Mean over all but the classes of T**2 * KL(softmax(teacher / T) || softmax(output / T)).

    output, teacher: logits, their classes in dimension `dim`. T**2 keeps the gradient's size whatever the temperature.
    """
    log_student = F.log_softmax(output.float() / temperature, dim)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim)
    found = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim)
    return temperature**2 * found.mean()


class Objective:
    """The loss of a batch: (1 - distill) * task(output, target) + distill * distance from the teacher's output.

    task: (output, target) -> scalar. teacher: the uncompressed net; it runs in eval mode and without gradients.
    class_dim: see `Finetune`.
    """

    def __init__(
        self,
        task: Loss = classify,
        teacher: nn.Module | None = None,
        *,
        distill: float,
        temperature: float,
        class_dim: int | None = None,
    ) -> None:
        if distill and teacher is None:
            raise PlanError(
                f"distill is {distill}, but there is no uncompressed net to learn from; give teacher=, or set distill=0"
            )
        self.task = task
        self.teacher = teacher.eval() if teacher is not None and distill else None
        self.distill = distill
        self.temperature = temperature
        self._class_dim = class_dim

    @property
    def of_task(self) -> Objective:
        """The loss of the task alone."""
        return Objective(self.task, distill=0.0, temperature=self.temperature)

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
        dim = self._dim(found)
        if found.shape != expected.shape or found.shape[dim] < 2:
            raise DataError(
                f"the net gives {tuple(found.shape)} and the uncompressed one {tuple(expected.shape)}; distillation "
                "needs logits of two classes and more: set distill=0 and give a loss of your own"
            )
        distance = self.distill * distillation(found, expected, self.temperature, dim)
        return distance if loss is None else loss + distance

    def _dim(self, output: Tensor) -> int:
        """Where the classes of an output are. Raises DataError if it has no such dimension, or several might be it."""
        known = self.task is classify or output.dim() == 2
        dim = 1 if self._class_dim is None and known else self._class_dim
        if dim is None or output.dim() < 2 or not -output.dim() <= dim < output.dim():
            raise DataError(
                f"the net gives {tuple(output.shape)}; say which dimension holds the classes, class_dim=1 or "
                f"class_dim=-1 (now {self._class_dim}), or do not distill: distill=0"
            )
        return dim


def find_logits(output: Any) -> Tensor | None:  # noqa: ANN401
    """An output itself, or its `logits` where a net gives more than them; None if neither is a tensor."""
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else None


def logits(output: Any) -> Tensor:  # noqa: ANN401
    """The logits of an output. Raises DataError if it has none."""
    found = find_logits(output)
    if found is None:
        raise DataError(
            f"the net gives a {type(output).__name__}, not logits; give a loss of your own and set distill=0"
        )
    return found
