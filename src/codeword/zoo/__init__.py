"""Small nets to try Codeword on, the field's usual ones, and a trained LeNet-5 with 1,000 digits to test it on.

Every model takes float32 images (n, c, h, w) in [0, 1] and normalises them itself; every factory returns it in eval
mode. Needs torch, so `import codeword` does not import this package.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from codeword.data import load_data
from codeword.zoo.cifar import alexnet32, resnet20, resnet32, resnet44, resnet56, vgg16_32
from codeword.zoo.mnist import LeNet5, lenet5, lenet_300_100

__all__ = [
    "alexnet32",
    "digits",
    "digits_path",
    "lenet5",
    "lenet5_path",
    "lenet5_trained",
    "lenet_300_100",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg16_32",
]


def lenet5_path() -> Path:
    """Path of the bundled float32 weights of LeNet-5 (safetensors, trained by recipes/train_lenet5.py)."""
    return Path(str(resources.files("codeword.zoo").joinpath("lenet5.safetensors")))


def digits_path() -> Path:
    """Path of the bundled digits: x uint8 (1000, 28, 28) and y uint8 (1000,), from MNIST's test set."""
    return Path(str(resources.files("codeword.zoo").joinpath("digits.npz")))


def lenet5_trained() -> LeNet5:
    """LeNet-5 with the bundled weights, in eval mode."""
    # The file is ours and holds float32 only, so these lines do instead of a dependency on the safetensors package.
    data = lenet5_path().read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    state = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], "<f4").reshape(entry["shape"])
            state[name] = torch.from_numpy(values.astype(np.float32))
    model = lenet5()
    model.load_state_dict(state)
    return model


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The bundled digits: x float32 (1000, 1, 28, 28) in [0, 1], y int64 (1000,)."""
    dataset = load_data("digits")
    return dataset.x, dataset.y
