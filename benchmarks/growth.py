"""Growth: time and peak memory of clustering 1e5 to 1e9 weights to 16 codewords, codes and exact means included.

    python benchmarks/growth.py [--most 1e9]

Writes benchmarks/growth.json and prints its table. Each size runs in a process of its own, three times, and the median
is kept; memory is the peak of the process (Linux: VmHWM) less what it held before and less the codes, a byte each. 1e9
weights are float16, the others both. np.sum over the same values in float32 stands beside for scale, in the same
process, taking turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from codeword.kernels import native
from codeword.math.bins import make_bins
from codeword.math.kmeans import kmeans
from codeword.methods.scalar import assigned

JSON = Path(__file__).with_suffix(".json")
K = 16
ROUNDS = 3
STEP = 1 << 24  # values drawn at a time


def memory(what: str) -> int:
    """Bytes this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def drawn(n: int, dtype: str) -> np.ndarray:
    """(1, n) Gaussian values, as weights have them; the same block again and again where n is large."""
    block = np.random.default_rng(0).normal(scale=0.05, size=min(n, STEP)).astype(dtype)
    values = np.empty((1, n), dtype)
    for at in range(0, n, STEP):
        values[0, at : at + STEP] = block[: min(STEP, n - at)]
    return values


def cluster(values: np.ndarray) -> np.ndarray:
    bins = make_bins(values)
    return assigned(bins, values, None, None, kmeans(bins, K).codebook)[0]


def measure(n: int, dtype: str, queue: multiprocessing.Queue) -> None:
    cluster(drawn(1000, dtype))  # libraries and threads, loaded before memory is looked at
    values = drawn(n, dtype)
    single = values.astype(np.float32) if n < 10**9 else None
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
    before, seconds, sums = memory("VmRSS"), [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        codes = cluster(values)
        seconds.append(time.perf_counter() - start)
        del codes
        if single is not None:
            start = time.perf_counter()
            np.sum(single)
            sums.append(time.perf_counter() - start)
    queue.put(
        {
            "n": n,
            "dtype": dtype,
            "seconds": statistics.median(seconds),
            "sum_seconds": statistics.median(sums) if sums else None,
            "data_nbytes": values.nbytes,
            "codes_nbytes": n,
            "extra_nbytes": memory("VmHWM") - before - n,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--most", type=float, default=1e9, help="the largest number of weights")
    most = int(parser.parse_args().most)
    context = multiprocessing.get_context("spawn")
    rows = []
    for n in (10**5, 10**6, 10**7, 10**8, 10**9):
        for dtype in ("float32", "float16") if n < 10**9 else ("float16",):
            if n > most:
                continue
            queue = context.Queue()
            process = context.Process(target=measure, args=(n, dtype, queue))
            process.start()
            rows.append(queue.get())
            process.join()
            row = rows[-1]
            total = "" if row["sum_seconds"] is None else f"{row['seconds'] / row['sum_seconds']:7.1f} sums"
            extra = row["extra_nbytes"] / 1e6
            print(f"{n:>13,} {dtype}  {row['seconds']:9.4f} s {total:14s} {extra:8.1f} MB beyond data and codes")
    kept = {
        "what": f"histogram, exact k-means to {K}, assignment and exact means; Gaussian values; median of {ROUNDS}",
        "machine": platform.machine(),
        "threads": native.threads(),
        "rows": rows,
    }
    JSON.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
