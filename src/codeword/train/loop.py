"""The loop that trains a net under a stage (a `Pruner`, a `Tuner`), for those who have none of their own.

    net = stage.prepare(model)
    history = train(net, stage, data, Finetune(epochs=10), teacher=uncompressed, checkpoint="FOLDER", resume=True)
    artifact = stage.finalize()

Randomness starts anew from the seed at each epoch, so the state after an epoch is all that a resumed run needs to end
with the same bytes. The caller's own generators are put back at the end.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from codeword.artifact import Artifact
from codeword.atomic import make_folder
from codeword.data import Dataset
from codeword.errors import DataError, NonFiniteError, PlanError, TrainingError
from codeword.evaluate import eval_mode
from codeword.execute import Progress
from codeword.finetune import Epoch, Finetune, History
from codeword.sources import open_source
from codeword.train.batches import Batch, Batches, open_batches, seed_of
from codeword.train.checkpoint import check_same_run, load_state, save_state
from codeword.train.losses import Loss, Objective, classify, logits
from codeword.train.processes import Process, average, parallel, this_process

_WARM_UP = 0.05  # of all steps, during which the rate rises
_LOOK = 32  # steps between looks at the losses where each look waits for other processes or an accelerator
_NORM_BATCHES = 200  # that running statistics are measured anew on
_IGNORED = -100  # the label that cross entropy leaves out

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

    Raises TrainingError at a loss that is no number, net and stage being put back to the start of that epoch; DataError
    for data that do not fit; MismatchError if the folder's state is of another run; PlanError if it holds one and
    resume is not given. At Ctrl-C the state after the last whole epoch is in the folder.
    """
    process = this_process()
    device = next(iter(net.parameters())).device
    if teacher is not None:
        teacher = teacher.to(device)
    objective = Objective(
        loss, teacher, distill=options.distill, temperature=options.temperature, class_dim=options.class_dim
    )
    if validation is None and isinstance(data, Dataset):
        data, validation = hold_out(data, options)
    batches = open_batches(data, options, device, process)
    scored = None if validation is None else open_batches(validation, Finetune(), device, process)
    path = None if checkpoint is None else state_path(checkpoint, type(stage))
    if path is not None and not resume:
        check_unused([path], process)
    run = _Run(net, stage, batches, scored, options, objective, device, process)
    with _own_randomness(device):
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


def hold_out(data: Dataset, options: Finetune) -> tuple[Dataset, Dataset | None]:
    """(what to train on, what to score or None): examples drawn by the seed, both in the order they have in `data`."""
    count = options.held_out_of(len(data))
    if not count:
        return data, None
    order = np.random.default_rng(options.seed).permutation(len(data))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    kept = Dataset(f"{data.name}, trained on", data.x[rest], data.y[rest])
    return kept, Dataset(f"{data.name}, held out", data.x[held], data.y[held])


def state_path(folder: Path | str, stage: type) -> Path:
    """Where the state of such a stage is in a folder."""
    return Path(folder) / f"{stage.__name__.lower()}.safetensors"


def check_unused(paths: Iterable[Path], process: Process) -> None:
    """Raises PlanError if there is a state already: what it cost must not be lost by mistake."""
    found = [str(path) for path in paths if path.exists()]
    # The first process's word: by the time another looks, the first may have written already.
    if process.agree(bool(found)):
        raise PlanError(
            f"{' and '.join(found)} hold the state of a run; go on from there with resume=True (--resume), name "
            "another folder, or remove what is there"
        )


class _Score(NamedTuple):
    loss: float | None  # None where there are no labels, or where it is no number
    top1: float | None  # percent; None where the task is no classification


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
        self._objective, self._device, self._process = objective, device, process
        if not net.training:
            net.train()
        self._modes = [(module, module.training) for module in net.modules()]
        self._optimizer = _optimizer(net, options)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        forward = parallel(net, process)
        self._forward = torch.compile(forward) if options.compile else forward
        self._bf16 = _bf16(options, device)
        self._look = 1 if device.type == "cpu" and process.count == 1 else _LOOK
        self._steps = batches.count  # of an epoch; of a loader that does not say, known after the first
        self._best: dict[str, Any] | None = None
        self.history = History(type(stage).__name__.lower(), options.epochs, 0 if scored is None else len(scored))

    def start(self, path: Path | None, teacher: nn.Module | None) -> None:
        """The state of a folder, or that before the first epoch, which is scored and saved."""
        self._run_of = _fingerprint(self._options, self._state(), len(self._batches))
        if path is not None and self._process.agree(path.exists()):
            self._load(path)
            return
        if path is not None and self._process.writes:
            make_folder(path.parent)
        self._seed(0)
        if teacher is not None and self._scored is not None:
            start = time.perf_counter()
            found = self._score(teacher)
            self.history.dense = Epoch(0, None, *found, None, time.perf_counter() - start)
        self._record(0, None, None, time.perf_counter())
        self.save(path)

    def epoch(self, epoch: int, progress: Progress | None) -> None:
        """Train for one epoch, score, record. Raises TrainingError with net and stage as they were before."""
        start = time.perf_counter()
        self._seed(epoch)
        for module, training in self._modes:
            module.training = training
        before = _copied(self._state())
        losses = _Losses(self._process)
        rate = 0.0
        try:
            steps = 0
            for at, batch in enumerate(self._batches.shuffled(epoch)):
                if at == 0 and self._process.count > 1:
                    # After the loader has chosen its order, which all must agree on; dropout need not be the same.
                    self._seed(epoch, self._process.rank)
                rate = self._set_rate(epoch, at)
                losses.add(self._step(batch, f"epoch {epoch}, batch {at}"))
                try:
                    self._stage.step()
                except NonFiniteError as error:
                    losses.look(epoch, at)  # a loss that is no number says more
                    raise _NotFinite(f"{error}: epoch {epoch}, batch {at}") from error
                steps = at + 1
                if steps % self._look == 0:
                    losses.look(epoch, at)
                    self._tell(progress, epoch, steps, losses)
            if not steps:
                raise DataError(f"epoch {epoch}: the data gave no batch; expected at least one")
            losses.look(epoch, steps - 1)
            self._tell(progress, epoch, steps, losses)
            self._steps = steps
            average(self._net.buffers(), self._process)
            self._check_finite(epoch, steps)
            self._record(epoch, losses.mean, rate, start)
        except _NotFinite as error:
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
            before, score = _copied(self._state()), self.history.done[self.history.kept]
            self._seed(self._options.epochs + 1)
            self._reestimate()
            found = None if self._scored is None else self._score(self._net)
            if found is not None and _worse(found, _Score(score.held_out_loss, score.held_out_top1)):
                self._restore(before)
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

    def _seed(self, *parts: int) -> None:
        """All generators that the net or a loader may draw from."""
        seed = seed_of(self._options.seed, *parts)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _set_rate(self, epoch: int, at: int) -> float:
        """Set the learning rate of a step and return it."""
        done = (epoch - 1 + (at + 0.5) / max(self._steps or 1, at + 1)) / self._options.epochs
        factor = min(1.0, done / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._options.learning_rate * factor

    def _step(self, batch: Batch, where: str) -> Tensor:
        """The loss of a batch, which the optimizer has moved the net against."""
        self._optimizer.zero_grad(set_to_none=True)
        _, loss = self._loss(self._forward, batch, where, self._objective)
        loss = loss * batch.share
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _loss(
        self, forward: Callable[[Tensor], Any], batch: Batch, where: str, objective: Objective
    ) -> tuple[Any, Tensor]:
        """(output, loss) of a batch. Raises DataError, begun with `where`, if it does not fit the net or the loss."""
        output = None
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                output = forward(batch.x)
                self._check_labels(output, batch, where)
                loss = objective(output, batch.x, batch.y)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{where}: {self._refusal(batch, output, error)}") from error
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

    def _refusal(self, batch: Batch, output: Any, error: Exception) -> str:  # noqa: ANN401
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if output is None:
            given = f"x {tuple(batch.x.shape)} {str(batch.x.dtype).removeprefix('torch.')}"
            return f"{type(self._net).__name__} does not take {given}: {said}"
        found, target = (getattr(value, "shape", type(value).__name__) for value in (output, batch.y))
        return f"no loss of an output {tuple(found)} and a target {tuple(target)}: {said}"

    def _check_finite(self, epoch: int, steps: int) -> None:
        """Raises _NotFinite if the last step left what the next would have stumbled over."""
        for name, value in self._net.named_parameters():
            if value.requires_grad and not bool(torch.isfinite(value.detach()).all()):
                raise _NotFinite(f"{name!r} holds NaN or infinity after epoch {epoch}, batch {steps - 1}")

    def _record(self, epoch: int, loss: float | None, rate: float | None, start: float) -> None:
        """Score, note the epoch, and keep its state if it is the best so far."""
        found = _Score(None, None) if self._scored is None else self._score(self._net)
        self.history.done.append(Epoch(epoch, loss, *found, rate, time.perf_counter() - start))
        if not self._keeps_best or not self._settled:
            self.history.kept = epoch
            return
        best = self.history.done[self.history.kept]
        if self._best is None or not _worse(found, _Score(best.held_out_loss, best.held_out_top1)):
            self.history.kept = epoch
            self._best = _copied(self._state())

    def _score(self, model: nn.Module) -> _Score:
        """Mean loss and top-1 over what is held out, in eval mode."""
        task = Objective(self._objective.task, distill=0.0, temperature=1.0)
        sums = torch.zeros(4, dtype=torch.float64)  # loss, examples, right, judged
        # not inference_mode: what a module decodes and keeps would be of no use to training
        with eval_mode(model), torch.no_grad():
            for at, batch in enumerate(self._scored.in_order() if self._scored is not None else ()):
                if batch.y is not None:
                    output, loss = self._loss(model, batch, f"held out, batch {at}", task)
                    n = len(batch.x)
                    sums += torch.tensor([n * float(loss), n, *_hits(output, batch.y)], dtype=torch.float64)
        loss, examples, right, judged = self._process.total(sums.to(self._device)).tolist()
        mean = loss / examples if examples else math.nan
        return _Score(mean if math.isfinite(mean) else None, 100 * right / judged if judged else None)

    @torch.no_grad()
    def _reestimate(self) -> None:
        """Running statistics of all batch norms in training mode, as the plain mean over batches."""
        norms = [
            module
            for module, training in self._modes
            if training and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        momenta = [norm.momentum for norm in norms]
        self._net.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            for at, batch in enumerate(self._batches.shuffled(self._options.epochs + 1)):
                if norms and at < _NORM_BATCHES:
                    self._net(batch.x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        average(self._net.buffers(), self._process)

    def _tell(self, progress: Progress | None, epoch: int, steps: int, losses: _Losses) -> None:
        if progress is not None:
            text = f"epoch {epoch} of {self._options.epochs}, loss {losses.mean:.4f}"
            of_epoch = self._steps or steps
            progress((epoch - 1) * of_epoch + steps, self._options.epochs * of_epoch, text)


class _NotFinite(Exception):  # noqa: N818 - says where; `epoch` makes it a TrainingError
    """Where a loss or a weight is no number."""


class _Losses:
    """The losses of an epoch, looked at a few at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: list[Tensor] = []
        self._sum = 0.0
        self._count = 0

    def add(self, loss: Tensor) -> None:
        self._waiting.append(loss)

    def look(self, epoch: int, at: int) -> None:
        """Raises _NotFinite for the first that is no number; `at` is the batch of the last."""
        if not self._waiting:
            return
        values = (self._process.total(torch.stack(self._waiting).double()) / self._process.count).tolist()
        first = at + 1 - len(values)
        self._waiting.clear()
        for place, value in enumerate(values, first):
            if not math.isfinite(value):
                raise _NotFinite(f"the loss is {value} in epoch {epoch}, batch {place}")
        self._sum += math.fsum(values)
        self._count += len(values)

    @property
    def mean(self) -> float:
        return self._sum / max(self._count, 1)


def _hits(output: Any, target: Tensor) -> tuple[int, int]:  # noqa: ANN401
    """(right, judged) of a batch: of logits (n, classes) and one class each; else nothing is judged."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return 0, 0
    return int((found.argmax(1) == target).sum()), len(target)


def _worse(found: _Score, best: _Score) -> bool:
    """By top-1, or by loss where that is all there is."""
    if found.top1 is not None and best.top1 is not None:
        return found.top1 < best.top1
    return (math.inf if found.loss is None else found.loss) > (math.inf if best.loss is None else best.loss)


def _optimizer(net: nn.Module, options: Finetune) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    match options.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, rate, 0.9, weight_decay=decay, nesterov=True)


def _bf16(options: Finetune, device: torch.device) -> bool:
    """Whether to compute in bfloat16: where a processor has no matrix units for it, it is slower than float32."""
    if options.mixed != "auto":
        return options.mixed == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _copied(value: Any) -> Any:  # noqa: ANN401
    """A state with tensors of its own, on the CPU."""
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            return {key: _copied(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(_copied, value))
        case _:
            return value


def _fingerprint(options: Finetune, state: dict[str, Any], examples: int) -> dict[str, Any]:
    """What makes two runs the same: options, the weights they start from, how much data."""
    tensors = {
        f"{part}/{name}": value
        for part in ("net", "stage")
        for name, value in state[part].items()
        if isinstance(value, Tensor)
    }
    source, digest = open_source(tensors), hashlib.sha256()
    for info in source.infos:
        digest.update(f"{info.name} {info.dtype} {info.shape} ".encode())
        digest.update(np.ascontiguousarray(source.load(info.name)).reshape(-1).view(np.uint8).data)
    return msgspec.to_builtins(options) | {"the net's digest": digest.hexdigest()[:16], "examples": examples}


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Whatever is seeded inside, the caller's generators go on as if nothing had been drawn."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
