"""A training loop of one's own, and the lines it gains: prune LeNet-5 as it trains, then tune what is left.

    python examples/plain_loop.py                     # on the digits that ship with Codeword: seconds, no download

What Codeword adds is marked with `# +`: three lines for each stage. The loop itself, the optimizer and the loss are
whatever they were before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import codeword
from codeword.data import load_data
from codeword.train import Pruner, Tuner
from codeword.zoo import lenet5_trained

DIGITS = load_data("digits")
TRAIN = 800  # of 1,000 digits
BATCH = 50


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of (images, labels), shuffled."""
    x, y = torch.from_numpy(DIGITS.x[:TRAIN]), torch.from_numpy(DIGITS.y[:TRAIN])
    for chosen in torch.randperm(TRAIN).split(BATCH):
        yield x[chosen], y[chosen]


def train(net: nn.Module, stage: Pruner | Tuner, epochs: int, rate: float) -> None:
    """The loop that was there before, and one line."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(epochs):
        net.train()
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            stage.step()  # +
    net.eval()


def main(out: Path, epochs: int) -> None:
    """Train, prune, compress, tune, and say what came of it."""
    torch.manual_seed(0)
    model = lenet5_trained()

    pruner = Pruner(0.9, steps=epochs * TRAIN // BATCH // 2)  # +
    net = pruner.prepare(model.train())  # +
    train(net, pruner, epochs, rate=5e-4)
    kept = pruner.finalize(codeword.KMeans(16))  # +

    tuner = Tuner(kept, reassign_every=8)  # +
    net = tuner.prepare(model.train())  # +
    train(net, tuner, epochs, rate=5e-4)
    tuner.finalize().save(out)  # +

    held_out = codeword.data.Dataset("digits, held out", DIGITS.x[TRAIN:], DIGITS.y[TRAIN:])
    for name, file in (("pruned, 16 codewords", kept), ("and tuned", codeword.load(out))):
        score = codeword.evaluate(file, held_out, model=lenet5_trained())
        print(f"{name:<22}{file.nbytes:>7,} bytes  {file.ratio:5.1f}x  top-1 {score.top1:.1f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prune and tune LeNet-5 in a plain PyTorch loop.")
    parser.add_argument("--out", type=Path, default=Path("lenet5.cw"))
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    main(args.out, args.epochs)
