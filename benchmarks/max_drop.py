"""The smallest file within a drop: what `max_drop` finds on training images, and what that loses on the test set.

    CODEWORD_DATA=DATA python benchmarks/max_drop.py --weights FOLDER [--nets lenet5 resnet20] [--limit N]

FOLDER holds cifar10_resnet20.safetensors. The search and its check see the training set only, the test set is scored
once at the end. A net that knows its training images loses less on them than on others, so the drop asked for is one on
data that it learned from. Writes benchmarks/max_drop.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

import codeword
from codeword.atomic import replacing
from codeword.data import load_data
from codeword.nets import load_net
from codeword.zoo import lenet5_path

JSON = Path(__file__).with_suffix(".json")


class Net(NamedTuple):
    weights: str | None  # in the folder; None: in the package
    data: str
    most: float


NETS = {"lenet5": Net(None, "mnist", 0.1), "resnet20": Net("cifar10_resnet20.safetensors", "cifar10", 0.5)}


def row(name: str, net: Net, path: Path, limit: int | None) -> dict:
    model, train = load_net(f"codeword.zoo:{name}", path), load_data(f"{net.data}:train", limit=limit)
    start = time.perf_counter()
    made = codeword.fit(path, max_drop=net.most, data=train, net=model, on_trial=lambda it: print(it, flush=True))
    seconds = time.perf_counter() - start
    test = load_data(f"{net.data}:test")
    dense, coded = (codeword.evaluate(it, test).top1 for it in (model, codeword.swap(model, made.artifact)))
    return {
        "net": name,
        "bytes": made.artifact.nbytes,
        "ratio": round(made.artifact.dense_nbytes / made.artifact.nbytes, 2),
        "top1": round(coded, 2),
        "drop": round(dense - coded, 2),
        "seconds": round(seconds, 1),
        "measured": msgspec.to_builtins(made.measured),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress to a largest drop ($CODEWORD_DATA).")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the ResNet's weights")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--limit", type=int, help="training images, the first so many")
    arguments = parser.parse_args()
    record = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {"rows": []}
    for name in arguments.nets:
        net = NETS[name]
        path = Path(lenet5_path()) if net.weights is None else arguments.weights / net.weights
        made = row(name, net, path, arguments.limit)
        print(made, flush=True)
        record["rows"] = [it for it in record["rows"] if it["net"] != name] + [made]
        record["rows"].sort(key=lambda it: list(NETS).index(it["net"]))
        lines = ",\n  ".join(json.dumps(it) for it in record["rows"])
        with replacing(JSON) as out:
            out.write(f'{{\n "rows": [\n  {lines}\n ]\n}}\n'.encode())


if __name__ == "__main__":
    main()
