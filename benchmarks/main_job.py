"""The main job, measured: bytes of files on disk, accuracy on the full test sets, no data and no retraining.

    python ../shared/data/load.py DATA && CODEWORD_DATA=DATA python benchmarks/main_job.py --weights FOLDER

FOLDER holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors (He et al., option-A shortcuts). Writes
benchmarks/main_job.json and prints its tables; `--only NAME` runs one part and keeps the rest of the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import codeword
from codeword.data import load_data
from codeword.evaluate import evaluate
from codeword.math.bins import make_bins
from codeword.math.kmeans import kmeans, midpoints
from codeword.safetensors_file import read_header, read_tensor, write_safetensors

JSON = Path(__file__).with_suffix(".json")
Weights = dict[str, np.ndarray]


def weights_of(path: Path) -> Weights:
    return {name: read_tensor(path, entry) for name, entry in read_header(path).entries.items()}


def top1(factory, weights: Weights, dataset) -> float:
    import torch

    model = factory()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, strict=False)
    return evaluate(model, dataset).top1


def ours(path: Path, target: str | int, factory, dataset, folder: Path) -> dict:
    start = time.perf_counter()
    result = codeword.fit(path, target)
    seconds = time.perf_counter() - start
    file = folder / "model.cw"
    result.artifact.save(file)
    with codeword.load(file) as artifact:
        differences = codeword.verify(artifact, path)
        accuracy = codeword.evaluate(artifact, dataset, model=factory()).top1
        return {
            "target": str(target),
            "bytes": file.stat().st_size,
            "container_bytes": artifact.container_nbytes,
            "ratio": artifact.dense_nbytes / file.stat().st_size,
            "top1": accuracy,
            "seconds_to_compress": seconds,
            "missed": result.missed,
            "differences": len(differences),
        }


def plain_rounding(weights: Weights, bits: int, folder: Path) -> tuple[int, Weights]:
    """The baseline anyone can make: symmetric rounding a channel, codes under xz -9e, scales and norms in fp16."""
    codes, side, dense = [], [], {}
    for name, value in weights.items():
        if value.ndim < 2:
            half = value.astype(np.float16)
            side.append(half.tobytes())
            dense[name] = half.astype(np.float32)
            continue
        rows = value.reshape(len(value), -1)
        scale = (np.abs(rows).max(1, keepdims=True) / (2 ** (bits - 1) - 1)).astype(np.float16).astype(np.float32)
        scale[scale == 0] = 1
        code = np.rint(rows / scale).astype(np.int8)
        codes.append(code.tobytes())
        side.append(scale.astype(np.float16).tobytes())
        dense[name] = (code * scale).reshape(value.shape).astype(np.float32)
    file = folder / "baseline.bin"
    file.write_bytes(lzma.compress(b"".join(codes), preset=9 | lzma.PRESET_EXTREME) + b"".join(side))
    return file.stat().st_size, dense


def network(name: str, path: Path, factory, spec: str, targets: list[str], bits: list[int]) -> dict:
    dataset = load_data(spec)
    weights = weights_of(path)
    dense_bytes = sum(4 * value.size for value in weights.values())
    dense = top1(factory, weights, dataset)
    out: dict = {
        "data": spec,
        "n": len(dataset),
        "dense_top1": dense,
        "dense_bytes": dense_bytes,
        "codeword": [],
        "baseline": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for target in targets:
            row = ours(path, target, factory, dataset, folder)
            row["drop"] = dense - row["top1"]
            out["codeword"].append(row)
            print(f"{name} {row['ratio']:.2f}x {row['top1']:.2f} ({-row['drop']:+.2f})", flush=True)
        for width in bits:
            nbytes, rounded = plain_rounding(weights, width, folder)
            base = {
                "bits": width,
                "bytes": nbytes,
                "ratio": dense_bytes / nbytes,
                "top1": top1(factory, rounded, dataset),
            }
            mine = ours(path, nbytes, factory, dataset, folder)
            base |= {"codeword_bytes": mine["bytes"], "codeword_top1": mine["top1"]}
            out["baseline"].append(base)
            print(
                f"{name} baseline {width} bits {base['ratio']:.2f}x {base['top1']:.2f}, ours {mine['top1']:.2f}",
                flush=True,
            )
    return out


def exact_solver(path: Path) -> dict:
    """SSE against brute force over all clusterings of small inputs, and against kmeans1d on real weights."""
    import kmeans1d

    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(300):
        n, k = int(rng.integers(1, 10)), int(rng.integers(1, 6))
        values = np.sort(np.round(rng.normal(size=n), 1))
        best = min(
            sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts) if len(part))
            for cuts in itertools.combinations_with_replacement(range(n + 1), k - 1)
        )
        worst = max(worst, abs(kmeans(make_bins(values[None]), k).sse - best))
    tensors = sorted(weights_of(path).values(), key=lambda value: -value.size)
    values = np.concatenate([tensor.reshape(-1) for tensor in tensors])[:100_000].astype(np.float32)
    rows = []
    for k in (2, 4, 8, 16, 32, 64, 128, 256):
        start = time.perf_counter()
        codebook = kmeans(make_bins(values[None]), k).codebook
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        peer_codes, centres = kmeans1d.cluster(values.astype(np.float64), k)
        peer_seconds = time.perf_counter() - start
        codes = np.searchsorted(midpoints(codebook), values)
        sse = float(((values - codebook[codes]) ** 2).sum(dtype=np.float64))
        optimum = float(((values - np.array(centres)[peer_codes]) ** 2).sum(dtype=np.float64))
        rows.append(
            {"k": k, "excess_percent": 100 * (sse / optimum - 1), "seconds": seconds, "kmeans1d_seconds": peer_seconds}
        )
    return {"brute_force_cases": 300, "brute_force_worst_difference": worst, "real_weights": rows}


def peak_memory() -> dict:
    """Peak resident memory of compressing a 500 MB safetensors file, in a process of its own."""
    shapes = [(8192, 4096)] + [(4096, 4096)] * 4 + [(4096, 1024)] * 6
    largest = 4 * 8192 * 4096
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "large.safetensors"
        tensors = [(f"layer{i}.weight", "float32", shape) for i, shape in enumerate(shapes)]
        by_name = {name: shape for name, _, shape in tensors}

        def load(name: str) -> np.ndarray:
            rng = np.random.default_rng(int(name.removeprefix("layer").removesuffix(".weight")))
            return rng.laplace(0, 0.02, by_name[name]).astype(np.float32)

        write_safetensors(path, tensors, load)
        nbytes = path.stat().st_size
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            seconds, peak, ratio = pool.apply(_compress_large, (str(path), temporary))
    limit = 1.5 * largest + 500e6
    return {
        "file_bytes": nbytes,
        "largest_tensor_bytes": largest,
        "peak_resident_bytes": peak,
        "limit_bytes": limit,
        "seconds": seconds,
        "ratio": ratio,
    }


def _compress_large(path: str, folder: str) -> tuple[float, int, float]:
    start = time.perf_counter()
    result = codeword.fit(path, "12x")
    result.artifact.save(Path(folder) / "large.cw")
    seconds = time.perf_counter() - start
    if "torch" in sys.modules:
        raise RuntimeError("compressing a safetensors file imported torch")
    # Not ru_maxrss: a process starts with the peak of the one that started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, int(peak) * 1024, result.artifact.ratio


def demo_time() -> dict:
    """Seconds of `codeword.compress` on the embedded LeNet-5, median of five."""
    from codeword import zoo

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        codeword.compress(zoo.lenet5_path(), "30x").close()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "median": statistics.median(seconds)}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: dict) -> str:
    """The JSON as Markdown: what docs/results.md holds."""
    parts = []
    for name in ("lenet5", "resnet20", "resnet56"):
        if name in results:
            parts += network_tables(name, results[name])
    if "exact" in results:
        part = results["exact"]
        parts.append(
            f"Exact solver: worst difference to brute force {part['brute_force_worst_difference']:.1e} over "
            f"{part['brute_force_cases']} cases; on 1e5 real weights, against kmeans1d (exact too):"
        )
        rows = [
            [
                f"{row['k']}",
                f"{row['excess_percent']:+.5f} %",
                f"{row['seconds']:.3f} s",
                f"{row['kmeans1d_seconds']:.2f} s",
            ]
            for row in part["real_weights"]
        ]
        parts.append(table(["k", "excess SSE", "ours", "kmeans1d"], rows))
    if "memory" in results:
        part = results["memory"]
        parts.append(
            f"Peak memory of compressing a file of {part['file_bytes'] / 1e6:.0f} MB, whose largest tensor has "
            f"{part['largest_tensor_bytes'] / 1e6:.0f} MB: {part['peak_resident_bytes'] / 1e6:.0f} MB "
            f"(limit {part['limit_bytes'] / 1e6:.0f} MB), in {part['seconds']:.0f} s."
        )
    return "\n\n".join(parts)


def network_tables(name: str, part: dict) -> list[str]:
    parts = [
        f"**{name}**, {part['data']} (n = {part['n']:,}): uncompressed {part['dense_bytes']:,} bytes, "
        f"top-1 {part['dense_top1']:.2f} %.",
        table(
            ["target", "bytes", "ratio", "top-1", "drop", "container"],
            [
                [
                    row["target"],
                    f"{row['bytes']:,}",
                    f"{row['ratio']:.2f}x",
                    f"{row['top1']:.2f}",
                    f"{row['drop']:+.2f}",
                    f"{row['container_bytes']:,}",
                ]
                for row in part["codeword"]
            ],
        ),
    ]
    if part["baseline"]:
        rows = [
            [
                f"{row['bits']} bits",
                f"{row['bytes']:,}",
                f"{row['ratio']:.2f}x",
                f"{row['top1']:.2f}",
                f"{row['codeword_bytes']:,}",
                f"{row['codeword_top1']:.2f}",
                f"{row['codeword_top1'] - row['top1']:+.2f}",
            ]
            for row in part["baseline"]
        ]
        parts.append(table(["rounding + xz", "bytes", "ratio", "top-1", "our bytes", "our top-1", "ahead by"], rows))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the pretrained ResNets")
    parser.add_argument("--only", choices=["lenet5", "resnet20", "resnet56", "exact", "memory", "demo"])
    arguments = parser.parse_args()
    results = json.loads(JSON.read_text()) if JSON.exists() and arguments.only else {}
    from codeword import zoo

    parts = {
        "memory": peak_memory,
        "demo": demo_time,
        "lenet5": lambda: network(
            "lenet5", zoo.lenet5_path(), zoo.lenet5, "mnist:test", ["20x", "30x", "35x", "40x", "50x"], []
        ),
    }
    if arguments.weights:
        resnet20, resnet56 = (arguments.weights / f"cifar10_resnet{depth}.safetensors" for depth in (20, 56))
        parts |= {
            "exact": lambda: exact_solver(resnet56),
            "resnet20": lambda: network(
                "resnet20", resnet20, zoo.resnet20, "cifar10:test", ["6x", "8x", "9x", "10x", "12x"], [3, 4, 5, 6, 7, 8]
            ),
            "resnet56": lambda: network(
                "resnet56", resnet56, zoo.resnet56, "cifar10:test", ["8x", "10x", "12x"], [4, 5, 6]
            ),
        }
    for name, run in parts.items():
        if arguments.only in (None, name):
            results[name] = run()
    results["machine"] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "command": "benchmarks/main_job.py --weights FOLDER",
    }
    JSON.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
