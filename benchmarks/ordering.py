"""Whether the loss that the planner predicts orders plans as the drop that is measured, and what to weigh tensors by.

    CODEWORD_DATA=DATA python benchmarks/ordering.py --weights FOLDER [--nets resnet20 ...] [--sets mixed level ...]

FOLDER holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors. A plan is random: each tensor takes the
point of its curve for a lambda of its own, whose log2 is drawn evenly, within 3 of a level that the plan draws too
("mixed": drops from 0 to 30 points and more) or within 5 of one level for all ("level": how large the loss is matters
less there, where it is matters more). The prediction is the sum of all points' relative squared errors, weighed by

    equal     nothing: each tensor alike
    weights   sensitivity.from_weights
    data      sensitivity.from_data, from 256 unlabelled images

Drop and divergence (mean KL of the outputs) are those of 3,000 training images that are none of those. Writes
benchmarks/ordering.json plan by plan; plans that are there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from codeword.atomic import replacing
from codeword.calibrate import examples, importance_from_data, spread
from codeword.curves import curves_of
from codeword.data import load_data
from codeword.execute import run
from codeword.nets import load_net
from codeword.nn import load_into
from codeword.sensitivity import from_data, from_weights
from codeword.sources import open_source

JSON = Path(__file__).with_suffix(".json")
IMAGES = 3_000


class Set(NamedTuple):
    plans: int
    levels: dict[str, tuple[float, float]]  # by net: between which the plan's level is drawn
    around: float  # octaves of lambda


SETS = {
    "mixed": Set(40, {"resnet20": (-23.5, -17.0), "resnet56": (-23.0, -17.0)}, 3.0),
    "level": Set(30, {"resnet20": (-20.0, -20.0), "resnet56": (-19.0, -19.0)}, 5.0),
}


class Net:
    """A net, its curves, what to weigh them by, and what the net itself says of the images."""

    def __init__(self, name: str, folder: Path) -> None:
        path = folder / f"cifar10_{name}.safetensors"
        self.model, self.source = load_net(f"codeword.zoo:{name}", path).eval(), open_source(path)
        self.curves = curves_of(self.source, {info.name for info in self.source.infos})
        train = load_data("cifar10:train")
        seen = examples(train)
        moments = importance_from_data(self.model, seen)
        self.weights = {name: self.model.get_parameter(name).detach().double().numpy() for name in moments}
        self.scales = {
            "equal": dict.fromkeys(self.weights, 1.0),
            "weights": from_weights({n: (float(np.square(w).sum()), w.size) for n, w in self.weights.items()}),
            "data": from_data(self.model, seen, moments),
        }
        rest = np.setdiff1d(np.arange(len(train)), spread(len(train)))
        places = rest[spread(len(rest), IMAGES)]
        self.x, self.y = torch.from_numpy(train.x[places]), torch.from_numpy(train.y[places])
        self.logs = self.log_likelihoods(self.model)

    def log_likelihoods(self, model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([torch.log_softmax(model(x), 1) for x in self.x.split(500)])

    def row(self, lams: dict[str, float]) -> dict:
        """What a plan loses, and what was predicted."""
        points = {name: curve.at(lams[name]) for name, curve in self.curves.items()}
        artifact = run(self.source, {name: point.method for name, point in points.items()})
        coded = copy.deepcopy(self.model)
        load_into(coded, artifact)
        logs = self.log_likelihoods(coded)
        right = [(it.argmax(1) == self.y).double().mean() for it in (self.logs, logs)]
        losses = {
            kind: float(f"{sum(s * points[name].cost for name, s in scales.items()):.6g}")
            for kind, scales in self.scales.items()
        }
        return {
            "drop": round(100 * float(right[0] - right[1]), 3),
            "divergence": round(float((self.logs.exp() * (self.logs - logs)).sum(1).mean()), 6),
            "predicted": losses,
        }


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks, equal values taking the mean of theirs."""
    ranks = [np.unique(values, return_inverse=True, return_counts=True)[1:] for values in (a, b)]
    means = [(np.cumsum(counts) - (counts - 1) / 2)[inverse] for inverse, counts in ranks]
    return round(float(np.corrcoef(*means)[0, 1]), 3)


def summary(rows: list[dict]) -> dict:
    drops, divergences = ([row[key] for row in rows] for key in ("drop", "divergence"))
    kinds = rows[0]["predicted"]
    return {
        "plans": len(rows),
        "drops": [min(drops), max(drops)],
        "spearman with drop": {kind: spearman([row["predicted"][kind] for row in rows], drops) for kind in kinds},
        "spearman with divergence": {
            kind: spearman([row["predicted"][kind] for row in rows], divergences) for kind in kinds
        },
    }


def write(record: dict) -> None:
    parts = []
    for name, found in record.items():
        rows = ",\n   ".join(json.dumps(row) for row in found["rows"])
        parts.append(f' "{name}": {{\n  "summary": {json.dumps(found["summary"])},\n  "rows": [\n   {rows}\n  ]\n }}')
    with replacing(JSON) as out:
        out.write(("{\n" + ",\n".join(parts) + "\n}\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Order random plans by predicted loss and measured drop.")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the ResNets' weights")
    parser.add_argument("--nets", nargs="+", choices=("resnet20", "resnet56"), default=["resnet20"])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--plans", type=int, help="instead of each set's own number")
    arguments = parser.parse_args()
    record = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {}
    for name in arguments.nets:
        net = Net(name, arguments.weights)
        for key in arguments.sets:
            made = SETS[key]
            rows = record.get(f"{name} {key}", {}).get("rows", [])
            rng = np.random.default_rng(0)
            for plan in range(arguments.plans or made.plans):
                level = rng.uniform(*made.levels[name])
                lams = {it: float(2 ** (level + rng.uniform(-made.around, made.around))) for it in net.curves}
                if plan < len(rows):
                    continue
                rows.append(net.row(lams))
                record[f"{name} {key}"] = {"summary": summary(rows), "rows": rows}
                write(record)
                print(name, key, plan, rows[-1], flush=True)
            print(name, key, record[f"{name} {key}"]["summary"], flush=True)


if __name__ == "__main__":
    main()
