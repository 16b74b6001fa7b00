"""The loop that trains a net under a stage (a `Pruner`, a `Tuner`), for those who have none of their own.

    net = stage.prepare(model)
    history = train(net, stage, data, Finetune(epochs=10), teacher=uncompressed, checkpoint="FOLDER", resume=True)
    artifact = stage.finalize()

Randomness starts anew from the seed at each epoch, so the state after an epoch is all that a resumed run needs to end
with the same bytes. The caller's own generators are put back at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.atomic import make_folder
from codeword.data import Dataset
from codeword.errors import DataError, NonFiniteError, PlanError, TrainingError
from codeword.execute import Progress
from codeword.finetune import Epoch, Finetune, History
from codeword.train.batches import Batch, Batches, hold_out, open_batches
from codeword.train.checkpoint import (
    check_same_run,
    check_unused,
    copied,
    fingerprint,
    load_state,
    save_state,
    state_path,
)
from codeword.train.divergence import Losses, NotFiniteError, check_weights
from codeword.train.losses import Loss, Objective, classify
from codeword.train.norms import reestimate
from codeword.train.optimizer import computes_in_bf16, make_optimizer, set_rate
from codeword.train.processes import Process, average, parallel, this_process
from codeword.train.randomness import own_randomness, seed_all
from codeword.train.scoring import BatchLoss, Score, is_worse, score

_READ = 32  # steps between reads of the losses where each waits for other processes or an accelerator

OnEpoch = Callable[[History], None]


class Stage(Protocol):
    """What a loop knows of a `Pruner` or a `Tuner`."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The net to train."""
        ...

    def step(self) -> None:
        """Called after each step of the optimizer."""
        ...

    def finalize(self) -> Artifact:
        """The net as it is now, compressed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What neither the net's state dict nor the optimizer's holds."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


def train(
    net: nn.Module,
    stage: Stage,
    data: Dataset | Iterable[Any],
    options: Finetune = Finetune(),  # noqa: B008 - frozen
    *,
    teacher: nn.Module | None = None,
    loss: Loss = classify,
    validation: Dataset | Iterable[Any] | None = None,
    checkpoint: Path | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
) -> History:
    """Train `net`, which comes from `stage.prepare`, in place and where it is; it ends in eval mode.

    data: a Dataset, or batches (x, y) that can be gone through again and again; of x alone if options.distill is 1.
    teacher: the uncompressed net, to learn from and to compare with. loss: (output, target) -> scalar. validation:
    what is scored after each epoch; without it, a part of a Dataset that `options.held_out` holds back. checkpoint: a
    folder for the state after each epoch; resume: go on from there. progress: told of steps; on_epoch: of where it
    starts from and of each epoch. All processes of an initialised group must call this; the first alone writes.

    Raises TrainingError at a loss that is NaN or infinite, net and stage being put back to the start of that epoch;
    DataError for data that do not fit; MismatchError if the folder's state is of another run; PlanError if it holds one
    and resume is not given, or resume is given without a folder. At Ctrl-C the state after the last whole epoch is in
    the folder.
    """
    process = this_process()
    device = next(iter(net.parameters())).device
    if teacher is not None:
        _check_teacher(teacher, net)
        teacher = teacher.to(device)
    objective = Objective(
        loss, teacher, distill=options.distill, temperature=options.temperature, class_dim=options.class_dim
    )
    if resume and checkpoint is None:
        raise PlanError("resume needs a checkpoint folder to go on from; give checkpoint=")
    if validation is None and isinstance(data, Dataset):
        data, validation = hold_out(data, options)
    batches = open_batches(data, options, device, process)
    scored = None if validation is None else open_batches(validation, Finetune(), device, process)
    path = None if checkpoint is None else state_path(checkpoint, type(stage))
    if path is not None and not resume:
        check_unused([path], process)
    run = _Run(net, stage, batches, scored, options, objective, device, process)
    with own_randomness(device):
        run.start(path, teacher)
        if on_epoch is not None:
            on_epoch(run.history)
        while len(run.history.done) <= options.epochs:
            epoch = len(run.history.done)
            try:
                run.epoch(epoch, progress)
                run.save(path)
                if on_epoch is not None:
                    on_epoch(run.history)
            except KeyboardInterrupt:
                if path is None:
                    raise
                raise KeyboardInterrupt(
                    f"interrupted in epoch {epoch} of {options.epochs}; the state after the last whole epoch is in "
                    f"{path.parent}: go on from there with resume=True (--resume)"
                ) from None
        run.finish()
    return run.history


def _check_teacher(teacher: nn.Module, net: nn.Module) -> None:
    """Raises PlanError if they share a weight: nothing is learned from outputs that are one's own."""
    own = set(map(id, net.parameters()))
    for name, parameter in teacher.named_parameters():
        if id(parameter) in own:
            raise PlanError(
                f"the teacher shares {name!r} with the net that trains; give a copy, made before a Pruner prepares the "
                "model in place: teacher=copy.deepcopy(model)"
            )


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        net: nn.Module,
        stage: Stage,
        batches: Batches,
        scored: Batches | None,
        options: Finetune,
        objective: Objective,
        device: torch.device,
        process: Process,
    ) -> None:
        if process.count > options.batch_size:
            raise PlanError(f"finetune: batch_size is {options.batch_size} for {process.count} processes; raise it")
        self._net, self._stage, self._options = net, stage, options
        self._batches, self._scored = batches, scored
        self._process = process
        self._loss = BatchLoss(objective, device, bf16=computes_in_bf16(options, device))
        if not net.training:
            net.train()
        self._modes = [(module, module.training) for module in net.modules()]
        self._optimizer = make_optimizer(net, options)
        forward = parallel(net, process)
        self._forward = torch.compile(forward) if options.compile else forward
        self._read = 1 if device.type == "cpu" and process.count == 1 else _READ
        self._steps = batches.count  # of an epoch; of a loader that does not say, known after the first
        self._best: dict[str, Any] | None = None
        self.history = History(type(stage).__name__.lower(), options.epochs, 0 if scored is None else len(scored))

    def start(self, path: Path | None, teacher: nn.Module | None) -> None:
        """The state of a folder, or that before the first epoch, which is scored and saved."""
        self._run_of = fingerprint(self._options, self._state(), len(self._batches))
        if path is not None and self._process.first_says(path.exists()):
            self._load(path)
            return
        if path is not None and self._process.writes:
            make_folder(path.parent)
        seed_all(self._options.seed, 0)
        if teacher is not None and self._scored is not None:
            start = time.perf_counter()
            found = self._score(teacher, self._scored)
            self.history.dense = Epoch(0, None, *found, None, time.perf_counter() - start)
        self._record(0, None, None, time.perf_counter())
        self.save(path)

    def epoch(self, epoch: int, progress: Progress | None) -> None:
        """Train for one epoch, score, record. Raises TrainingError with net and stage as they were before."""
        start = time.perf_counter()
        seed_all(self._options.seed, epoch)
        for module, training in self._modes:
            module.training = training
        before = copied(self._state())
        losses = Losses(self._process)
        rate = 0.0
        try:
            steps = 0
            for at, batch in enumerate(self._batches.shuffled(epoch)):
                if at == 0 and self._process.count > 1:
                    # After the loader has chosen its order, which all must agree on; dropout need not be the same.
                    seed_all(self._options.seed, epoch, self._process.rank)
                rate = set_rate(self._optimizer, self._options, epoch, at, self._steps)
                losses.add(self._step(batch, f"epoch {epoch}, batch {at}"))
                try:
                    self._stage.step()
                except NonFiniteError as error:
                    losses.read(epoch, at)  # a loss that is not finite says more
                    raise NotFiniteError(f"{error}: epoch {epoch}, batch {at}") from error
                steps = at + 1
                if steps % self._read == 0:
                    losses.read(epoch, at)
                    self._tell(progress, epoch, steps, losses)
            if not steps:
                raise DataError(f"epoch {epoch}: the data gave no batch; expected at least one")
            losses.read(epoch, steps - 1)
            self._tell(progress, epoch, steps, losses)
            self._steps = steps
            average(self._net.buffers(), self._process)
            check_weights(self._net, f"epoch {epoch}, batch {steps - 1}")
            self._record(epoch, losses.mean, rate, start)
        except NotFiniteError as error:
            self._restore(before)
            raise TrainingError(
                f"{error} (of {self._steps or 'as many as the loader has'}); net and stage are as they were after "
                f"epoch {epoch - 1}. Take a lower learning rate than {self._options.learning_rate:g}, or look at the "
                "data there"
            ) from None

    def save(self, path: Path | None) -> None:
        """Write the state, whole or not at all."""
        if path is None or not self._process.writes:
            return
        state = self._state() | {
            "run": self._run_of,
            "history": msgspec.to_builtins(self.history),
            "steps": self._steps,
            "optimizer": self._optimizer.state_dict(),
            "best": self._best if self.history.kept < len(self.history.done) - 1 else None,
        }
        save_state(path, state)

    def finish(self) -> None:
        """The state to keep, its running statistics measured anew if that was asked for and does no harm."""
        if self._best is not None:
            self._restore(self._best)
        if self._options.reestimate_norms:
            self._reestimate(self.history.done[self.history.kept])
        self._net.eval()

    def _load(self, path: Path) -> None:
        state = load_state(path)
        check_same_run(path, state["run"], self._run_of)
        self.history = msgspec.convert(state["history"], History)
        self._steps = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])
        now = {"net": state["net"], "stage": state["stage"]}
        self._restore(now)
        if self._keeps_best and self._settled:
            self._best = state["best"] or now

    @property
    def _keeps_best(self) -> bool:
        return self._options.keep == "best" and self._scored is not None

    @property
    def _settled(self) -> bool:
        """Whether the net may be kept as it is: before its masks are final a pruned one has fewer zeros than asked."""
        return getattr(self._stage, "settled", True)

    def _state(self) -> dict[str, Any]:
        return {"net": self._net.state_dict(), "stage": self._stage.state_dict()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._net.load_state_dict(state["net"])
        self._stage.load_state_dict(state["stage"])

    def _step(self, batch: Batch, where: str) -> Tensor:
        """The loss of this process's part of a batch, which the optimizer has moved the net against."""
        self._optimizer.zero_grad(set_to_none=True)
        _, loss = self._loss(self._forward, batch, where)
        loss = loss * batch.share
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _record(self, epoch: int, loss: float | None, rate: float | None, start: float) -> None:
        """Score, note the epoch, and keep its state if it is the best so far."""
        found = Score(None, None) if self._scored is None else self._score(self._net, self._scored)
        self.history.done.append(Epoch(epoch, loss, *found, rate, time.perf_counter() - start))
        if not self._keeps_best or not self._settled:
            self.history.kept = epoch
            return
        best = self.history.done[self.history.kept]
        if self._best is None or not is_worse(found, _score_of(best)):
            self.history.kept = epoch
            self._best = copied(self._state())

    def _score(self, model: nn.Module, scored: Batches) -> Score:
        return score(model, scored, self._loss, self._process)

    def _reestimate(self, kept: Epoch) -> None:
        """Measure running statistics anew, unless the net then does worse than it did in the epoch that is kept."""
        before, epoch = copied(self._state()), self._options.epochs + 1
        seed_all(self._options.seed, epoch)
        modules = [module for module, training in self._modes if training]
        reestimate(self._net, modules, self._batches.shuffled(epoch), self._loss)
        average(self._net.buffers(), self._process)
        if self._scored is not None and is_worse(self._score(self._net, self._scored), _score_of(kept)):
            self._restore(before)

    def _tell(self, progress: Progress | None, epoch: int, steps: int, losses: Losses) -> None:
        if progress is not None:
            text = f"epoch {epoch} of {self._options.epochs}, loss {losses.mean:.4f}"
            of_epoch = self._steps or steps
            progress((epoch - 1) * of_epoch + steps, self._options.epochs * of_epoch, text)


def _score_of(epoch: Epoch) -> Score:
    return Score(epoch.held_out_loss, epoch.held_out_top1)
