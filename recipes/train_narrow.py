"""Trains nets with real fully connected layers, for `benchmarks/clustering.py --only fc`, and nets for `claims.py`.

    CODEWORD_DATA=FOLDER python recipes/train_narrow.py alexnet --out FOLDER [--report train_narrow.json]

lenet300: LeNet-300-100 on MNIST. alexnet and vgg: what AlexNet and VGG look like, an eighth as wide or less and on
CIFAR-10. alexnet32 and vgg16_32: both at their full width, those of `codeword.zoo`. All under a schedule that one CPU
core ends in minutes, or in an hour for the last two, whose records take a hundred epochs and more. None is a record of
its data set: each is a trained net to compress. SGD with momentum 0.9, the learning rate up and down once, images
shifted by up to two pixels and, but for digits, mirrored. The test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from codeword.data import load_data
from codeword.evaluate import evaluate
from codeword.zoo import alexnet32, lenet_300_100, vgg16_32

SHIFT = 2  # pixels, in each direction
BATCH = 128
WEIGHT_DECAY = 5e-4
SEED = 0

log = logging.getLogger("train_narrow")


def narrow_alexnet() -> nn.Module:
    """Four convolutions and linear layers of 1,024 units, no norms: (n, 3, 32, 32) in [0, 1] -> (n, 10)."""
    return nn.Sequential(
        _Centred(),
        *(nn.Conv2d(3, 32, 5, 2, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 5, padding=2), nn.ReLU()),
        *(nn.Conv2d(48, 96, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *_head(64 * 4 * 4, 1024),
    ).eval()


def narrow_vgg() -> nn.Module:
    """Three stages of two normed 3 x 3 convolutions and linear layers of 512 units: (n, 3, 32, 32) -> (n, 10)."""
    layers: list[nn.Module] = [_Centred()]
    channels = 3
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), *_head(64 * 4 * 4, 512)).eval()


def _head(inputs: int, units: int) -> list[nn.Module]:
    """Three linear layers, as AlexNet and VGG-16 end in."""
    hidden = [nn.Linear(inputs, units), nn.ReLU(), nn.Dropout(0.3), nn.Linear(units, units), nn.ReLU()]
    return [*hidden, nn.Dropout(0.3), nn.Linear(units, 10)]


class _Centred(nn.Module):
    """Pixels from [0, 1] to [-2, 2]."""

    def forward(self, x: Tensor) -> Tensor:
        """Images of the same shape."""
        return 4 * x - 2


def _he(model: nn.Module) -> nn.Module:
    """He's initialisation: without norms, torch's default one does not start to learn in eight layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


class Net(NamedTuple):
    """What to train, on what, for how long."""

    data: str
    model: nn.Module
    epochs: int
    rate: float
    mirrored: bool
    mixed: bool = False  # bfloat16 under autocast, channels last: 2 to 3 times as fast where the processor knows it


def train(net: Net, seed: int) -> None:
    """Trains net.model in place."""
    generator = torch.Generator().manual_seed(seed)
    fit = load_data(f"{net.data}:train")
    x, y = torch.from_numpy(fit.x), torch.from_numpy(fit.y)
    optimizer = torch.optim.SGD(net.model.parameters(), net.rate, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, net.rate, net.epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    net.model.train()
    if net.mixed:
        net.model.to(memory_format=torch.channels_last)
    for epoch in range(1, net.epochs + 1):
        start, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(x), generator=generator)[: steps * BATCH].split(BATCH):
            images = _moved(x[chosen], net.mirrored, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=net.mixed):
                logits = net.model(images.contiguous(memory_format=torch.channels_last) if net.mixed else images)
            loss = F.cross_entropy(logits.float(), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        log.info("epoch %d  loss %.4f  %.0f s", epoch, total / steps, time.perf_counter() - start)
    net.model.eval()


def _moved(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w), all shifted by the same number of pixels, zeros coming in, and half of them mirrored."""
    height, width = images.shape[2:]
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    images = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT))[:, :, down : down + height, right : right + width]
    if mirrored:
        turned = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(turned, images.flip(3), images)
    return images


def main() -> None:
    """Reads the options, trains, looks at the test set once, writes the files."""
    nets = {
        "lenet300": lambda: Net("mnist", lenet_300_100(), 12, 0.1, mirrored=False),
        "alexnet": lambda: Net("cifar10", narrow_alexnet(), 6, 0.04, mirrored=True),
        "vgg": lambda: Net("cifar10", narrow_vgg(), 4, 0.1, mirrored=True),
        "alexnet32": lambda: Net("cifar10", _he(alexnet32()), 8, 0.02, mirrored=True, mixed=True),
        "vgg16_32": lambda: Net("cifar10", vgg16_32(), 5, 0.1, mirrored=True, mixed=True),
    }
    parser = argparse.ArgumentParser(description="Train a narrow net with large linear layers ($CODEWORD_DATA).")
    parser.add_argument("net", choices=nets)
    parser.add_argument("--out", type=Path, required=True, help="folder for NET.safetensors")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    start = time.perf_counter()
    net = nets[args.net]()
    train(net, SEED)
    score = evaluate(net.model, load_data(f"{net.data}:test"))
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in net.model.state_dict().items()}
    save_file(weights, args.out / f"{args.net}.safetensors")
    report = {
        "data": net.data,
        "epochs": net.epochs,
        "seed": SEED,
        "parameters": sum(it.numel() for it in net.model.parameters()),
        "in_linear_layers": sum(it.weight.numel() for it in net.model.modules() if isinstance(it, nn.Linear)),
        "n_test": score.n,
        "test_top1": round(score.top1, 2),
        "seconds": round(time.perf_counter() - start),
    }
    known = json.loads(args.report.read_text(encoding="utf-8")) if args.report.exists() else {}
    args.report.write_text(json.dumps({**known, args.net: report}, indent=2) + "\n", encoding="utf-8")
    log.info("%s", report)


if __name__ == "__main__":
    main()
