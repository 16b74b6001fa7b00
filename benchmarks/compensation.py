"""What cancelling errors within kernels and rows is worth: the same bytes with and without, on training images.

    CODEWORD_DATA=DATA python benchmarks/compensation.py --weights FOLDER

The measure is the divergence of the net's outputs from the uncompressed net's (Kullback-Leibler, nats an image): it
tells small differences that top-1 does not, and the constants of kernels/compensate.py were chosen by it, so these are
training images, never the test set. Writes benchmarks/compensation.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
import numpy as np
import torch

from codeword import allocate, zoo
from codeword.curves import curves_of
from codeword.data import load_data
from codeword.execute import run
from codeword.methods import Keep, RateAware
from codeword.nn import load_into, state_dict
from codeword.sources import open_source

JSON = Path(__file__).with_suffix(".json")
IMAGES = 3000


def log_probabilities(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [model(torch.from_numpy(images[at : at + 500])) for at in range(0, len(images), 500)]
        ).log_softmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    arguments = parser.parse_args()
    nets = {
        "lenet5": (zoo.lenet5_path(), zoo.lenet5, "mnist:train", (30, 40)),
        "resnet20": (arguments.weights / "cifar10_resnet20.safetensors", zoo.resnet20, "cifar10:train", (9, 12)),
        "resnet56": (arguments.weights / "cifar10_resnet56.safetensors", zoo.resnet56, "cifar10:train", (12,)),
    }
    rows = []
    for name, (path, factory, spec, ratios) in nets.items():
        images = load_data(spec, limit=IMAGES).x
        source = open_source(path)
        curves = curves_of(source, {info.name for info in source.infos})
        dense = sum(info.dense_nbytes for info in source.infos)
        model = factory()
        model.load_state_dict(state_dict(run(source, {info.name: Keep() for info in source.infos})), strict=False)
        reference = log_probabilities(model, images)
        for ratio in ratios:
            row: dict = {"net": name, "data": spec, "n": IMAGES, "ratio": ratio}
            for compensate in (False, True):

                def compress(methods, compensate=compensate, source=source):
                    return run(source, {
                        tensor: msgspec.structs.replace(method, compensate=compensate)
                        if isinstance(method, RateAware) else method
                        for tensor, method in methods.items()
                    })  # fmt: skip

                artifact = allocate.fit(curves, dense // ratio, compress).artifact
                load_into(model, artifact)
                found = log_probabilities(model, images)
                divergence = torch.nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True).item()
                agreement = 100 * (found.argmax(1) == reference.argmax(1)).double().mean().item()
                kind = "with" if compensate else "without"
                row |= {f"bytes_{kind}": artifact.nbytes, f"kl_{kind}": divergence, f"agreement_{kind}": agreement}
            rows.append(row)
            print(row, flush=True)
    JSON.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
