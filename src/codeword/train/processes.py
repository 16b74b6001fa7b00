"""The processes that train one net together, as `torchrun` starts them; a lone one is a group of one.

with group(device) as process: ...     joins the others if WORLD_SIZE says that there are any
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class Process:
    """One of `count` processes that train together; ranks count from 0."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the files: the first does, for all."""
        return self.rank == 0

    def share_of(self, examples: Tensor) -> Tensor:
        """This process's part of examples (n, ...): every `count`-th, so that parts differ by one example at most."""
        return examples[self.rank :: self.count]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each; `values` is written into."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def first_says(self, found: bool) -> bool:
        """What the first process has found, on each: all then take the same decision."""
        return bool(self.total(torch.tensor(float(found and self.rank == 0), device=_device())))


def _device() -> torch.device:
    """Where the group's tensors must be."""
    on_gpu = distributed.is_initialized() and distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def this_process() -> Process:
    """Of the group that is initialised, or alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Process()
    return Process(distributed.get_rank(), distributed.get_world_size())


def best_device() -> torch.device:
    """This process's accelerator where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def group(device: torch.device) -> Iterator[Process]:
    """The group of `torchrun`, joined if it is not yet and left at the end if it was joined here."""
    started = distributed.is_available() and distributed.is_initialized()
    if started or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield this_process()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield this_process()
    finally:
        distributed.destroy_process_group()


def parallel(net: nn.Module, process: Process) -> nn.Module:
    """The net, its gradients averaged over all processes where there are more than one."""
    if process.count == 1:
        return net
    keep_codes_here(net)
    # Running statistics are averaged once an epoch instead of sent at each step.
    return nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)


def keep_codes_here(net: nn.Module) -> None:
    """Have DistributedDataParallel around this very module leave integer buffers alone.

    Codes change alike in all processes, and gloo and nccl cannot send unsigned integers of two bytes.
    """
    whole = [name for name, buffer in net.named_buffers() if not buffer.is_floating_point()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, whole)


@torch.no_grad()
def average(buffers: Iterable[Tensor], process: Process) -> None:
    """Set the float buffers among these to their means over all processes."""
    if process.count > 1:
        for buffer in buffers:
            if buffer.is_floating_point():
                # In float64 the mean of equal values is that value, and the sum of the lowest ones is in range: masks
                # are often filled with those.
                buffer.copy_(process.total(buffer.to(torch.float64, copy=True)) / process.count)
