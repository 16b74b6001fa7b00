"""Accuracy without data and without retraining at equal bytes on disk: every method of ours beside what is common.

    pip install coremltools scikit-learn zstandard
    CODEWORD_DATA=DATA python benchmarks/accuracy.py --weights FOLDER [--only peers|ours|table] [--net NAME]

FOLDER holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors; scores are of all 10,000 test images. A row
is one file: a net, a method and its settings, a packing, bytes and scores. `kl` is the divergence of its outputs from
the uncompressed net's (nats an image) and `agreement` the percent of images with the same answer: they tell apart what
top-1, where an image is 0.01, leaves to chance. Ours are .cw files, as large as they are on disk. Writes
benchmarks/accuracy.json, each part of it anew; scores are kept by digest of the weights in --cache.

Peers are made and counted by codeword.peers.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import codeword
from codeword import zoo
from codeword.artifact import Artifact
from codeword.data import load_data
from codeword.methods import (
    Birch,
    DensityKMeans,
    Granularity,
    Keep,
    KernelTemplates,
    KMeans,
    Lloyd,
    Method,
    ProductQuantization,
    RateAware,
    RowScaled,
)
from codeword.peers import CODERS as PACKINGS
from codeword.peers import DEFAULT_LEAST as LEAST
from codeword.peers import Packed, Subject, by_rows, nf4, palettized, sizes, uniform
from codeword.sources import open_source
from main_job import Weights, table, weights_of

JSON = Path(__file__).with_suffix(".json")
NETS: dict[str, Callable[[], torch.nn.Module]] = {"resnet20": zoo.resnet20, "resnet56": zoo.resnet56}
BATCH = 100  # faster than 500 on one core by a third
# What is run: (least weights of a tensor, scale of least error, bits); (least, channels a table, scales, dim, bits).
UNIFORM = {
    "resnet20": [(0, False, (3, 4, 5, 6, 7, 8)), (LEAST, True, (2, 3, 4, 5, 6, 8)), (0, True, (3, 4, 5))],
    "resnet56": [(0, False, (3, 4, 5, 6, 8)), (LEAST, True, (3, 4, 5, 6))],
}
PALETTIZED = {
    "resnet20": [
        (LEAST, None, False, 1, (2, 3, 4, 6, 8)),
        (0, None, False, 1, (3, 4, 6)),
        (LEAST, None, True, 1, (3, 4, 6)),
        (LEAST, 16, False, 1, (3, 4, 6)),
        (LEAST, 8, False, 1, (2, 3, 4, 6)),
        (LEAST, 4, False, 1, (3, 4)),
        (LEAST, 1, False, 1, (2, 3)),
        (LEAST, None, False, 2, (4,)),
    ],
    "resnet56": [
        (LEAST, None, False, 1, (2, 3, 4, 6, 8)),
        (LEAST, None, True, 1, (3, 4, 6)),
        (LEAST, 8, False, 1, (3, 4, 6)),
        (LEAST, 1, False, 1, (3,)),
    ],
}
LARGEST = 64 * 64 * 9  # weights of a tensor, in both nets
NEARLY_LOSSLESS = 0.002  # kl
RATIOS = (4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20)


class Net:
    """A net, the test set, and the scores of any weights for it."""

    def __init__(self, name: str, folder: Path, cache: Path) -> None:
        self.name, self.path = name, folder / f"cifar10_{name}.safetensors"
        self.weights = weights_of(self.path)
        self.dense_bytes = sum(4 * value.size for value in self.weights.values())
        self._model = NETS[name]()
        self._data = load_data("cifar10:test")
        self._cache = cache

    def model(self, weights: Weights) -> torch.nn.Module:
        self._model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, strict=False)
        return self._model

    def score(self, weights: Weights) -> dict:
        file = self._cache / f"{self._digest(weights)}.json"
        if not file.exists():
            found, reference = self._outputs(weights), self._reference()
            answers, truth = found.argmax(1), torch.from_numpy(self._data.y)
            divergence = torch.nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True)
            found = {
                "top1": 100 * (answers == truth).double().mean().item(),
                "agreement": 100 * (answers == reference.argmax(1)).double().mean().item(),
                "kl": divergence.item(),
            }
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())

    def _digest(self, weights: Weights) -> str:
        digest = hashlib.sha256(self.name.encode())
        for name in sorted(weights):
            digest.update(weights[name].astype(np.float32).tobytes())
        return digest.hexdigest()

    def _outputs(self, weights: Weights) -> torch.Tensor:
        """Log-probabilities (images, classes)."""
        model = self.model(weights).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            parts = [model(torch.from_numpy(self._data.x[at : at + BATCH])) for at in range(0, len(self._data), BATCH)]
        return torch.cat(parts).log_softmax(1)

    def _reference(self) -> torch.Tensor:
        file = self._cache / f"{self._digest(self.weights)}.npy"
        if not file.exists():
            np.save(file, self._outputs(self.weights).numpy())
        return torch.from_numpy(np.load(file))

    def facts(self) -> dict:
        return {"data": "cifar10:test", "n": len(self._data), "bytes": self.dense_bytes, **self.score(self.weights)}

    def row(self, method: str, settings: str, nbytes: int, packing: str, score: dict) -> dict:
        size = {"bytes": nbytes, "ratio": self.dense_bytes / nbytes}
        return {"net": self.name, "method": method, "settings": settings, "packing": packing, **size, **score}


# Peers


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=19).compress(data)


CODERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": PACKINGS["packed"],
    "zip": lambda data: zlib.compress(data, 9),
    "xz": PACKINGS["xz"],
    "zstd": zstd,
}


def peers_of(net: Net) -> Iterator[tuple[str, str, Packed]]:
    """(method, settings, what it made)."""
    weights = net.weights
    yield "float16", "", by_rows(weights, 1 << 62, lambda rows: uniform(rows, 8, clip=False))
    for least, clip, widths in UNIFORM[net.name]:
        for bits in widths:
            settings = f"int{bits} a channel, scale {'of least error' if clip else 'of the largest'}, {layers(least)}"
            made = by_rows(weights, least, lambda rows, bits=bits, clip=clip: uniform(rows, bits, clip))
            yield "uniform", settings, made
    yield "NF4", f"blocks of 64, {layers(LEAST)}", by_rows(weights, LEAST, nf4)
    for least, group, scale, dim, widths in PALETTIZED[net.name]:
        for bits in widths:
            table = "a tensor" if group is None else f"{group} channels"
            extra = (", channel scales" if scale else "") + (f", vectors of {dim}" if dim > 1 else "")
            settings = f"{bits} bits, a table for {table}{extra}, {layers(least)}"
            subject = Subject(net.model(weights))
            made = palettized(subject, bits, group=group, scale=scale, dim=dim, least=least)
            yield "coremltools", settings, made


def layers(least: int) -> str:
    return f"layers of {least} weights and more" if least else "all layers"


def peers(net: Net) -> list[dict]:
    rows = []
    for method, settings, made in peers_of(net):
        score = net.score(made.weights)
        rows += [net.row(method, settings, nbytes, packing, score) for packing, nbytes in sizes(made, CODERS).items()]
        best = min(rows[-len(CODERS) :], key=lambda row: row["bytes"])
        print(f"{net.name} {method} {settings}: {best['bytes']} {best['packing']} {best['top1']:.2f}", flush=True)
    return rows


# Ours


Of = Callable[[str, int, float], Method]  # of a tensor's name, its number of weights, and the dial


class Family(NamedTuple):
    """A method on all tensors, and one dial for it: bits a weight of the largest tensors."""

    method: str
    settings: str
    of: Of
    low: float = 1.0
    high: float = 6.0


def bits_of(size: int, bits: float) -> float:
    """More for small tensors: an error of one relative size then costs the same in all, as `allocate` has it."""
    return bits + 0.5 * math.log2(LARGEST / size)


def clusters(size: int, bits: float, dim: int = 1, most: int = 4096) -> int:
    return max(2, min(round(2.0 ** (bits * dim)), size // dim // 2, most))


def kmeans(rows: int | None = None, granularity: Granularity = "tensor") -> Of:
    """rows: so many share a codebook, where they divide; None for all."""

    def method(name: str, size: int, bits: float) -> Method:
        k = clusters(size, bits_of(size, bits))
        if rows is None or (rows > 1 and name == "linear.weight"):
            return KMeans(k, granularity)
        return KMeans(k, group_size=rows, codebook_dtype="float16")

    return method


def lloyd(start: Literal["linear", "random", "kmeans++"]) -> Of:
    return lambda _, size, bits: Lloyd(clusters(size, bits_of(size, bits)), start)


def density(found: bool) -> Of:
    if found:
        return lambda _, size, bits: DensityKMeans(None, slope(size, bits))
    return lambda _, size, bits: DensityKMeans(clusters(size, bits_of(size, bits)))


def row_scaled(_: str, size: int, bits: float) -> RowScaled:
    return RowScaled(clusters(size, bits_of(size, bits)))


def slope(size: int, bits: float) -> float:
    return float(f"{4.0 ** -bits_of(size, bits):.4g}")


def rate_aware(_: str, size: int, bits: float, **options: Any) -> RateAware:
    return RateAware(slope(size, bits), **options)


def rate_aware_from(start: Of, more: float) -> Of:
    """What another method finds with so many bits more, moved to where bits are few."""
    return lambda name, size, bits: rate_aware(name, size, bits, start=start(name, size, bits + more))


def product(dim: int, stages: int = 0, shared: bool = False) -> Of:
    def method(_: str, size: int, bits: float) -> Method:
        each = bits if shared else bits_of(size, bits)
        k = clusters(LARGEST if shared else size, each / (1 + stages), dim, 1024)
        return ProductQuantization(dim, k, residual_stages=stages, shared="net" if shared else None)

    return method


def templates(shared: bool = False) -> Of:
    def method(name: str, size: int, bits: float) -> Method:
        if name == "linear.weight":
            return rate_aware(name, size, bits)
        # A kernel's gain and offset take about 12 bits beside the code of its template.
        each = (bits if shared else bits_of(size, bits)) - 12 / 9
        k = clusters(LARGEST if shared else size, each, 9, 1024)
        return KernelTemplates(k, shared="net" if shared else None)

    return method


def mixed(vector: Of) -> Of:
    """A vector method on the last stage, three quarters of the weights; rate-aware clustering on the others."""
    return lambda name, size, bits: (vector if name.startswith("layer3") else rate_aware)(name, size, bits)


FAMILIES = [
    Family("A0", "KMeans", kmeans()),
    Family("A0", "KMeans, row scales", kmeans(granularity="row")),
    Family("A0", "KMeans, a codebook for 8 rows", kmeans(8)),
    Family("A0", "KMeans, a codebook for each row", kmeans(1), 1.0, 4.0),
    Family("A1", "Lloyd, linear start", lloyd("linear")),
    Family("A1", "Lloyd, random start", lloyd("random")),
    Family("A1", "Lloyd, k-means++ start", lloyd("kmeans++")),
    Family("A2", "DensityKMeans", density(found=False)),
    Family("A2", "DensityKMeans, k found", density(found=True), 0.5),
    Family("A3", "Birch", lambda _, size, bits: Birch(min(round(6.02 * bits_of(size, bits), 2), 60.0))),
    Family("A4", "RowScaled", row_scaled),
    Family("A5", "RateAware, grid, not compensated", partial(rate_aware, compensate=False), 0.0, 8.0),
    Family("A5", "RateAware, free, not compensated", partial(rate_aware, compensate=False, codebook="free"), 0.0, 8.0),
    Family("A5", "RateAware, grid", rate_aware, 0.0, 8.0),
    Family("A5", "RateAware, free", partial(rate_aware, codebook="free"), 0.0, 8.0),
    Family("A5", "RateAware, grid, no row scales", partial(rate_aware, granularity="tensor"), 0.0, 8.0),
    Family("A5", "RateAware from KMeans, a codebook for 8 rows", rate_aware_from(kmeans(8), 1.5), 0.0, 5.0),
    Family("A5", "RateAware from DensityKMeans", rate_aware_from(density(found=False), 1.5), 0.0, 5.0),
    Family("A5", "RateAware from RowScaled", rate_aware_from(row_scaled, 1.5), 0.0, 5.0),
    Family("B1", "ProductQuantization, 2 weights", product(2), 1.0, 5.0),
    Family("B1", "ProductQuantization, 4 weights", product(4), 0.5, 2.5),
    Family("B1", "ProductQuantization, 4 weights, one codebook for the net", product(4, shared=True), 0.5, 2.5),
    Family("B1", "ProductQuantization, 4 weights, residual", product(4, 1), 1.0, 5.0),
    Family("B2", "KernelTemplates", templates(), 1.5, 2.5),
    Family("B2", "KernelTemplates, one set for the net", templates(shared=True), 1.5, 2.5),
    Family("B1", "RateAware from ProductQuantization, 2 weights", rate_aware_from(product(2), 0.8), 0.5, 4.0),
    Family("B1 + A5", "ProductQuantization, 2 weights, in layer3; RateAware", mixed(product(2)), 1.0, 5.0),
    Family("B2 + A5", "KernelTemplates in layer3; RateAware", mixed(templates()), 1.4, 2.5),
]
FITTED = {"resnet20": (8, 12), "resnet56": (12,)}
# For the larger net the best of each kind on the smaller.
LARGE = ("KMeans, row scales", "DensityKMeans", "RowScaled", "RateAware, grid", "RateAware, free")
SAME = (4, 8, 16, 32, 64, 256)  # codewords in every layer, as one writes a plan by hand


def plan(net: Net, method: Callable[[str, int], Method]) -> codeword.Plan:
    """A method for every matrix; norms and biases at 7 bits of mantissa, which is what the dial gives them at 8x."""
    infos = open_source(net.path).infos
    methods = {info.name: method(info.name, info.size) if len(info.shape) > 1 else Keep(7) for info in infos}
    return codeword.Plan.of(methods, infos, 0, None)


def family_plan(net: Net, family: Family, bits: float) -> codeword.Plan:
    return plan(net, lambda name, size: family.of(name, size, bits))


def fitted(net: Net, family: Family, budget: int, tried: dict[float, int]) -> Artifact | None:
    """The file of at most so many bytes, and hardly less; None if the family has none so small."""

    def make(bits: float) -> Artifact:
        artifact = codeword.compress(net.path, plan=family_plan(net, family, bits))
        tried[bits] = artifact.nbytes
        return artifact

    for end in (family.low, family.high):
        if end not in tried:
            make(end)
    for _ in range(8):
        under = max((bits for bits, nbytes in tried.items() if nbytes <= budget), default=None)
        over = min((bits for bits, nbytes in tried.items() if nbytes > budget), default=None)
        if under is None or over is None or tried[under] >= 0.99 * budget:
            break
        share = (0.995 * budget - tried[under]) / (tried[over] - tried[under])
        make(under + (over - under) * min(max(share, 0.05), 0.95))
    under = max((bits for bits, nbytes in tried.items() if nbytes <= budget), default=None)
    return None if under is None or tried[under] < 0.8 * budget else make(under)


def our_row(net: Net, method: str, settings: str, artifact: Artifact) -> dict:
    """Saved, read back and scored."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.cw"
        artifact.save(file)
        with codeword.load(file) as saved:
            weights = {name: tensor.numpy() for name, tensor in codeword.state_dict(saved).items()}
            row = net.row(method, settings, file.stat().st_size, "cw", net.score(weights))
    print(
        net.name, method, settings, f"{row['bytes']} {row['ratio']:.2f}x {row['top1']:.2f} {row['kl']:.4f}", flush=True
    )
    return row


def ours(net: Net) -> list[dict]:
    rows = []
    same = SAME if net.name == "resnet20" else ()
    for granularity, k in itertools.product(("tensor", "row"), same):
        method = KMeans(k, granularity=granularity)
        artifact = codeword.compress(net.path, plan=plan(net, lambda *_, method=method: method))
        scales = ", row scales" if granularity == "row" else ""
        rows.append(our_row(net, "A0", f"KMeans{scales}, {k} in every layer", artifact))
    for family in FAMILIES:
        if net.name != "resnet20" and family.settings not in LARGE:
            continue
        tried: dict[float, int] = {}
        for ratio in FITTED[net.name]:
            artifact = fitted(net, family, net.dense_bytes // ratio, tried)
            if artifact is not None:
                rows.append(our_row(net, family.method, family.settings, artifact))
    return rows


def dial(net: Net) -> list[dict]:
    """`compress` with a target and nothing else: at round ratios, and at the bytes of each peer that no other beats.

    Of those that kl alone tells apart only the nearly lossless.
    """
    theirs = [row for row in read()["peers"] if row["net"] == net.name]
    unbeaten = front(theirs) + [row for row in front(theirs, "kl", -1) if row["kl"] < NEARLY_LOSSLESS]
    targets = [f"{ratio}x" for ratio in RATIOS] + [str(nbytes) for nbytes in sorted({row["bytes"] for row in unbeaten})]
    return [our_row(net, "A5", f"target {target}", codeword.compress(net.path, target)) for target in targets]


# Both


def front(rows: list[dict], score: str = "top1", sign: int = 1) -> list[dict]:
    """Rows by bytes, each better than all that are no larger."""
    found: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], -sign * row[score])):
        if not found or sign * row[score] > sign * found[-1][score]:
            found.append(row)
    return found


def best(rows: list[dict], nbytes: float, score: str = "top1", sign: int = 1) -> dict | None:
    return max(
        (row for row in rows if row["bytes"] <= nbytes),
        key=lambda row: (sign * row[score], -row["bytes"]),
        default=None,
    )


def beside(net: str, results: dict) -> dict:
    """Who owns the front: the best of ours within the bytes of each peer on theirs, and of both at round ratios."""
    theirs, found, dialled = (
        [row for row in results[section] if row["net"] == net] for section in ("peers", "ours", "dial")
    )
    mine = found + dialled
    out: dict = {}
    for score, sign in (("top1", 1), ("kl", -1)):
        points = []
        for row in front(theirs, score, sign):
            point = {key: row[key] for key in ("bytes", "ratio", "method", "settings", "packing", score)}
            for kind, rows in (("ours", mine), ("dial", dialled)):
                other = best(rows, row["bytes"], score, sign)
                point[kind] = other and {key: other[key] for key in ("bytes", "method", "settings", score)}
                if other:
                    point[kind]["ahead"] = sign * (other[score] - row[score])
            points.append(point)
        lost = {
            kind: [point for point in points if not point[kind] or point[kind]["ahead"] < 0]
            for kind in ("ours", "dial")
        }
        out[score] = {
            "peer_front": points,
            "owned": not lost["ours"],
            "owned_by_dial": not lost["dial"],
            "lost": lost["ours"],
            "lost_by_dial": lost["dial"],
        }
    dense = results["nets"][net]["bytes"]
    out["ratios"] = []
    for ratio in RATIOS:
        line: dict = {"ratio": ratio}
        for kind, rows in (("peers", theirs), ("ours", mine), ("dial", dialled)):
            row = best(rows, dense / ratio)
            line[kind] = row and {key: row[key] for key in ("bytes", "method", "settings", "packing", "top1", "kl")}
        out["ratios"].append(line)
    return out


def tables(results: dict) -> str:
    """The JSON as Markdown."""
    parts = []
    for net, part in results["table"].items():
        facts = results["nets"][net]
        parts.append(f"**{net}**, {facts['bytes']:,} bytes, top-1 {facts['top1']:.2f} %.")
        rows = []
        for line in part["ratios"]:
            peer, mine, dialled = (line[kind] for kind in ("peers", "ours", "dial"))
            shown = [f"{row['top1']:.2f} ({row['method']}, {row['packing']})" if row else "" for row in (peer, mine)]
            ahead = f"{mine['top1'] - peer['top1']:+.2f}" if peer and mine else ""
            rows.append([f"{line['ratio']}x", *shown, ahead, f"{dialled['top1']:.2f}" if dialled else ""])
        parts.append(table(["ratio", "best peer", "best of ours", "ahead by", "target"], rows))
        for score, digits in (("top1", 2), ("kl", 4)):
            found = part[score]
            rows = [
                [
                    f"{point['method']}, {point['settings']}, {point['packing']}",
                    f"{point['bytes']:,}",
                    f"{point[score]:.{digits}f}",
                ]
                + [
                    f"{point[kind][score]:.{digits}f} ({point[kind]['ahead']:+.{digits}f})" if point.get(kind) else ""
                    for kind in ("ours", "dial")
                ]
                for point in found["peer_front"]
            ]
            lost, by_dial = len(found["lost"]), len(found["lost_by_dial"])
            parts.append(f"{score}: {lost} of {len(rows)} peers not matched, {by_dial} by targets alone.")
            parts.append(table(["peer", "bytes", score, "ours, no larger", "target of these bytes"], rows))
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Net], list[dict]]] = {"peers": peers, "dial": dial, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--only", choices=[*SECTIONS, "table"])
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "codeword-accuracy")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # coremltools tells each step
    torch.set_num_threads(1)
    arguments.cache.mkdir(exist_ok=True)
    for name in [arguments.net] if arguments.net else NETS:
        net = Net(name, arguments.weights, arguments.cache)
        for section, run in SECTIONS.items():
            if arguments.only in (None, section):
                rows = run(net)
                results = read()  # only now: each net may be run by a process of its own
                results["nets"][name] = net.facts()
                results[section] = [row for row in results[section] if row["net"] != name] + rows
                JSON.write_text(json.dumps(results, indent=1) + "\n")
    results = read()
    results["table"] = {name: beside(name, results) for name in results["nets"]}
    JSON.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


def read() -> dict:
    empty = {"nets": {}, "table": {}} | {section: [] for section in SECTIONS}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    return empty | (json.loads(JSON.read_text()) if JSON.exists() else {}) | {"machine": versions}


if __name__ == "__main__":
    main()
