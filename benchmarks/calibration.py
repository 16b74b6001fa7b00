"""What a thousand images without labels are worth: bytes of files and top-1 with and without them, nothing retrained.

    CODEWORD_DATA=DATA python benchmarks/calibration.py --weights FOLDER [--nets resnet20 ...] [--targets 15x ...]

FOLDER holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors. The images are 1,024 of the training set,
evenly spaced; top-1 is on the whole test set. vectors_nbytes: what norms, biases and counters take of a file. Writes
benchmarks/calibration.json row by row; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import codeword
from codeword.atomic import replacing
from codeword.data import load_data
from codeword.nets import load_net
from codeword.zoo import lenet5_path

JSON = Path(__file__).with_suffix(".json")
IMAGES = 1024


class Net(NamedTuple):
    factory: str
    weights: str | None  # in the folder; None: in the package
    data: str
    targets: tuple[str, ...]


NETS = {
    "lenet5": Net("codeword.zoo:lenet5", None, "mnist", ("20x", "30x", "40x", "50x", "60x")),
    "resnet20": Net(
        "codeword.zoo:resnet20", "cifar10_resnet20.safetensors", "cifar10", ("8x", "10x", "12x", "15x", "18x")
    ),
    "resnet56": Net(
        "codeword.zoo:resnet56", "cifar10_resnet56.safetensors", "cifar10", ("10x", "12x", "15x", "18x", "20x")
    ),
}


def row(name: str, net: Net, path: Path, target: str, images: int) -> dict:
    """One file: its bytes, its top-1, and the seconds it took."""
    model = load_net(net.factory, path)
    data = load_data(f"{net.data}:train") if images else None
    start = time.perf_counter()
    made = codeword.fit(path, target, data=data, net=model if images else None)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.cw"
        made.artifact.save(file)
        differences = codeword.verify(file)
        top1 = codeword.evaluate(file, f"{net.data}:test", model=model).top1
        nbytes = file.stat().st_size
        with codeword.load(file) as artifact:
            vectors = sum(entry.nbytes for entry in artifact.entries.values() if len(entry.shape) < 2)
    return {
        "net": name,
        "target": target,
        "images": images,
        "bytes": nbytes,
        "vectors_nbytes": vectors,
        "ratio": round(made.artifact.dense_nbytes / nbytes, 2),
        "top1": round(top1, 2),
        "seconds": round(seconds, 1),
        "missed": made.missed,
        "differences": len(differences),
    }


def read() -> dict:
    return json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {"dense": {}, "rows": []}


def write(record: dict) -> None:
    lines = ",\n  ".join(json.dumps(it) for it in record["rows"])
    text = f'{{\n "dense": {json.dumps(record["dense"])},\n "rows": [\n  {lines}\n ]\n}}\n'
    with replacing(JSON) as out:
        out.write(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress with and without unlabelled images ($CODEWORD_DATA).")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the ResNets' weights")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--targets", nargs="+", help="instead of each net's own")
    arguments = parser.parse_args()
    for name in arguments.nets:
        net = NETS[name]
        path = Path(lenet5_path()) if net.weights is None else arguments.weights / net.weights
        record = read()
        if name not in record["dense"]:
            top1 = codeword.evaluate(load_net(net.factory, path), f"{net.data}:test").top1
            record["dense"][name] = {"data": net.data, "bytes": path.stat().st_size, "top1": round(top1, 2)}
            write(record)
        for target in arguments.targets or net.targets:
            for images in (0, IMAGES):
                key = (name, target, images)
                if any((it["net"], it["target"], it["images"]) == key for it in record["rows"]):
                    continue
                record["rows"].append(row(name, net, path, target, images))
                print(record["rows"][-1], flush=True)
                record["rows"].sort(
                    key=lambda it: (list(NETS).index(it["net"]), float(it["target"][:-1]), it["images"])
                )
                write(record)


if __name__ == "__main__":
    main()
