"""What a step of training costs under masks and from codewords, beside the plain dense step.

    python benchmarks/training_step.py            every row
    python benchmarks/training_step.py quick      three rounds instead of thirty, to see that it runs

One thread, batch 128, SGD with momentum, cross entropy: forward, backward, optimizer, and the stage's own step. All
kinds of step take turns in one process, and what counts is the ratio of medians to the dense step. Codewords come from
a target of 20x. New codes every 50 steps are charged by a fiftieth, new masks along a ramp, which are made every 100
or so, by a hundredth. Weights are random: they do not change the time.
Writes benchmarks/training_step.json.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import codeword
from codeword.train import Pruner, Tuner
from codeword.zoo import lenet5_trained, resnet20

JSON = Path(__file__).with_suffix(".json")
BATCH = 128
EVERY = 50
MASKS_EVERY = 100  # a ramp of six epochs of 430 steps in 25 parts
RAMP = f"masks along a ramp, new ones every {MASKS_EVERY}"
TARGETS = {"masks": 1.15, RAMP: 1.15, "codewords": 1.3, f"codewords, new codes every {EVERY}": 1.3}


def step_of(net: nn.Module, stage: Any, x: torch.Tensor, y: torch.Tensor, *, bf16: bool) -> Callable[[], None]:
    """One whole step of training."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        if stage is not None:
            stage.step()

    return step


def row(name: str, model: nn.Module, shape: tuple[int, ...], rounds: int, *, bf16: bool) -> dict[str, Any]:
    """Medians of a net in a precision."""
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, *shape), torch.randint(0, 10, (BATCH,))
    if bf16:
        x, model = x.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", codeword.TargetMissed)
        artifact = codeword.compress(model, "20x")
    pruner = Pruner(0.9, steps=10)
    masked = pruner.prepare(copy.deepcopy(model).train())
    begin = step_of(masked, pruner, x, y, bf16=bf16)
    for _ in range(10):  # until masks are there
        begin()
    ramp, anew = (Pruner(0.9, steps=1 << 20, every=every) for every in (1 << 20, 1))
    gathering, changing = (it.prepare(copy.deepcopy(model).train()) for it in (ramp, anew))
    plain, shadowed = Tuner(artifact), Tuner(artifact, reassign_every=1 << 30)
    steps = {
        "dense": step_of(copy.deepcopy(model).train(), None, x, y, bf16=bf16),
        "masks": step_of(masked, pruner, x, y, bf16=bf16),
        "gathering": step_of(gathering, ramp, x, y, bf16=bf16),
        "new masks each step": step_of(changing, anew, x, y, bf16=bf16),
        "codewords": step_of(plain.prepare(model).train(), plain, x, y, bf16=bf16),
        "with shadows": step_of(shadowed.prepare(model).train(), shadowed, x, y, bf16=bf16),
        "new codes": shadowed.reassign,
    }
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(rounds + 2):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 1:
                times[kind].append(1e3 * (time.perf_counter() - start))
    medians = {kind: statistics.median(took) for kind, took in times.items()}
    new_masks = medians["new masks each step"] - medians["gathering"]
    medians[RAMP] = medians["gathering"] + new_masks / MASKS_EVERY
    medians[f"codewords, new codes every {EVERY}"] = medians["with shadows"] + medians["new codes"] / EVERY
    ratios = {kind: round(medians[kind] / medians["dense"], 3) for kind in TARGETS}
    found = {
        "net": name,
        "precision": "bfloat16, channels last" if bf16 else "float32",
        "milliseconds": {kind: round(value, 2) for kind, value in medians.items()},
        "over dense": ratios,
        "within": {kind: ratios[kind] <= most for kind, most in TARGETS.items()},
    }
    print(found)
    return found


def load() -> list[float] | None:
    """Load averages, where the system has them."""
    return [round(part, 1) for part in os.getloadavg()] if hasattr(os, "getloadavg") else None


def main() -> None:
    before = load()
    rounds = 3 if "quick" in sys.argv[1:] else 30
    torch.set_num_threads(1)
    rows = [
        row(name, make(), shape, rounds, bf16=bf16)
        for name, make, shape in (("LeNet-5", lenet5_trained, (1, 28, 28)), ("ResNet-20", resnet20, (3, 32, 32)))
        for bf16 in (False, True)
    ]
    report = {
        "machine": f"{platform.machine()}, 1 thread; other work may have run beside",
        "load average before": before,
        "load average after": load(),
        "torch": torch.__version__,
        "batch": BATCH,
        "rounds": rounds,
        "targets over dense": TARGETS,
        "rows": rows,
    }
    JSON.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
