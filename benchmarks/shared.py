"""One codebook for many layers, or one each: bytes of the file, error of the weights and top-1, data-free.

    CODEWORD_DATA=DATA python benchmarks/shared.py --weights FOLDER

The 3x3 convolutions but the first of ResNet-20 and ResNet-56 by product quantization and kernel templates, with a
codebook a layer, one a stage (layers of one width) and one for all; the rest is kept to 7 bits of mantissa. Nothing is
retrained. SQNR is that of the clustered layers together; "relative" is their mean error over energy, in dB, each layer
counting by its size. Bytes are the whole file's, and those of its codebooks. Writes benchmarks/shared.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import msgspec
import numpy as np

from codeword import zoo
from codeword.artifact import Artifact
from codeword.data import load_data
from codeword.evaluate import evaluate
from codeword.execute import run
from codeword.methods import Keep, KernelTemplates, Method, ProductQuantization
from codeword.nn import load_into
from codeword.sources import Source, TensorInfo, open_source

JSON = Path(__file__).with_suffix(".json")
NETS = {"resnet20": zoo.resnet20, "resnet56": zoo.resnet56}
METHODS = [
    ProductQuantization(9, 256),
    *(ProductQuantization(4, k, granularity="row") for k in (64, 256, 1024)),
    *(KernelTemplates(k, drop_offset=True) for k in (64, 256)),
]


def clustered(info: TensorInfo) -> bool:
    return info.kind == "conv" and info.shape[1] > 3


def errors(artifact: Artifact, source: Source) -> dict[str, float]:
    """SQNR of all clustered weights, and of their relative errors, in dB."""
    energy = noise = relative = size = 0.0
    for info in source.infos:
        if clustered(info):
            weight = source.load(info.name).astype(np.float64)
            own = float(np.sum(np.square(artifact.decode(info.name) - weight)))
            energy, noise = energy + float(np.sum(weight**2)), noise + own
            relative, size = relative + info.size * own / float(np.sum(weight**2)), size + info.size
    return {"sqnr": 10 * math.log10(energy / noise), "relative": -10 * math.log10(relative / size)}


def codebook_nbytes(artifact: Artifact) -> int:
    leaves = (leaf for entry in artifact.entries.values() for leaf in entry.leaves)
    return sum(leaf.nbytes for leaf in leaves if leaf.path.endswith("codebook"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="of the test set, the first so many")
    arguments = parser.parse_args()
    test = load_data("cifar10:test", limit=arguments.images)
    rows, files = [], []
    for net, factory in NETS.items():
        source = open_source(arguments.weights / f"cifar10_{net}.safetensors")
        kept = run(source, dict.fromkeys((info.name for info in source.infos), Keep()))
        for method in METHODS:
            for shared in ("layer", "stage", "net"):
                methods: dict[str, Method] = {}
                for info in source.infos:
                    group = {"layer": None, "stage": info.name.split(".")[0], "net": "net"}[shared]
                    chosen = msgspec.structs.replace(method, shared=group)
                    rest = Keep(7) if info.dtype == "float32" else Keep()
                    methods[info.name] = chosen if clustered(info) else rest
                artifact = run(source, methods)
                row = {"net": net, "method": str(method), "codebooks by": shared, "bytes": artifact.nbytes}
                row |= {"codebook_bytes": codebook_nbytes(artifact), "ratio": artifact.ratio}
                row |= errors(artifact, source) | {"images": arguments.images}
                rows.append(row)
                files.append((factory, artifact, kept))
                print(row, flush=True)
    original: dict = {}
    for row, (factory, artifact, kept) in zip(rows, files, strict=True):
        model = factory()
        if factory not in original:
            load_into(model, kept)
            original[factory] = evaluate(model, test).top1
        load_into(model, artifact)
        row |= {"top1": evaluate(model, test).top1, "original_top1": original[factory]}
        print(row, flush=True)
        JSON.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
