"""The native core beside its NumPy reference, in one run, interleaved; medians.

    python benchmarks/kernels.py

Each pass over weights alone; scalar clustering as a whole and beside its peers is in scalar.py. Then the entropy coder
on symbols of 3 bits of entropy. The load of the machine is noted: it may be shared, so read ratios
rather than milliseconds. Writes benchmarks/kernels.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from codeword.kernels import assign, histogram, native, rans

JSON = Path(__file__).with_suffix(".json")


def use(kernels: str) -> None:
    os.environ["CODEWORD_KERNELS"] = kernels
    native.library.cache_clear()


def interleaved(runs: dict[str, Callable], rounds: dict[str, int]) -> dict[str, float]:
    """Median milliseconds of each, one after the other, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(rounds[name] for name in runs)):
        for name, run in runs.items():
            if turn < rounds[name]:
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(took), 2) for name, took in times.items()}


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
        "assign and parts": lambda: assign.assign_parts(values, None, thresholds),
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
    times = interleaved(runs, {name: 7 if name.endswith("native") else 3 for name in runs})
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
        times = interleaved(runs, {name: 7 if name.endswith("native") else 2 for name in runs})
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
    }
    record["load average after"] = hasattr(os, "getloadavg") and [round(part, 1) for part in os.getloadavg()]
    JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
