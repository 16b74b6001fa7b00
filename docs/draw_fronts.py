"""Draw docs/fronts.png, bytes against top-1 of ours and of peers, from benchmarks/accuracy.json (or make docs)."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

from draw_methods import FOLDER, INK, plain
from matplotlib.figure import Figure

JSON = FOLDER.parent / "benchmarks" / "accuracy.json"
KINDS = {
    "peers": ("peers (coremltools, rounding, NF4, float16; each packing)", "#8593a3", "s"),
    "ours": ("our methods, by a plan", "#2b6cb0", "o"),
    "dial": ("the dial: a target and nothing else", "#c2410c", "D"),
}
BELOW = 8.0  # points of top-1 under the uncompressed net that a panel shows


def draw(record: dict, file: Path) -> None:
    nets = record["nets"]
    figure = Figure(figsize=(6.5 * len(nets), 5.4), dpi=110, facecolor="white", layout="constrained")
    for axes, (net, facts) in zip(figure.subplots(1, len(nets), squeeze=False).flat, nets.items(), strict=True):
        for kind, (label, colour, marker) in KINDS.items():
            points = sorted((row["bytes"], row["top1"]) for row in record[kind] if row["net"] == net)
            if not points:
                continue
            nbytes, top1 = zip(*points, strict=True)
            axes.scatter(nbytes, top1, s=16, marker=marker, color=colour, alpha=0.45, lw=0)
            best = list(accumulate(top1, max))
            axes.step([*nbytes, facts["bytes"]], [*best, best[-1]], where="post", color=colour, lw=1.6, label=label)
        plain(axes, f"{net}, {facts['data']}: {facts['bytes']:,} bytes uncompressed")
        axes.axhline(facts["top1"], color=INK, lw=0.8, ls=":")
        axes.text(0.01, facts["top1"], f"uncompressed, {facts['top1']:.2f}", transform=axes.get_yaxis_transform(),
                  va="bottom", size=9, color=INK)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(facts["bytes"] / 25, facts["bytes"] / 1.8)
        ticks = [facts["bytes"] / ratio for ratio in (20, 12, 8, 6, 4, 2)]
        axes.set_xticks(ticks, [f"{nbytes / 1000:.0f} KB\n{facts['bytes'] / nbytes:.0f}x" for nbytes in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(facts["top1"] - BELOW, facts["top1"] + 0.8)
        axes.set_xlabel("bytes on disk (log), and how many times smaller")
        axes.set_ylabel("top-1, percent of the whole test set, no retraining")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(file)


def main() -> None:
    if JSON.exists():
        draw(json.loads(JSON.read_text()), FOLDER / "fronts.png")
    else:
        print("no benchmarks/accuracy.json: docs/fronts.png is left as it is")


if __name__ == "__main__":
    main()
