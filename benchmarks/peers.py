"""Codeword beside coremltools' palettizer at equal bytes, data-free: k-means to 2**bits codewords, one table a tensor.

    pip install coremltools scikit-learn
    CODEWORD_DATA=DATA python benchmarks/peers.py --weights FOLDER

The peer's bytes are the shorter of the two that codeword.peers counts. Ours is the file on disk, at most as large.
Writes benchmarks/peers.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import codeword
from codeword import nn, zoo
from codeword.data import load_data
from codeword.evaluate import evaluate
from codeword.peers import Subject, palettized, sizes

JSON = Path(__file__).with_suffix(".json")


def peer(path: Path, factory, bits: int, dataset) -> dict:
    model = factory()
    nn.load_into(model, codeword.compress(path, plan=codeword.Plan((codeword.Rule("*", codeword.Keep()),))))
    start = time.perf_counter()
    made = palettized(Subject(model), bits, least=0)
    seconds = time.perf_counter() - start
    model.load_state_dict({name: torch.from_numpy(value) for name, value in made.weights.items()}, strict=False)
    return {
        "bits": bits,
        "tensors": len(made.codes),
        "bytes": min(sizes(made).values()),
        "top1": evaluate(model, dataset).top1,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    nets = {
        "lenet5": (zoo.lenet5_path(), zoo.lenet5, "mnist:test", (1, 2, 3, 4)),
        "resnet20": (arguments.weights / "cifar10_resnet20.safetensors", zoo.resnet20, "cifar10:test", (2, 3, 4, 6)),
    }
    for name, (path, factory, spec, widths) in nets.items():
        dataset, rows = load_data(spec), []
        for bits in widths:
            row = peer(path, factory, bits, dataset)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.cw"
                start = time.perf_counter()
                made = codeword.fit(path, row["bytes"])
                seconds = time.perf_counter() - start
                made.artifact.save(file)
                score = codeword.evaluate(file, dataset, model=factory())
                row |= {"codeword_bytes": file.stat().st_size, "codeword_top1": score.top1, "codeword_seconds": seconds}
            rows.append(row)
            print(name, row, flush=True)
        results[name] = {"data": spec, "n": len(dataset), "rows": rows}
    JSON.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
