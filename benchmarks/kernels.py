"""The native core beside its NumPy reference and beside peers, in one run, interleaved; medians.

    pip install kmeans1d scikit-learn    # peers; one that is missing is left out
    python benchmarks/kernels.py

Scalar clustering of n normal float32 values to k codewords: histogram, exact k-means, assignment, and the exact means
of the members. kmeans1d is exact too; scikit-learn runs Lloyd once from k-means++. Both run at 1e6 values only. Then
the entropy coder on symbols of 3 bits of entropy. The load of the machine is noted: it may be shared, so read ratios
rather than milliseconds. Writes benchmarks/kernels.json.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from codeword.kernels import assign, histogram, native, rans
from codeword.math import bins as math_bins
from codeword.math.kmeans import kmeans, midpoints

JSON = Path(__file__).with_suffix(".json")
CLUSTERS = (4, 16, 64)
PEER_N = 1_000_000


def use(kernels: str) -> None:
    os.environ["CODEWORD_KERNELS"] = kernels
    native.library.cache_clear()


def cluster(values: np.ndarray, k: int) -> np.ndarray:
    """Our whole way from values to the exact means of the members."""
    codebook = kmeans(math_bins.make_bins(values), k).codebook
    codes = assign.assign(values, None, midpoints(codebook))
    count, _, first = assign.cluster_sums(values, None, None, codes, len(codebook))
    return first / np.maximum(count, 1)


def ours(kernels: str, values: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        use(kernels)
        return cluster(values, k)

    return run


def peers(values: np.ndarray, k: int) -> dict[str, Callable[[], np.ndarray]]:
    """Those that are installed."""
    found = {}
    flat = values.reshape(-1)
    if (kmeans1d := wanted("kmeans1d")) is not None:
        found["kmeans1d"] = lambda: np.array(kmeans1d.cluster(flat, k).centroids)
    if (sklearn := wanted("sklearn.cluster")) is not None:
        found["scikit-learn"] = lambda: np.sort(
            sklearn.KMeans(k, n_init=1, random_state=0).fit(flat[:, None]).cluster_centers_[:, 0]
        )
    return found


def wanted(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def interleaved(runs: dict[str, Callable], rounds: dict[str, int]) -> tuple[dict[str, float], dict[str, object]]:
    """(median milliseconds, last result) of each, one after the other, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, object] = {}
    for turn in range(max(rounds[name] for name in runs)):
        for name, run in runs.items():
            if turn < rounds[name]:
                start = time.perf_counter()
                results[name] = run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(took), 2) for name, took in times.items()}, results


def sse(values: np.ndarray, codebook: object) -> float:
    words = np.sort(np.asarray(codebook, np.float64))
    total = 0.0
    for part in np.array_split(values.reshape(-1), max(1, values.size // 1_000_000)):
        total += float(np.sum((part - words[np.searchsorted(midpoints(words), part)]) ** 2))
    return total


def clustering() -> list[dict]:
    rows = []
    for n in (PEER_N, 10 * PEER_N):
        values = np.random.default_rng(0).normal(size=(1000, n // 1000)).astype(np.float32)
        for k in CLUSTERS:
            runs = {"native": ours("native", values, k), "numpy": ours("numpy", values, k)}
            others = peers(values, k) if n == PEER_N else {}
            runs |= others
            rounds = {"native": 9, "numpy": 3} | dict.fromkeys(others, 1)
            times, results = interleaved(runs, rounds)
            best = sse(values, results["native"])
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "milliseconds": times,
                    "times slower than native": {name: round(ms / times["native"], 1) for name, ms in times.items()},
                    "sse over native's": {name: round(sse(values, found) / best, 6) for name, found in results.items()},
                }
            )
            print(rows[-1])
    return rows


def stages(n: int, k: int) -> dict:
    """Milliseconds of each kernel alone, and of reading the array once."""
    values = np.random.default_rng(0).normal(size=(1000, n // 1000)).astype(np.float32)
    half, importance = values.astype(np.float16), np.abs(values)
    thresholds = np.linspace(-2, 2, k - 1)
    codes = assign.assign(values, None, thresholds)
    work = {
        "histogram": lambda: histogram.histogram(values, None, None),
        "histogram, importance": lambda: histogram.histogram(values, None, importance),
        "histogram, float16": lambda: histogram.histogram(half, None, None),
        "assign": lambda: assign.assign(values, None, thresholds),
        "assign, float16": lambda: assign.assign(half, None, thresholds),
        "cluster_sums": lambda: assign.cluster_sums(values, None, None, codes, k),
        "np.sum": values.sum,
    }

    def under(kernels: str, run: Callable) -> Callable:
        def go() -> object:
            use(kernels)
            return run()

        return go

    runs = {f"{name} / {kind}": under(kind, run) for name, run in work.items() for kind in ("native", "numpy")}
    times, _ = interleaved(runs, {name: 7 if name.endswith("native") else 3 for name in runs})
    print(times)
    return {"n": n, "k": k, "milliseconds": times}


def coder() -> list[dict]:
    """Million symbols a second."""
    rows, n = [], 4_000_000
    symbols = np.clip(np.rint(np.random.default_rng(0).normal(8, 1.94, n)), 0, 15).astype(np.uint8)
    for lanes in (1, 64, 4096):
        use("native")
        states, words = rans.rans_encode(symbols, 16, lanes, 1 << 62)
        runs: dict[str, Callable] = {
            "encode / native": lambda lanes=lanes: rans._rans_encode_native(symbols, 16, lanes, 1 << 62),
            "decode / native": lambda s=states, w=words: rans._rans_decode_native(
                s, w, n, 16, 1 << 62, np.dtype(np.uint8)
            ),
            "cost / native": lambda lanes=lanes: rans._adaptive_cost_native(symbols, 16, lanes, 1 << 62),
        }
        if lanes > 1:  # one lane takes NumPy a minute
            runs |= {
                "encode / numpy": lambda lanes=lanes: rans.rans_encode_numpy(symbols, 16, lanes, 1 << 62),
                "decode / numpy": lambda s=states, w=words: rans.rans_decode_numpy(
                    s, w, n, 16, 1 << 62, np.dtype(np.uint8)
                ),
                "cost / numpy": lambda lanes=lanes: rans.adaptive_cost_numpy(symbols, 16, lanes, 1 << 62),
            }
        times, _ = interleaved(runs, {name: 7 if name.endswith("native") else 2 for name in runs})
        rows.append(
            {"lanes": lanes, "million symbols a second": {k: round(n / ms / 1e3, 1) for k, ms in times.items()}}
        )
        print(rows[-1])
    return rows


def main() -> None:
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    record = {
        "machine": f"{platform.machine()}, {native.threads()} threads; other work may have run beside",
        "load average before": load and [round(part, 1) for part in load],
        "coder": coder(),
        "stages": stages(10_000_000, 16),
        "clustering": clustering(),
    }
    record["load average after"] = hasattr(os, "getloadavg") and [round(part, 1) for part in os.getloadavg()]
    JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
