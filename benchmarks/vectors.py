"""Vector methods, measured: error and bytes beside scalar clustering at equal bytes, and k-means beside faiss.

    python benchmarks/vectors.py [--weights FOLDER] [--faiss]

Bytes are those of each tensor in a file: streams, checksum and its part of the header. The error is that of the
weights, over their energy; nothing is retrained. "kmeans" and "rate-aware" are the scalar methods' errors at the same
bytes, interpolated between neighbouring settings (log error over bytes); null where no setting brackets those bytes.
FOLDER may hold cifar10_resnet20.safetensors. faiss is measured if it is importable; --faiss measures that alone and
leaves the rest of benchmarks/vectors.json, which is written, as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch

from codeword import zoo
from codeword.artifact import code_tensor
from codeword.expr import decode
from codeword.math.vectors import assign_vectors, kmeans_vectors
from codeword.methods import KernelTemplates, KMeans, Method, ProductQuantization, RateAware
from codeword.nn import FactoredConv2d
from codeword.safetensors_file import read_header, read_tensor

JSON = Path(__file__).with_suffix(".json")
SCALAR: dict[str, list[Method]] = {
    "kmeans": [KMeans(k) for k in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)],
    "kmeans by row": [KMeans(k, granularity="row") for k in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)],
    "rate-aware": [RateAware(float(lam), compensate=False) for lam in np.geomspace(1e-3, 2, 24)],
}
PRODUCT: list[Method] = [
    *(ProductQuantization(2, k) for k in (16, 64, 256)),
    *(ProductQuantization(4, k) for k in (16, 64, 256, 1024)),
    ProductQuantization(4, 256, granularity="row"),
    ProductQuantization(4, 256, codebook_dtype="float16"),
    ProductQuantization(4, 64, residual_stages=1),
]
TEMPLATES: list[Method] = [
    *(ProductQuantization(9, k) for k in (64, 256)),
    *(KernelTemplates(k, drop_offset=drop) for k in (16, 64, 256) for drop in (True, False)),
    KernelTemplates(64),
    KernelTemplates(256, drop_offset=False, mantissa_bits=7, codebook_dtype="float32"),
]


def measure(weights: list[np.ndarray], method: Method) -> dict:
    """A method on a list of tensors: bytes and error of all together."""
    nbytes, sse, factored, dense = 0, 0.0, 0, 0
    start = time.perf_counter()
    exprs = [method.compress(weight, None, generator=np.random.default_rng(0)) for weight in weights]
    seconds = time.perf_counter() - start
    for weight, expr in zip(weights, exprs, strict=True):
        coded = code_tensor("w", "float32", weight.shape, expr)
        nbytes += coded.nbytes + len(coded.tree)
        sse += float(np.sum(np.square(decode(expr).astype(np.float64) - weight)))
        if isinstance(method, KernelTemplates):
            out, per_group, *kernel = weight.shape
            layer = FactoredConv2d(torch.nn.Conv2d(per_group, out, kernel), expr)
            one = (per_group, *kernel)  # one output pixel: all layers count the same way
            factored, dense = factored + layer.multiplications(one), dense + layer.dense_multiplications(one)
    size = sum(weight.size for weight in weights)
    energy = sum(float(np.sum(np.square(weight, dtype=np.float64))) for weight in weights)
    row = {
        "method": str(method),
        "bytes": nbytes,
        "ratio": 4 * size / nbytes,
        "mse": sse / size,
        "error": sse / energy,
        "seconds": seconds,
    }
    return row | ({"multiplications": factored / dense} if dense else {})


def at_equal_bytes(curve: list[dict], nbytes: int) -> float | None:
    points = sorted((row["bytes"], np.log(row["error"])) for row in curve)
    if not points[0][0] <= nbytes <= points[-1][0]:
        return None
    return float(np.exp(np.interp(nbytes, *zip(*points, strict=True))))


def table(name: str, weights: list[np.ndarray], methods: list[Method]) -> dict:
    curves = {kind: [measure(weights, method) for method in some] for kind, some in SCALAR.items()}
    rows = []
    for method in methods:
        row = measure(weights, method)
        row |= {kind: at_equal_bytes(curve, row["bytes"]) for kind, curve in curves.items()}
        rows.append(row)
        beside = ", ".join(f"{kind} {row[kind]:.4f}" if row[kind] else f"{kind} none" for kind in SCALAR)
        print(f"{name} {row['method']}: {row['bytes']} bytes, {row['ratio']:.1f}x, {row['error']:.4f} ({beside})")
    return {"weights": sum(weight.size for weight in weights), "rows": rows, "scalar": curves}


def beside_faiss() -> list[dict]:
    """Product quantization's k-means on Laplacian vectors, ours and faiss' with as many threads.

    Seconds to train, and to train and to find the codes of all vectors, each the median of interleaved runs, every one
    of another seed; "mse" is the mean of the runs.
    """
    import faiss

    def ours(vectors: np.ndarray, k: int, seed: int) -> Iterator[np.ndarray]:
        book = kmeans_vectors(vectors, k, generator=np.random.default_rng(seed))
        yield book
        yield assign_vectors(vectors, book).codes

    def theirs(vectors: np.ndarray, k: int, seed: int) -> Iterator[np.ndarray]:
        trainer = faiss.Kmeans(vectors.shape[1], k, niter=25, seed=seed + 1)
        trainer.train(vectors)
        yield trainer.centroids
        yield trainer.assign(vectors)[1]

    rows = []
    for n, d, k, threads in product((100_000, 1_000_000), (2, 4, 8, 16), (16, 64, 256, 1024), {1, os.cpu_count() or 1}):
        vectors = np.random.default_rng(1).laplace(size=(n, d)).astype(np.float32)
        faiss.omp_set_num_threads(threads)
        os.environ["CODEWORD_THREADS"] = str(threads)
        train, both, errors = ({"ours": [], "faiss": []} for _ in range(3))
        for seed, (name, run) in product(range(3), (("ours", ours), ("faiss", theirs))):
            start = time.perf_counter()
            steps = run(vectors, k, seed)
            book = next(steps)
            train[name].append(time.perf_counter() - start)
            next(steps)
            both[name].append(time.perf_counter() - start)
            errors[name].append(assign_vectors(vectors, book).sse / vectors.size)
        row = {"n": n, "d": d, "k": k, "threads": threads}
        row["train"] = {name: statistics.median(times) for name, times in train.items()}
        row["train_and_codes"] = {name: statistics.median(times) for name, times in both.items()}
        row["mse"] = {name: statistics.mean(found) for name, found in errors.items()}
        for what in ("train", "train_and_codes", "mse"):
            row[what]["ratio"] = row[what]["ours"] / row[what]["faiss"]
        rows.append(row)
        print(n, d, k, threads, *(f"{what} {row[what]['ratio']:.3f}" for what in ("train", "train_and_codes", "mse")))
    del os.environ["CODEWORD_THREADS"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--faiss", action="store_true")
    arguments = parser.parse_args()
    if arguments.faiss:
        results = json.loads(JSON.read_text())
        results["machine"]["load"] = os.getloadavg()[0]
        results["faiss"] = beside_faiss()
        JSON.write_text(json.dumps(results, indent=1) + "\n")
        return
    results: dict = {"machine": {"cpu_count": os.cpu_count(), "python": platform.python_version()}}

    def read(path: Path, *kinds: str) -> list[np.ndarray]:
        entries = read_header(path).entries
        return [read_tensor(path, entries[name]) for name in sorted(entries) if any(kind in name for kind in kinds)]

    lenet = zoo.lenet5_path()
    results["lenet5 conv2"] = table(
        "lenet5 conv2", read(lenet, "conv2.weight"), [ProductQuantization(5, 64), *TEMPLATES[2:]]
    )
    results["lenet5 fc1"] = table("lenet5 fc1", read(lenet, "fc1.weight"), PRODUCT)
    if arguments.weights is not None:
        convs = read(arguments.weights / "cifar10_resnet20.safetensors", ".conv1.weight", ".conv2.weight")
        results["resnet20 convs"] = table("resnet20 convs", convs, PRODUCT + TEMPLATES)
    results["machine"]["load"] = os.getloadavg()[0]  # other work on the machine while timing
    results["faiss"] = beside_faiss() if find_spec("faiss") else None
    JSON.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
