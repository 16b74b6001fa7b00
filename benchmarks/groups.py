"""A codebook for each row or group of rows, beside coremltools' palettizer, kmeans1d and scikit-learn; medians.

    pip install coremltools kmeans1d scikit-learn    # and torch; kmeans1d or scikit-learn may be missing
    python benchmarks/groups.py

The weight of a Linear, normal float32 values of standard deviation 0.02 (and 1, once), clustered in groups of whole
rows. Ours: `cluster_groups`, and the whole method `KMeans(k, group_size=...)` to an expression. coremltools:
PostTrainingPalettizer, per_grouped_channel, one worker; where all values fit float16 it rounds them to 4 decimals
first, which enable_fast_kmeans_mode = False turns off ("exact mode"). kmeans1d (exact) and scikit-learn (Lloyd, one
start) loop over groups, a few of them only: their times are scaled up to all, their errors compared with ours on the
same groups. Runs are interleaved. The machine may be shared: read ratios. Writes benchmarks/groups.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

from codeword import KMeans
from codeword.expr import decode
from codeword.kernels import native
from codeword.kernels.groups import Groups, cluster_groups

JSON = Path(__file__).with_suffix(".json")
COLUMNS = 1024
KMEANS1D, SKLEARN = (find_spec(name) is not None for name in ("kmeans1d", "sklearn"))
SOME = 4  # groups that a loop over groups is timed on
ROUNDS = 5


class Way(NamedTuple):
    """A way to cluster a weight: what is timed, its result as values, and the share of all groups it is run on."""

    run: Callable[[], Any]
    values: Callable[[Any], np.ndarray]
    share: float = 1.0


def coremltools(weight: np.ndarray, group_size: int, k: int, *, exact: bool) -> Way:
    options: dict[str, Any] = {
        "n_bits": k.bit_length() - 1,
        "granularity": "per_grouped_channel",
        "group_size": group_size,
    }
    if exact:
        options["enable_fast_kmeans_mode"] = False
    config = PostTrainingPalettizerConfig.from_dict({"global_config": options})
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    model = torch.nn.Sequential(layer)
    return Way(
        lambda: PostTrainingPalettizer(model, config).compress(num_kmeans_workers=1, inplace=False),
        lambda made: made[0].weight.detach().numpy(),
    )


def looped(groups: np.ndarray, cluster: Callable[[np.ndarray], np.ndarray]) -> Way:
    some = groups[:SOME]
    return Way(lambda: [cluster(group) for group in some], np.stack, len(some) / len(groups))


def by_kmeans1d(group: np.ndarray, k: int) -> np.ndarray:
    found = import_module("kmeans1d").cluster(group, k)
    return np.array(found.centroids)[found.clusters]


def by_sklearn(group: np.ndarray, k: int) -> np.ndarray:
    found = import_module("sklearn.cluster").KMeans(k, n_init=1, random_state=0).fit(group[:, None])
    return found.cluster_centers_[found.labels_, 0]


def looked_up(found: Groups) -> np.ndarray:
    return np.take_along_axis(found.codebooks, found.codes.astype(np.int64), axis=1)


def case(rows: int, group_size: int, k: int, deviation: float, rounds: int) -> dict:
    generator = np.random.default_rng(rows + k)
    weight = (generator.normal(size=(rows, COLUMNS)) * deviation).astype(np.float32)
    groups = weight.reshape(-1, group_size * COLUMNS)
    ways = {
        "ours": Way(lambda: cluster_groups(groups, None, k), looked_up),
        "ours, method": Way(
            lambda: KMeans(k, group_size=group_size).compress(weight, None, generator=generator), decode
        ),
        "coremltools": coremltools(weight, group_size, k, exact=False),
        "coremltools, exact mode": coremltools(weight, group_size, k, exact=True),
    }
    if KMEANS1D:
        ways["kmeans1d"] = looped(groups, lambda group: by_kmeans1d(group, k))
    if SKLEARN and k == 16:  # hundreds of times as long
        ways["scikit-learn"] = looped(groups, lambda group: by_sklearn(group, k))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way.run()
            seconds[name].append((time.perf_counter() - start) / way.share)
            found[name] = way.values(result).reshape(-1)
    median = {name: statistics.median(took) for name, took in seconds.items()}

    def sse(name: str, size: int) -> float:
        return float(np.sum((found[name][:size].astype(np.float64) - weight.reshape(-1)[:size]) ** 2))

    row = {
        "rows": rows,
        "columns": COLUMNS,
        "group_size": group_size,
        "k": k,
        "standard deviation": deviation,
        "rounds": rounds,
        "seconds": {name: round(took, 4) for name, took in median.items()},
        "times slower than ours": {name: round(took / median["ours"], 1) for name, took in median.items()},
        "sse over ours": {
            name: round(sse(name, values.size) / sse("ours", values.size), 6) for name, values in found.items()
        },
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and the case of the target alone")
    quick = parser.parse_args().quick
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    shapes, ks = ((1024, 1), (256, 1), (1024, 32)), (16, 4, 64, 2, 256)
    cases = [(1024, 1, 16, 1.0), (1024, 1, 16, 0.02)]
    if not quick:
        cases += [(*shape, k, 0.02) for k in ks for shape in shapes if (*shape, k) != (1024, 1, 16)]
    found = []
    for chosen in cases:
        found.append(case(*chosen, rounds=1 if quick else ROUNDS if chosen[1:3] == (1, 16) else 3))
        record = {
            "machine": f"{platform.machine()}, {native.threads()} threads; other work may have run beside",
            "load average before": load and [round(part, 1) for part in load],
            "load average after": hasattr(os, "getloadavg") and [round(part, 1) for part in os.getloadavg()],
            "cases": found,
        }
        if not quick:  # case by case: it takes a while
            JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
