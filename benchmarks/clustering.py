"""Scalar clustering: starts against the optimum (A1, A2), BIRCH against scikit-learn's (A3), row scales (A4).

    [CODEWORD_DATA=DATA] python benchmarks/clustering.py [--only starts|birch|rows|accuracy|fc] [--nets FOLDER]

Writes benchmarks/clustering.json and prints its tables. Rivals run in turn, round after round, and medians are kept.
With CODEWORD_DATA (MNIST) the accuracy of the bundled LeNet-5 is measured, too; scikit-learn is measured if there.
fc also takes the nets of recipes/train_narrow.py from FOLDER (CIFAR-10), those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import codeword
from codeword import zoo
from codeword.artifact import code_tensor
from codeword.expr import decode
from codeword.math.bins import make_bins
from codeword.math.birch import birch, scan, sweep, threshold_of
from codeword.math.density import density_kmeans
from codeword.math.kmeans import kmeans, sse_curve
from codeword.methods import DensityKMeans, KMeans, Lloyd, RowScaled
from codeword.safetensors_file import read_header, read_tensor

JSON = Path(__file__).with_suffix(".json")
STARTS = ("linear", "random", "kmeans++", "density")
ROUNDS = 5
N = 1_000_000


def lenet(name: str) -> np.ndarray:
    return read_tensor(zoo.lenet5_path(), read_header(zoo.lenet5_path()).entries[f"{name}.weight"])


def distributions() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    normal = generator.normal(size=5 * N)
    drawn = {
        "Gaussian": normal[:N],
        "Laplacian": generator.laplace(size=N),
        "bimodal (three quarters pruned)": normal[np.abs(normal) > 1.15][:N],
    }
    return {name: values.astype(np.float32).reshape(1, -1) for name, values in drawn.items()} | {
        "LeNet-5 fc1": lenet("fc1").reshape(1, -1)
    }


def interleaved(contenders: dict, rounds: int = ROUNDS) -> dict:
    """Each contender's last result and median seconds, all taking turns; first round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            results[name] = run(turn)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: (results[name], statistics.median(seconds[name])) for name in contenders}


def starts() -> list[dict]:
    rows = []
    for name, values in distributions().items():
        bins = make_bins(values)
        for k in (16, 64, 256):
            best = kmeans(bins, k).sse
            tries: dict[str, list] = {start: [] for start in (*STARTS, "A2")}

            def run(start, turn, k=k, bins=bins, tries=tries):
                if start == "A2":
                    found = density_kmeans(bins, k)
                else:
                    found = Lloyd(k, start).cluster(bins, np.random.default_rng(turn))
                tries[start].append(found)
                return found

            timed = interleaved({start: lambda turn, start=start: run(start, turn) for start in tries})
            for start, (_, seconds) in timed.items():
                found = tries[start][1:]
                excess = [100 * (it.sse / best - 1) for it in found]
                rows.append(
                    {
                        "data": name,
                        "k": k,
                        "start": start,
                        "excess_percent": statistics.median(excess),
                        "excess_best_of_rounds": min(excess),
                        "seconds": seconds,
                        "iterations": statistics.median(it.iterations for it in found),
                    }
                )
    return rows


def birch_times() -> dict:
    """Seconds of the scan alone, against scikit-learn's at the same threshold, and what the whole method finds."""
    try:
        from sklearn.cluster import Birch as Peer
    except ImportError:
        Peer = None
    times, found = [], []
    for n in (100_000, 1_000_000):
        values = np.random.default_rng(0).normal(size=(1, n)).astype(np.float32)
        bins = make_bins(values)
        for db in (20.0,) if n > 100_000 else (20.0, 30.0):
            threshold = threshold_of(bins, bins.energy * 10 ** (-db / 10))
            contenders = {
                "bins": lambda turn, v=values, t=threshold: sweep(make_bins(v), t).weight.size,
                "raw": lambda turn, v=values, t=threshold: scan(v, t).weight.size,
            }
            if Peer is not None:
                column = values.reshape(-1, 1).astype(np.float64)  # float32 would cost it digits
                for label, branching in (("scikit-learn, default branching", 50), ("scikit-learn, one node", 10**6)):
                    contenders[label] = lambda turn, b=branching, t=threshold, c=column: len(
                        Peer(threshold=t, branching_factor=b, n_clusters=None).fit(c).subcluster_centers_
                    )
            timed = interleaved(contenders, 3 if n == 100_000 else 1)
            times += [
                {"n": n, "db": db, "threshold": threshold, "scan": name, "clusters": clusters, "seconds": seconds}
                for name, (clusters, seconds) in timed.items()
            ]
    for name, values in distributions().items():
        bins = make_bins(values)
        for db in (10.0, 20.0, 30.0, 40.0):
            target = bins.energy * 10 ** (-db / 10)

            def ours(turn, bins=bins, target=target):
                leaves = sweep(bins, threshold_of(bins, target))
                return birch(bins, leaves, target, np.random.default_rng(turn))

            def exact(turn, bins=bins, target=target):
                k = int(np.argmax(sse_curve(bins, 400) <= target)) + 1
                while k > 1 and kmeans(bins, k - 1).sse <= target:
                    k -= 1
                while (best := kmeans(bins, k)).sse > target:
                    k += 1
                return best

            timed = interleaved({"birch": ours, "exact": exact}, 3)
            found += [
                {
                    "data": name,
                    "db": db,
                    "method": method,
                    "k": len(it.codebook),
                    "reached_db": 10 * float(np.log10(bins.energy / it.sse)),
                    "seconds": seconds,
                }
                for method, (it, seconds) in timed.items()
            ]
    return {"scan": times, "k": found}


def rows_of_weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    scale = np.exp(0.7 * generator.normal(size=(256, 1))) * generator.choice([-1, 1], size=(256, 1))
    drawn = {
        f"{draw} rows": (getattr(generator, draw)(size=(256, 512)) * scale).astype(np.float32)
        for draw in ("normal", "laplace", "gumbel")
    }
    return {"LeNet-5 fc1": lenet("fc1"), "LeNet-5 fc2": lenet("fc2")} | drawn


def measured(weight: np.ndarray, method) -> tuple[int, float]:
    """(bytes in a file, squared error over energy)."""
    expr = method.compress(weight, None, generator=np.random.default_rng(0))
    wide = weight.astype(np.float64)
    error = float(np.sum((decode(expr).astype(np.float64) - wide) ** 2) / np.sum(wide**2))
    return code_tensor("w", "float32", weight.shape, expr).nbytes, error


def row_scales() -> list[dict]:
    rows = []
    for name, weight in rows_of_weights().items():
        for k in (4, 8, 16, 32):
            nbytes, error = measured(weight, RowScaled(k))
            below, more = measured(weight, KMeans(k)), k
            above = below
            while above[0] <= nbytes:
                below, more = above, more + 1
                above = measured(weight, KMeans(more))
            share = (nbytes - below[0]) / max(above[0] - below[0], 1)
            between = float(np.exp((1 - share) * np.log(below[1]) + share * np.log(above[1])))
            rows.append(
                {
                    "data": name,
                    "k": k,
                    "bytes": nbytes,
                    "error": error,
                    "plain_k": more - 1,
                    "plain_bytes": below[0],
                    "plain_error": below[1],
                    "plain_error_between": between,
                }
            )
    return rows


def accuracy() -> list[dict]:
    from codeword.data import load_data

    dataset = load_data("mnist:test")
    rows = [{"method": "uncompressed", "k": None, "top1": _top1(codeword.Keep(), dataset)}]
    for k in (2, 3, 4):
        contenders = {start: Lloyd(k, start) for start in STARTS} | {
            "A2": DensityKMeans(k),
            "exact": KMeans(k),
            "row-scaled": RowScaled(k),
        }
        rows += [{"method": name, "k": k, "top1": _top1(it, dataset)} for name, it in contenders.items()]
    return rows


def fc_layers(folder: Path | None) -> list[dict]:
    """Plain clustering and row scales on the linear layers of each net, the rest of it kept; whole test sets.

    Each layer's plain codebook is the smallest whose coded bytes are no fewer than those with row scales ("above"), and
    the next smaller one ("below").
    """
    from codeword.data import load_data
    from codeword.evaluate import load_factory

    sys.path.append(str(Path(__file__).parent.parent / "recipes"))
    nets = {"LeNet-5": (zoo.lenet5_path(), "codeword.zoo:lenet5", "mnist:test")}
    for name, factory, data in (
        ("lenet300", "codeword.zoo:lenet_300_100", "mnist:test"),
        ("alexnet", "train_narrow:narrow_alexnet", "cifar10:test"),
        ("vgg", "train_narrow:narrow_vgg", "cifar10:test"),
    ):
        if folder is not None and (path := folder / f"{name}.safetensors").exists():
            nets[name] = (path, factory, data)
    rows = []
    for net, (path, factory, data) in nets.items():
        dataset, model = load_data(data), load_factory(factory)()
        weights = {
            name: read_tensor(path, entry)
            for name, entry in read_header(path).entries.items()
            if name.endswith("weight") and len(entry.shape) == 2
        }

        def top1(methods, path=path, dataset=dataset, model=model):
            rules = [codeword.Rule(name, method) for name, method in methods.items()]
            plan = codeword.Plan((*rules, codeword.Rule("*", codeword.Keep())))
            with codeword.compress(path, plan=plan) as artifact:
                return codeword.evaluate(artifact, dataset, model=model).top1

        dense = top1({})
        energy = {name: float(np.sum(weight.astype(np.float64) ** 2)) for name, weight in weights.items()}

        def sized(methods, weights=weights, energy=energy, top1=top1):
            layers = [measured(weight, methods[name]) for name, weight in weights.items()]
            error = sum(it[1] * energy[name] for name, it in zip(weights, layers, strict=True)) / sum(energy.values())
            return {"bytes": sum(it[0] for it in layers), "error": error, "top1": top1(methods)}

        for k in (4, 8, 16, 32):
            plain = {}
            for name, weight in weights.items():
                more, nbytes = k, measured(weight, RowScaled(k))[0]
                while measured(weight, KMeans(more))[0] < nbytes:
                    more += 1
                plain[name] = more
            found = {
                "A4": sized(dict.fromkeys(weights, RowScaled(k))),
                "A0 below": sized({name: KMeans(it - 1) for name, it in plain.items()}),
                "A0 above": sized({name: KMeans(it) for name, it in plain.items()}),
            }
            rows += fc_rows(net, dense, k, list(plain.values()), found)
    return rows


def fc_rows(net: str, dense: float, k: int, plain: list[int], found: dict[str, dict]) -> list[dict]:
    """Rows of a table, and what plain clustering would make of as many bytes: between its neighbours, by bytes."""
    below, above = found["A0 below"], found["A0 above"]
    share = (found["A4"]["bytes"] - below["bytes"]) / (above["bytes"] - below["bytes"])
    between = {
        "bytes": found["A4"]["bytes"],
        "error": float(np.exp((1 - share) * np.log(below["error"]) + share * np.log(above["error"]))),
        "top1": (1 - share) * below["top1"] + share * above["top1"],
    }
    head = {"net": net, "dense_top1": dense, "k": k, "plain_k_above": plain}
    return [{**head, "method": name, **it} for name, it in {**found, "A0 between": between}.items()]


def _top1(method, dataset) -> float:
    plan = codeword.Plan((codeword.Rule("*.weight", method), codeword.Rule("*", codeword.Keep())))
    with codeword.compress(zoo.lenet5_path(), plan=plan) as artifact:
        return codeword.evaluate(artifact, dataset, model=zoo.lenet5()).top1


def show(results: dict) -> None:
    for row in results.get("starts", []):
        print(
            f"{row['data']:32} k {row['k']:3} {row['start']:9} +{row['excess_percent']:8.3f} % "
            f"(best {row['excess_best_of_rounds']:7.3f} %) {1e3 * row['seconds']:7.2f} ms "
            f"{row['iterations']:6.0f} iterations"
        )
    for row in results.get("birch", {}).get("scan", []):
        print(f"n {row['n']:8} {row['db']:.0f} dB {row['scan']:32} {row['clusters']:6} {1e3 * row['seconds']:10.1f} ms")
    for row in results.get("birch", {}).get("k", []):
        print(
            f"{row['data']:32} {row['db']:.0f} dB {row['method']:6} k {row['k']:4} {row['reached_db']:.2f} dB "
            f"{1e3 * row['seconds']:8.1f} ms"
        )
    for row in results.get("rows", []):
        print(
            f"{row['data']:14} k {row['k']:2} {row['bytes']:7} bytes {row['error']:.6f}; plain k {row['plain_k']:2} "
            f"{row['plain_bytes']:7} bytes {row['plain_error']:.6f}, at equal bytes {row['plain_error_between']:.6f}"
        )
    for row in results.get("fc", []):
        print(
            f"{row['net']:8} dense {row['dense_top1']:.2f} {row['method']:10} k {row['k']:2} "
            f"{row['bytes']:8} bytes {row['error']:.6f} top-1 {row['top1']:.2f}"
        )
    for row in results.get("accuracy", []):
        print(f"{row['method']:12} k {row['k']} top-1 {row['top1']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, help="folder of what recipes/train_narrow.py made")
    parser.add_argument("--only", choices=("starts", "birch", "rows", "accuracy", "fc"))
    args = parser.parse_args()
    only = args.only
    parts = {
        "starts": starts,
        "birch": birch_times,
        "rows": row_scales,
        "accuracy": accuracy,
        "fc": lambda: fc_layers(args.nets),
    }
    measured_now = {
        name: part()
        for name, part in parts.items()
        if only in (None, name) and (name not in ("accuracy", "fc") or "CODEWORD_DATA" in os.environ)
    }
    results = (json.loads(JSON.read_text()) if JSON.exists() else {}) | measured_now
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    JSON.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
