"""Batches of a Dataset or of a loader, on the device that trains, each process its part of them.

batches = open_batches(data, options, device, process)
for batch in batches.shuffled(epoch): ...         batch.x, batch.y, batch.share
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from codeword.data import Dataset
from codeword.errors import DataError
from codeword.finetune import Finetune
from codeword.train.processes import Process
from codeword.train.randomness import seed_of

_SCORED = 500  # examples at a time where nothing is kept for a backward pass
_RESIDENT = 0.25  # of an accelerator's free memory: a Dataset that takes less is kept there


class Batch(NamedTuple):
    """A process's part of a batch."""

    x: Tensor
    y: Tensor | None
    # The mean loss over these examples times share, averaged over all processes, is the mean over the whole batch.
    share: float


class Batches(Protocol):
    """Data to iterate over epoch after epoch."""

    def __len__(self) -> int:
        """Examples, or batches of a loader; 0 if not known."""
        ...

    @property
    def count(self) -> int | None:
        """Batches of an epoch; None if not known."""
        ...

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        """An epoch to train on, in an order of its own."""
        ...

    def in_order(self) -> Iterator[Batch]:
        """All examples once, to score."""
        ...


def open_batches(data: Dataset | Iterable[Any], options: Finetune, device: torch.device, process: Process) -> Batches:
    """Raises DataError if there is nothing to iterate over more than once."""
    if isinstance(data, Dataset):
        return _OfDataset(data, options, device, process)
    if options.shift or options.mirror or options.blend:
        raise DataError("shift, mirror and blend are for a Dataset; a loader changes its images itself")
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a Dataset or give batches (x, y), got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which gives its batches once; give what starts anew for each epoch, "
            "such as a DataLoader or a list"
        )
    return _OfLoader(data, options.seed, device, process)


def count_of(data: Dataset | Iterable[Any], batch_size: int = 1) -> int | None:
    """Batches of an epoch: of `batch_size` examples of a Dataset, or a loader's own; None if that does not say."""
    if isinstance(data, Dataset):
        return _full(len(data), batch_size)
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader has a __len__ in any case
        return None


def _full(examples: int, batch_size: int) -> int:
    """Full batches: the last is left out if it is not, since few examples make poor running statistics."""
    return max(examples // batch_size, 1)


def hold_out(data: Dataset, options: Finetune) -> tuple[Dataset, Dataset | None]:
    """(what to train on, what to score or None): examples drawn by the seed, both in the order they have in `data`."""
    count = options.held_out_of(len(data))
    if not count:
        return data, None
    order = np.random.default_rng(options.seed).permutation(len(data))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    kept = Dataset(f"{data.name}, trained on", data.x[rest], data.y[rest])
    return kept, Dataset(f"{data.name}, held out", data.x[held], data.y[held])


def moved(images: Tensor, generator: torch.Generator, *, shift: int = 0, mirror: bool = False) -> Tensor:
    """Images (n, c, h, w), each shifted by random numbers of pixels, -shift to shift, down and right; zeros come in.

    mirror: about half of them are flipped left to right. generator: of the CPU, wherever the images are.
    """
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if mirror:
        turned = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    padded = F.pad(images, (shift, shift, shift, shift))
    index = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    n_, rows, columns = (part.to(images.device) for part in index)
    return padded[n_, :, rows, columns].permute(0, 3, 1, 2)


def blended(x: Tensor, generator: torch.Generator) -> Tensor:
    """Examples (n, ...), each mixed with another of them, the share of that uniform in 0..1 (Zhang et al. 2018).

    Between the images it was trained on a net is less sure, and shows more of what it computes (Beyer et al. 2022).
    """
    other = torch.randperm(len(x), generator=generator).to(x.device)
    share = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator).to(x.device, x.dtype)
    return torch.lerp(x, x[other], share)


class _OfDataset:
    def __init__(self, data: Dataset, options: Finetune, device: torch.device, process: Process) -> None:
        if not len(data):
            raise DataError(f"{data.name}: no examples; expected at least one")
        if options.blend and data.x.dtype.kind != "f":
            raise DataError(f"{data.name}: blend is for inputs that are floats, found {data.x.dtype}")
        if (options.shift or options.mirror) and data.x.ndim != 4:
            raise DataError(f"{data.name}: shift and mirror are for images (n, c, h, w), found {data.x.shape}")
        self._options, self._device, self._process = options, device, process
        # torch wants to own what it shares: of a read-only array it gets a copy.
        self._x = torch.from_numpy(np.require(data.x, requirements=["C", "W"]))
        self._y = torch.from_numpy(data.y.astype(np.int64))
        if device.type == "cuda" and self._x.nbytes < _RESIDENT * torch.cuda.mem_get_info(device)[0]:
            self._x, self._y = self._x.to(device), self._y.to(device)

    def __len__(self) -> int:
        return len(self._y)

    @property
    def count(self) -> int:
        return _full(len(self), self._options.batch_size)

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_of(self._options.seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        for at in range(self.count):
            chosen = order[at * self._options.batch_size : (at + 1) * self._options.batch_size]
            # The moves of the whole batch are drawn in each process, so that they do not depend on how many there are.
            drawn = torch.Generator().manual_seed(seed_of(self._options.seed, epoch, at))
            yield self._part(chosen, drawn, self._process)

    def in_order(self) -> Iterator[Batch]:
        for chosen in self._process.share_of(torch.arange(len(self))).split(_SCORED):
            if len(chosen):  # there may be more processes than examples
                yield self._part(chosen, None, Process())

    def _part(self, chosen: Tensor, drawn: torch.Generator | None, process: Process) -> Batch:
        index = chosen.to(self._x.device)
        x, y = self._x[index], self._y[index]
        if drawn is not None and (self._options.shift or self._options.mirror):
            x = moved(x, drawn, shift=self._options.shift, mirror=self._options.mirror)
        if drawn is not None and self._options.blend:
            x = blended(x, drawn)
        return _part(x, y, self._device, process)


class _OfLoader:
    def __init__(self, loader: Iterable[Any], seed: int, device: torch.device, process: Process) -> None:
        self._loader, self._seed, self._device = loader, seed, device
        # A DistributedSampler gives each process its own part already.
        sampler = getattr(loader, "sampler", None)
        self._sampler = sampler if hasattr(sampler, "num_replicas") else None
        self._process = process if self._sampler is None else Process()

    def __len__(self) -> int:
        return self.count or 0

    @property
    def count(self) -> int | None:
        return count_of(self._loader)

    def shuffled(self, epoch: int) -> Iterator[Batch]:
        if self._sampler is not None and hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        self._reseed(epoch)
        return self._batches(self._process)

    def in_order(self) -> Iterator[Batch]:
        self._reseed(0)
        # Whole batches in turn: parts of a small one might be empty.
        for at, batch in enumerate(self._batches(Process())):
            if at % self._process.count == self._process.rank:
                yield batch

    def _reseed(self, epoch: int) -> None:
        """Seed generators that the loader has of its own: a resumed run must meet the order it would have met."""
        for owner in (self._loader, *(getattr(self._loader, name, None) for name in ("sampler", "batch_sampler"))):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed_of(self._seed, epoch))

    def _batches(self, process: Process) -> Iterator[Batch]:
        for at, batch in enumerate(self._loader):
            yield _part(*_pair(batch, at), self._device, process)


def _pair(batch: Any, at: int) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """(x, y) of what a loader gives; y None if there is none. Raises DataError if it is something else."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    try:
        x, y = parts if len(parts) == 2 else (*parts, None)
        return torch.as_tensor(x), None if y is None else torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(type(part).__name__ for part in parts[:5])
        found = f"{type(batch).__name__} of {kinds}" if isinstance(batch, (tuple, list)) else kinds
        raise DataError(f"batch {at} must be x or (x, y), tensors or arrays; got a {found}") from error


def _part(x: Tensor, y: Tensor | None, device: torch.device, process: Process) -> Batch:
    """This process's share of a whole batch, on the device; 4-d inputs with channels last, which convolutions like."""
    whole = len(x) if x.dim() else 0
    if not whole or (y is not None and (not y.dim() or len(y) != whole)):
        found = "none" if y is None else tuple(y.shape)
        raise DataError(f"a batch has x of shape {tuple(x.shape)} and y {found}; give one label for each example")
    share = 1.0
    if 1 < process.count <= whole:  # of fewer examples than processes all take all
        x, y = process.share_of(x), None if y is None else process.share_of(y)
        share = len(x) * process.count / whole
    x = x.to(device, non_blocking=True)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return Batch(x, None if y is None else y.to(device, non_blocking=True), share)
