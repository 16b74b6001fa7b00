"""Accuracy against sparsity: global saliency (C1), convolutions apart (C2), magnitude and random (C3) on one budget.

    CODEWORD_DATA=FOLDER python recipes/prune_sweep.py lenet5
    CODEWORD_DATA=FOLDER python recipes/prune_sweep.py resnet20 --weights FILE.safetensors

Each run starts from the trained dense net and ends after the same number of epochs, whatever the method: SGD with
momentum 0.9, gradients of norm 1 at most, the learning rate down a half cosine, masks along the first half. The last
5,000 training images are held out: learning rates and what saliency is divided by were chosen on them, once and for
LeNet-5 before this file kept such runs; runs with `--trial` look at nothing else and are kept in the report, as trials.
Weights of ResNet-20 that others trained have seen these images too, so there they tell settings apart and no more. The
test images are looked at once, at the end of each run that is no trial. A run is written as soon as it ends, and one
that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_lenet5 import HELD_OUT, shifted

from codeword.atomic import replacing
from codeword.data import Dataset, load_data
from codeword.evaluate import evaluate
from codeword.finetune import Finetune
from codeword.nets import load_net
from codeword.train import Pruner
from codeword.train.losses import Objective
from codeword.zoo import lenet5_path

BATCH = 128
WARM_UP = 50  # steps: momentum at the full rate from the first step would throw the trained weights away
SPARSITIES = (50, 70, 80, 90, 95, 98, 99)
METHODS: dict[str, dict[str, Any]] = {
    "saliency": {"criterion": "saliency", "scope": "global"},
    "saliency-kinds": {"criterion": "saliency", "scope": "kinds"},
    "magnitude": {"criterion": "magnitude", "scope": "global"},
    "magnitude-layer": {"criterion": "magnitude", "scope": "layer"},
    "random": {"criterion": "random", "scope": "layer"},
}

log = logging.getLogger("prune_sweep")


class Net(NamedTuple):
    """What is pruned: a net of the zoo, its data, and how it is trained on."""

    data: str
    epochs: float
    rates: tuple[float, float]  # up to 90 % zeros, which leave little to learn anew, and beyond
    weight_decay: float
    shift: int  # pixels, in each direction
    mirrored: bool
    distill: float = 0.0  # share of the loss that is to give the dense outputs


NETS = {
    "lenet5": Net("mnist", 2, (0.03, 0.1), 5e-4, 2, mirrored=False),
    "resnet20": Net("cifar10", 1, (0.03, 0.05), 1e-4, 4, mirrored=True),
}


class Splits(NamedTuple):
    """The data: what is fitted, what settings are chosen on, what is looked at once."""

    fit: Dataset
    held_out: Dataset
    test: Dataset

    @classmethod
    def load(cls, name: str) -> Splits:
        """Of a data set."""
        whole, cut = load_data(f"{name}:train"), slice(-HELD_OUT, None)
        fit = Dataset(f"{name}:train, fit", whole.x[:-HELD_OUT], whole.y[:-HELD_OUT])
        return cls(fit, Dataset(f"{name}:train, held out", whole.x[cut], whole.y[cut]), load_data(f"{name}:test"))


def train(model: nn.Module, pruner: Pruner, data: Dataset, net: Net, top: float, steps: int, seed: int) -> None:
    """Trains and prunes `model` in place, in bfloat16 where that is safe; `top` is the highest learning rate."""
    teacher = copy.deepcopy(model) if net.distill else None
    objective = Objective(F.cross_entropy, teacher, distill=net.distill, temperature=Finetune().temperature)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), top, 0.9, weight_decay=net.weight_decay, nesterov=True)
    pruner.prepare(model.train())
    chosen: list[Tensor] = []
    for step in range(steps):
        if not chosen:
            chosen = list(torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH))
        rate = top * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = chosen.pop()
        images = shifted(x[batch], generator, net.shift)
        if net.mirrored:
            turned = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(turned, images.flip(3), images)
        images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model(images).float(), images, y[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
    model.eval()


def run(
    model: nn.Module, method: str, sparsity: int, seed: int, net: Net, data: Splits, rate: float, ramp: float
) -> dict[str, Any]:
    """One row: a pruned net, and how good it is on the held-out images."""
    start = time.perf_counter()
    steps = round(net.epochs * (len(data.fit) // BATCH))
    torch.manual_seed(seed)
    example = torch.from_numpy(data.fit.x[:1])
    pruner = Pruner(sparsity / 100, steps=round(ramp * steps), example=example, seed=seed, **METHODS[method])
    train(model.to(memory_format=torch.channels_last), pruner, data.fit, net, rate, steps, seed)
    counts = pruner.report()
    return {
        "method": method,
        "sparsity": sparsity,
        "rate": rate,
        "epochs": net.epochs,
        "distill": net.distill,
        "seed": seed,
        "held_out_top1": round(evaluate(model, data.held_out).top1, 2),
        "zeros": round(counts.sparsity, 4),
        "macs_saved": round(counts.macs_saved, 4),
        "kept": {it.name: round(it.kept / it.weights, 4) for it in counts.tensors},
        "file_nbytes": pruner.finalize().nbytes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Reads the options; makes and writes the rows that are missing."""
    parser = argparse.ArgumentParser(description="Prune a trained net to several sparsities ($CODEWORD_DATA).")
    parser.add_argument("net", choices=NETS)
    parser.add_argument("--weights", type=Path, help="trained weights of the net; LeNet-5: those of the package")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=int, default=SPARSITIES, help="percent")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--epochs", type=float, help="of one run; all that are compared have the same")
    parser.add_argument(
        "--rate", type=float, help="the highest learning rate; by default one for low sparsities, one for high"
    )
    parser.add_argument("--ramp", type=float, default=0.5, help="share of the run along which masks are made")
    parser.add_argument(
        "--distill", type=float, default=0.0, help="share of the loss that is to give the dense outputs"
    )
    parser.add_argument("--trial", action="store_true", help="look at held-out images only")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)

    net = NETS[args.net]
    net = net._replace(epochs=args.epochs or net.epochs, distill=args.distill)
    weights = args.weights or (lenet5_path() if args.net == "lenet5" else None)
    if weights is None:
        parser.error(f"{args.net} needs --weights FILE: trained weights to start from")
    data = Splits.load(net.data)
    if known(args.report, args.net)["dense"] is None:
        write(args.report, args.net, "dense", scored(load_net(f"codeword.zoo:{args.net}", weights), data))
    part = "trials" if args.trial else "rows"
    for seed, sparsity, method in itertools.product(args.seeds, args.sparsities, args.methods):
        rate = args.rate or net.rates[sparsity > 90]
        distilled = f" --distill {args.distill:g}" if args.distill else ""
        options = f"--epochs {net.epochs:g} --rate {rate:g} --ramp {args.ramp:g}{distilled}{' --trial' * args.trial}"
        command = f"prune_sweep.py {args.net} --methods {method} --sparsities {sparsity} --seeds {seed} {options}"
        rows = known(args.report, args.net)[part]
        if any(row["command"] == command for row in rows):
            continue
        model = load_net(f"codeword.zoo:{args.net}", weights)
        row = {"command": command} | run(model, method, sparsity, seed, net, data, rate, args.ramp)
        if not args.trial:
            row["test_top1"] = round(evaluate(model, data.test).top1, 2)
        log.info("%s %s %d %% seed %d: held out %.2f  %s", args.net, method, sparsity, seed, row["held_out_top1"], row)
        write(args.report, args.net, part, [*rows, row])


def scored(model: nn.Module, data: Splits) -> dict[str, float]:
    """The dense net on the images that the pruned ones are measured on."""
    held_out, test = evaluate(model, data.held_out), evaluate(model, data.test)
    return {"held_out_top1": round(held_out.top1, 2), "test_top1": round(test.top1, 2)}


def known(report: Path, net: str) -> dict[str, Any]:
    """What the report says of a net by now."""
    nets = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return {"dense": None, "trials": [], "rows": []} | nets.get(net, {})


def write(report: Path, net: str, part: str, content: object) -> None:
    """Puts one part of what is said of a net into the report; rows a line each."""
    nets = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    nets[net] = known(report, net) | {part: content}
    text = json.dumps(nets, indent=1)
    for rows in (rows for parts in nets.values() for rows in (*parts["trials"], *parts["rows"])):
        text = text.replace(json.dumps(rows, indent=1).replace("\n", "\n   "), json.dumps(rows))
    with replacing(report) as file:
        file.write(f"{text}\n".encode())


if __name__ == "__main__":
    main()
