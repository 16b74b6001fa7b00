"""Which methods are ever better than rate-aware scalars, tensor by tensor, and what files gain from them.

    CODEWORD_DATA=DATA python benchmarks/candidates.py --weights FOLDER --lenet300 FILE [--cache FOLDER]

For each tensor and family: the least error over that of scalars of as many bits, between 0.25 and 8 bits a weight (what
4x to 40x may spend on a tensor), by the outputs' error as compensation supposes it, by the weights' error, and by the
one that says less, which decides. Then files of equal bytes with both sets of candidates, without and with calibration
data (1,024 training images), judged by the divergence of the outputs on 3,000 other training images (Kullback-Leibler,
nats an image; never the test set). Last, how far a sample of rows is from the whole. Writes benchmarks/candidates.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn import functional as F

from codeword import allocate, candidates, zoo
from codeword.cache import Cache, Results
from codeword.calibrate import examples, importance_from_data
from codeword.candidates import Measured, families, fixed, is_compensated, measure, scalars
from codeword.curves import curves_of
from codeword.data import load_data
from codeword.execute import Importance, run
from codeword.methods import Granularity, Keep, Prune, RateAware
from codeword.nn import load_into, state_dict
from codeword.sources import Source, TensorInfo, open_source
from compensation import log_probabilities

JSON = Path(__file__).with_suffix(".json")
BAND = (0.25, 8.0)  # bits a weight
IMAGES, FIRST = 3000, 5000


def line(points: list[Measured], error: str) -> tuple[list[float], list[float]]:
    kept = sorted((point.bits, math.log2(getattr(point, error))) for point in points if getattr(point, error) > 0)
    return [bits for bits, _ in kept], [logarithm for _, logarithm in kept]


def best(references: list[Measured], measured: list[Measured], size: int) -> dict | None:
    """Of one family the least error over that of scalars, by each measure and by the one that says less."""
    ways = {
        "outputs": line([point for point in references if is_compensated(point.method)], "outputs"),
        "weights": line([point for point in references if not is_compensated(point.method)], "weights"),
    }
    rows = []
    for point in measured:
        inside = all(bits[0] <= point.bits <= bits[-1] for bits, _ in ways.values())
        if not inside or not BAND[0] <= point.bits / size <= BAND[1] or not point.outputs > 0:
            continue
        factors = {way: getattr(point, way) / 2 ** np.interp(point.bits, *ways[way]) for way in ways}
        rows.append((max(factors.values()), factors["outputs"], factors["weights"], point.bits / size))
    if not rows:
        return None
    decides = min(rows)
    return {
        "factor": round(decides[0], 4),
        "at_bits_a_weight": round(decides[3], 3),
        "outputs_factor": round(min(row[1] for row in rows), 4),
        "weights_factor": round(min(row[2] for row in rows), 4),
    }


def tensor_row(source: Source, info: TensorInfo, granularity: Granularity) -> dict:
    weight = source.load(info.name)
    references = measure(weight, scalars(granularity), granularity, info.name, 0, None)
    found, seconds = {}, {}
    for kind, named in (("alone", fixed(info.shape, granularity)), ("rate-aware", families(info.shape, granularity))):
        for family, methods in named.items():
            start = time.perf_counter()
            measured = measure(weight, methods, granularity, info.name, 0, None)
            seconds[f"{family}, {kind}"] = round(time.perf_counter() - start, 2)
            found[f"{family}, {kind}"] = best(references, measured, info.size)
    return {"tensor": info.name, "shape": info.shape, "families": found, "seconds": seconds}


def kind_of(method: object) -> str:
    inner = method.then if isinstance(method, Prune) else method
    start = getattr(inner, "start", None)
    name = type(method).__name__ if isinstance(method, Prune) else type(start or inner).__name__
    free = isinstance(inner, RateAware) and inner.codebook == "free" and start is None
    return f"{name}{' free' if free else ''}"


def sample_errors(source: Source, infos: list[TensorInfo], granularity: Granularity) -> list[dict]:
    """Bits and errors measured on a quarter of the rows, over those of all."""
    found = []
    for info in infos:
        weight = source.load(info.name)
        some = [methods[len(methods) // 2] for methods in families(info.shape, granularity).values()]
        pair = []
        for most in (weight.size // 4, weight.size):
            candidates.SAMPLE = most
            pair.append(measure(weight, some, granularity, info.name, 0, None))
        for part, whole in zip(*pair, strict=True):
            found.append({
                "tensor": info.name, "kind": kind_of(part.method), "bits": part.bits / whole.bits,
                "weights": part.weights / whole.weights, "outputs": part.outputs / whole.outputs,
            })  # fmt: skip
    candidates.SAMPLE = 1 << 17
    return found


def file_rows(
    name: str, source: Source, factory: Callable[[], nn.Module], spec: str, ratios: tuple[int, ...], cache: Path | None
) -> list[dict]:
    """Files of equal bytes with both sets of candidates, without and with calibration data."""
    infos = [info for info in source.infos if len(info.shape) > 1 and info.size >= candidates.LEAST]
    found_rows: list[dict] = []
    model = factory()
    dense = run(source, {info.name: Keep() for info in source.infos})
    model.load_state_dict(state_dict(dense), strict=False)
    images = load_data(spec, limit=FIRST + IMAGES).x[FIRST:]
    reference = log_probabilities(model, images)
    names = {info.name for info in source.infos}
    seen = importance_from_data(model, examples(load_data(spec, limit=1024)))
    measured: dict[str, Importance | None] = {
        "none": None,
        "1024 images": {k: seen[k] for k in names & seen.keys()},
    }
    for data, importance in measured.items():
        results = Results(Cache(cache), source, importance)
        for ratio in ratios:
            for kind in ("fast", "all"):
                start = time.perf_counter()
                curves = curves_of(source, names, importance=importance, candidates=kind, results=results)
                seconds = time.perf_counter() - start

                def compress(methods, source=source, importance=importance, results=results):
                    return run(source, methods, importance=importance, results=results)

                found = allocate.fit(curves, sum(info.dense_nbytes for info in source.infos) // ratio, compress)
                load_into(model, found.artifact)
                outputs = log_probabilities(model, images)
                load_into(model, dense)
                divergence = F.kl_div(outputs, reference, reduction="batchmean", log_target=True).item()
                kinds = [kind_of(found.methods[info.name]) for info in infos]
                found_rows.append({
                    "net": name, "data": data, "ratio": ratio, "candidates": kind,
                    "nbytes": found.artifact.nbytes, "kl": divergence,
                    "agreement": 100 * (outputs.argmax(1) == reference.argmax(1)).double().mean().item(),
                    "kinds": {each: kinds.count(each) for each in sorted(set(kinds))},
                    "seconds_of_curves": round(seconds, 2),
                })  # fmt: skip
                print(found_rows[-1], flush=True)
    return found_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--lenet300", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--files-only", action="store_true", help="take tensors and samples from the last run")
    arguments = parser.parse_args()
    nets = {
        "lenet5": (zoo.lenet5_path(), zoo.lenet5, "mnist:train", (10, 20, 30, 40)),
        "lenet300": (arguments.lenet300, zoo.lenet_300_100, "mnist:train", (10, 20, 30, 40)),
        "resnet20": (arguments.weights / "cifar10_resnet20.safetensors", zoo.resnet20, "cifar10:train", (4, 10, 15)),
    }
    result: dict = {"tensors": {}, "files": [], "samples": {}}
    if arguments.files_only:
        result = json.loads(JSON.read_text()) | {"files": []}
    for name, (path, factory, spec, ratios) in nets.items():
        source = open_source(path)
        granularity: Granularity = "row" if any(info.kind == "norm" for info in source.infos) else "tensor"
        infos = [info for info in source.infos if len(info.shape) > 1 and info.size >= candidates.LEAST]
        chosen = infos[::3] if len(infos) > 10 else infos
        if not arguments.files_only:
            result["tensors"][name] = [tensor_row(source, info, granularity) for info in chosen]
            result["samples"][name] = sample_errors(source, infos[-3:-1], granularity)
        result["files"] += file_rows(name, source, factory, spec, ratios, arguments.cache)
        JSON.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
