"""Trains the LeNet-5 that ships with Codeword, from scratch and from MNIST's training images only.

    CODEWORD_DATA=FOLDER python recipes/train_lenet5.py --out lenet5.safetensors --report train_lenet5.json

SGD with momentum 0.9 and Caffe's weight decay, the learning rate down a half cosine, images shifted by up to two
pixels. The last 5,000 training images are held out: the weights of the epoch that does best on them are kept. The
test images are looked at once, after that. About 10 minutes on two cores. `--digits FILE` also writes the first 1,000
test images, as they ship with the package.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from codeword.data import Dataset, load_data
from codeword.evaluate import evaluate
from codeword.zoo import lenet5

HELD_OUT = 5_000
SHIFT = 2  # pixels, in each direction
WARM_UP = 200  # steps: momentum at the full rate from the first step can kill every ReLU

log = logging.getLogger("train_lenet5")


def shifted(images: Tensor, generator: torch.Generator, pixels: int = SHIFT) -> Tensor:
    """Images (n, c, h, w), each moved by its own random number of pixels, -pixels to pixels; zeros come in."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    down, right = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    return padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def train(model: nn.Module, fit: Dataset, held_out: Dataset, args: argparse.Namespace) -> tuple[int, float]:
    """Trains `model` in place and leaves the weights of the best epoch in it; (that epoch, its held-out top-1 in %)."""
    generator = torch.Generator().manual_seed(args.seed)
    x, y = torch.from_numpy(fit.x), torch.from_numpy(fit.y)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.rate, momentum=0.9, weight_decay=args.weight_decay)
    steps_per_epoch = len(x) // args.batch_size
    steps = args.epochs * steps_per_epoch
    best: tuple[int, float, dict[str, Tensor]] = (0, -1.0, {})
    step = 0
    for epoch in range(1, args.epochs + 1):
        start, total = time.perf_counter(), 0.0
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for chosen in order[: steps_per_epoch * args.batch_size].split(args.batch_size):
            rate = args.rate * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(model(shifted(x[chosen], generator)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            step += 1
        top1 = evaluate(model, held_out).top1
        seconds = time.perf_counter() - start
        log.info("epoch %d  loss %.4f  held out %.2f %%  %.0f s", epoch, total / steps_per_epoch, top1, seconds)
        if top1 >= best[1]:
            best = (epoch, top1, {name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict(best[2])
    return best[0], best[1]


def main() -> None:
    """Reads the options, trains, looks at the test set once, writes the files."""
    parser = argparse.ArgumentParser(description="Train the bundled LeNet-5 on MNIST ($CODEWORD_DATA).")
    parser.add_argument("--out", type=Path, default=Path("lenet5.safetensors"))
    parser.add_argument("--report", type=Path, default=Path("train_lenet5.json"))
    parser.add_argument("--digits", type=Path, help="also write the first 1,000 test images to this .npz")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    start = time.perf_counter()
    whole = load_data("mnist:train")
    fit = Dataset("mnist:train, fit", whole.x[:-HELD_OUT], whole.y[:-HELD_OUT])
    held_out = Dataset("mnist:train, held out", whole.x[-HELD_OUT:], whole.y[-HELD_OUT:])
    model = lenet5()
    epoch, held_out_top1 = train(model, fit, held_out, args)
    model.eval()
    test = load_data("mnist:test")
    score = evaluate(model, test)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, args.out)
    options = f"--epochs {args.epochs} --batch-size {args.batch_size} --rate {args.rate} --seed {args.seed}"
    report: dict[str, Any] = {
        "command": f"python recipes/train_lenet5.py {options} --weight-decay {args.weight_decay}",
        "epochs": args.epochs,
        "kept_epoch": epoch,
        "seed": args.seed,
        "n_train": len(fit),
        "n_held_out": len(held_out),
        "held_out_top1": round(held_out_top1, 2),
        "n_test": score.n,
        "test_top1": round(score.top1, 2),
        "seconds": round(time.perf_counter() - start),
    }
    args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.info("%s", report)
    if args.digits is not None:
        x = np.rint(test.x[:1000, 0] * 255).astype(np.uint8)
        np.savez_compressed(args.digits, x=x, y=test.y[:1000].astype(np.uint8))


if __name__ == "__main__":
    main()
