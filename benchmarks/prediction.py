"""How well a dry run predicts: bytes, error, time and memory beside the plan really run, in processes of their own.

    python benchmarks/prediction.py --weights FOLDER [--data]

FOLDER holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors. Each plan is made by `codeword.dry_run` and
run by `codeword.compress(plan=...)`, --runs times, on one core; the table has the median of the processor's seconds,
which are those of the clock on a quiet machine, and the system's peaks of the process.
With --data ($CODEWORD_DATA) ResNet-20 is also planned and compressed under 1,024 images of cifar10:train. Writes
benchmarks/prediction.json and prints its table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

import codeword
from codeword import zoo
from codeword.data import load_data
from codeword.fold import as_stored
from codeword.forecast import _peak
from codeword.methods import RateAware
from codeword.nets import load_net
from codeword.plan import Plan
from codeword.sources import open_source
from main_job import table

JSON = Path(__file__).with_suffix(".json")
RATIOS = {"lenet5": (10, 20, 30, 40, 50), "resnet20": (4, 8, 12, 16, 24), "resnet56": (4, 8, 12, 16, 24)}


def given(path: Path, data: str | None) -> dict:
    if data is None:
        return {}
    return {"data": load_data(data, limit=1024), "net": load_net("codeword.zoo:resnet20", open_source(path))}


def predict(path: Path, target: str, data: str | None) -> dict:
    start = time.perf_counter()
    found = codeword.dry_run(path, target, **given(path, data))
    return msgspec.to_builtins(found) | {"planning_seconds": time.perf_counter() - start}


def make(path: Path, plan: dict, data: str | None) -> dict:
    extra = given(path, data)
    start, cpu = time.perf_counter(), time.process_time()
    artifact = codeword.compress(path, plan=Plan.from_dict(plan), **extra)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "model.cw")
        seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, _peak()
        nbytes = (Path(folder) / "model.cw").stat().st_size
    source = as_stored(open_source(path), artifact.metadata)
    methods = Plan.from_dict(plan).resolve(source.infos)
    errors = [error(artifact.decode(name), source.load(name), method) for name, method in methods.items()]
    lossy = [each for each in errors if each > 0]
    mean = sum(lossy) / max(len(lossy), 1)
    return {"nbytes": nbytes, "seconds": seconds, "cpu_seconds": cpu, "peak_nbytes": peak, "error": mean}


def error(decoded, weight, method) -> float:
    """Squared error over energy, of each row relative to its own where the method scales rows."""
    rows = weight.reshape(len(weight), -1).astype(float) if weight.ndim else weight.reshape(1, 1).astype(float)
    wrong = (decoded.reshape(rows.shape).astype(float) - rows) ** 2
    if isinstance(method, RateAware) and method.granularity == "row":
        return float((wrong.sum(1) / ((rows**2).sum(1) + 1e-30)).mean())
    return float(wrong.sum() / ((rows**2).sum() + 1e-30))


def apart(step: str, *arguments: object) -> dict:
    """A step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, json.dumps(arguments, default=str)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(net: str, path: Path, target: str, data: str | None, n: int) -> dict:
    forecast = apart("predict", path, target, data)
    runs = [apart("make", path, forecast["plan"], data) for _ in range(n)]
    measured = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    forecast["cpu_seconds"] = forecast["seconds"]
    return {"net": net, "target": target, "data": data} | {
        "predicted": {key: forecast[key] for key in ("target_nbytes", "planning_seconds", *measured)},
        "measured": measured,
        "predicted_over_measured": {key: forecast[key] / measured[key] for key in measured},
    }


def tables(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        predicted, measured, over = row["predicted"], row["measured"], row["predicted_over_measured"]
        cells.append(
            [
                row["net"] + (f", {row['data']}" if row["data"] else ""),
                row["target"],
                f"{predicted['nbytes']:,}",
                f"{measured['nbytes']:,.0f}",
                f"{over['nbytes'] - 1:+.1%}",
                f"{over['error']:.2f}",
                f"{measured['cpu_seconds']:.2f}",
                f"{over['cpu_seconds']:.2f}",
                f"{measured['peak_nbytes'] / 1e6:.0f}",
                f"{over['peak_nbytes']:.2f}",
            ]
        )
    columns = ["net", "target", "predicted bytes", "bytes", "off", "error x", "CPU seconds", "x", "peak MB", "x"]
    return table(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, given_to = {"predict": predict, "make": make}[arguments.step[0]], json.loads(arguments.step[1])
        print(json.dumps(step(Path(given_to[0]), *given_to[1:])))
        return
    paths = {name: arguments.weights / f"cifar10_{name}.safetensors" for name in ("resnet20", "resnet56")}
    paths = {"lenet5": Path(zoo.lenet5_path())} | paths
    rows = []
    jobs = [(net, f"{ratio}x", None) for net, ratios in RATIOS.items() for ratio in ratios]
    jobs += [("resnet20", target, "cifar10:train") for target in ("8x", "15x")] if arguments.data else []
    for net, target, data in jobs:
        rows.append(row(net, paths[net], target, data, arguments.runs))
        JSON.write_text(json.dumps(rows, indent=1) + "\n")
        print(tables(rows[-1:]).splitlines()[-1], flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main()
