"""Draw docs/pruning.png, points of top-1 lost against sparsity, from recipes/prune_sweep.json (or make docs)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from draw_methods import FOLDER, INK, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure

JSON = FOLDER.parent / "recipes" / "prune_sweep.json"
TITLES = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10"}
METHODS = {
    "saliency": ("saliency, one ranking (C1)", "#c2410c", "o"),
    "saliency-kinds": ("saliency, convolutions apart (C2)", "#805ad5", "D"),
    "magnitude": ("magnitude, one ranking (C3)", "#2b6cb0", "s"),
    "magnitude-layer": ("magnitude, each layer alone (C3)", "#0f766e", "^"),
    "random": ("random (C3)", "#8593a3", "v"),
}
SHOWN = 12.0  # points lost; what lies below is off the picture, but of the two methods with one ranking


def draw(axes: Axes, net: str, facts: dict) -> None:
    dense = facts["dense"]["test_top1"]
    # method, epochs, sparsity, rate, share of distillation -> points, one a seed
    lost: dict[tuple[str, float, int, float, float], list[float]] = {}
    for row in facts["rows"]:
        run = row["method"], row["epochs"], row["sparsity"], row["rate"], row.get("distill", 0.0)
        lost.setdefault(run, []).append(dense - row["test_top1"])
    sweep, _ = Counter(epochs for _, epochs, *_ in lost).most_common(1)[0]  # one budget for all; a few runs are longer
    sparsities = sorted({sparsity for _, _, sparsity, *_ in lost})
    longer: dict[int, list[tuple[float, float, str, str]]] = {}  # at a sparsity: y, x, what is said, colour
    for shift, (method, (label, colour, marker)) in zip(np.linspace(-0.12, 0.12, 5), METHODS.items(), strict=True):
        mine = {sparsity: points for (name, epochs, sparsity, *_), points in sorted(lost.items())
                if (name, epochs) == (method, sweep)}  # fmt: skip
        if mine:
            x = [sparsities.index(sparsity) + shift for sparsity in mine]
            axes.vlines(x, [min(points) for points in mine.values()], [max(points) for points in mine.values()],
                        color=colour, lw=1.2, alpha=0.7)  # fmt: skip
            mean = [float(np.mean(points)) for points in mine.values()]
            axes.plot(x, mean, "-", marker=marker, ms=5, color=colour, lw=1.5, label=label)
        for (name, epochs, sparsity, rate, distill), points in lost.items():
            if name == method and epochs != sweep:
                x, y = sparsities.index(sparsity) + shift, float(np.mean(points))
                axes.vlines(x, min(points), max(points), color=colour, lw=1.2, alpha=0.7)
                axes.plot(x, y, marker, ms=7, mfc="white", color=colour)
                how = "distilled" if distill else f"rate {rate:g}"
                longer.setdefault(sparsity, []).append((y, x, f"{epochs:g} epochs, {how}", colour))
    for runs in longer.values():  # one under another beside the points, which may lie on each other
        x, middle = max(x for _, x, *_ in runs), float(np.median([y for y, *_ in runs]))
        for at, (_, _, said, colour) in enumerate(sorted(runs)):
            offset = 10, 11 * ((len(runs) - 1) / 2 - at)
            axes.annotate(said, (x, middle), offset, textcoords="offset points", size=8, color=colour, va="center")
    plain(axes, f"{TITLES[net]}: {dense:.2f} % dense, {sweep:g} epoch{'' if sweep == 1 else 's'} a run")
    axes.axhline(0, color=INK, lw=0.8, ls=":")
    axes.set_yscale("symlog", linthresh=0.5, linscale=0.7)
    one_ranking = [max(points) for (name, *_), points in lost.items() if name in ("saliency", "magnitude")]
    axes.set_ylim(
        max(SHOWN, *(1.2 * most for most in one_ranking)),
        min(-0.3, *(min(points) - 0.1 for points in lost.values())),
    )
    ticks = [0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(range(len(sparsities)), [f"{sparsity} %" for sparsity in sparsities])
    axes.set_xlim(-0.5, len(sparsities) - 0.3)
    axes.set_xlabel("weights that are zero")
    axes.set_ylabel("points of top-1 lost, whole test set: mean, least, most of the seeds")
    axes.legend(frameon=False, fontsize=9, loc="best")


def main() -> None:
    nets = json.loads(Path(JSON).read_text()) if JSON.exists() else {}
    nets = {net: facts for net, facts in nets.items() if facts["rows"]}
    if not nets:
        print("no recipes/prune_sweep.json: docs/pruning.png is left as it is")
        return
    figure = Figure(figsize=(6.5 * len(nets), 5.4), dpi=110, facecolor="white", layout="constrained")
    for axes, (net, facts) in zip(figure.subplots(1, len(nets), squeeze=False).flat, nets.items(), strict=True):
        draw(axes, net, facts)
    figure.savefig(FOLDER / "pruning.png")


if __name__ == "__main__":
    main()
