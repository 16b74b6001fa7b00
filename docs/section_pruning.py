"""Section of docs/training_results.md on accuracy against sparsity, of recipes/prune_sweep.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from wording import listed, points, spread

from main_job import table

PICTURE = Path(__file__).with_name("pruning.png")
COMMAND = "CODEWORD_DATA=DATA python recipes/prune_sweep.py NET [--weights FILE]"
NETS = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10"}
METHODS = {
    "saliency": "saliency, one ranking (C1)",
    "saliency-kinds": "saliency, convolutions apart (C2)",
    "magnitude": "magnitude, one ranking (C3)",
    "magnitude-layer": "magnitude, each layer alone (C3)",
    "random": "random (C3)",
}
SPARSITIES = (50, 70, 80, 90, 95, 98, 99)
SEEDS = 3


class Target(NamedTuple):
    """What a pruned net may lose."""

    sparsity: int
    points: float
    elsewhere: str = ""  # what else was tried


TARGETS = {
    "lenet5": Target(98, 0.1),
    "resnet20": Target(
        70, 0.5, " With distillation: *resnet20-pruned-70* [above](#what-papers-claim-and-what-was-reached)."
    ),
}


def pruning(record: dict) -> list[str]:
    parts = [
        "## Accuracy against sparsity",
        f"`{COMMAND}` (raw: `recipes/prune_sweep.json`). Each run starts from the trained net and has the same number "
        "of epochs, whatever the method; masks come about along the first half. Settings were chosen on 5,000 held-out "
        "training images; the test images were looked at once, at the end. Top-1 on the whole test set: mean over "
        "seeds ± the farthest of them; one seed where there is no ±.",
    ]
    if PICTURE.exists() and any(facts["rows"] for facts in record.values()):
        parts.append(f"![Points of top-1 lost against the share of zeros, one panel a net]({PICTURE.name})")
    for net, title in NETS.items():
        facts = record.get(net, {"rows": []})
        parts += of_net(net, title, facts) if facts["rows"] else [f"**{title}**: not measured yet."]
    return parts


def of_net(net: str, title: str, facts: dict) -> list[str]:
    dense = facts["dense"]["test_top1"]
    budget, _ = Counter(row["epochs"] for row in facts["rows"]).most_common(1)[0]
    cells: dict[tuple[str, int], list[float]] = {}
    for row in facts["rows"]:
        if row["epochs"] == budget:
            cells.setdefault((row["method"], row["sparsity"]), []).append(row["test_top1"])
    counts = {len(tops) for tops in cells.values()}
    few = "" if counts == {SEEDS} else f" Seeds of a cell: {', '.join(map(str, sorted(counts)))} of {SEEDS}."
    lines = [
        [label, *(spread(cells.get((method, sparsity), [])) for sparsity in SPARSITIES)]
        for method, label in METHODS.items()
        if any(name == method for name, _ in cells)
    ]
    parts = [
        f"**{title}**, {dense:.2f} % dense, {budget:g} epoch{'' if budget == 1 else 's'} a run.{few}",
        table(["zeros", *(f"{sparsity} %" for sparsity in SPARSITIES)], lines),
    ]
    longer = [row for row in facts["rows"] if row["epochs"] != budget]
    if longer:
        parts.append(f"With other budgets: {'; '.join(others(longer))}.")
    return [*parts, f"{target(net, facts)} {behind(cells)}".strip()]


def others(rows: list[dict]) -> list[str]:
    groups: dict[tuple[str, int, float, float, float], list[float]] = {}
    for row in rows:
        run = row["method"], row["sparsity"], row["epochs"], row.get("distill", 0.0), row["rate"]
        groups.setdefault(run, []).append(row["test_top1"])
    rates = Counter(run[:4] for run in groups)  # told where there are several
    said = []
    for (method, sparsity, epochs, distill, rate), tops in sorted(groups.items()):
        which = f" at rate {rate:g}" if rates[method, sparsity, epochs, distill] > 1 else ""
        which += f", {distill:.0%} of the loss distillation" if distill else ""
        runs = f"{method} at {sparsity} % zeros, {epochs:g} epochs{which}"
        said.append(f"{runs}, {spread(tops)} ({len(tops)} of {SEEDS} seeds)")
    return said


def target(net: str, facts: dict) -> str:
    """Whether what was asked for is kept, by whichever method and budget did best."""
    want = TARGETS[net]
    groups: dict[tuple[str, float, float, float], list[float]] = {}
    for row in facts["rows"]:
        if row["sparsity"] == want.sparsity:
            drop = facts["dense"]["test_top1"] - row["test_top1"]
            run = row["method"], row["epochs"], row["rate"], row.get("distill", 0.0)
            groups.setdefault(run, []).append(drop)
    said = f"Target: {want.sparsity} % zeros at {want.points:g} points or less"
    if not groups:
        return f"{said}: not measured yet."
    (method, epochs, _, distill), drops = min(groups.items(), key=lambda it: mean(it[1]))
    lost = round(mean(drops), 3)
    short = "reached" if lost <= want.points else f"fell short by {points(lost - want.points, '')} points"
    how = f"{METHODS[method]}, with distillation" if distill else METHODS[method]
    facts = f"drop {points(lost)} in {epochs:g} epochs, {how}, {len(drops)} of {SEEDS} seeds"
    return f"{said}: {short} ({facts}).{want.elsewhere}"


def behind(cells: dict[tuple[str, int], list[float]]) -> str:
    """Where the mean of C1 is below that of magnitude, ranked alike or by layer."""
    said = []
    for peer in ("magnitude", "magnitude-layer"):
        both = [at for at in SPARSITIES if ("saliency", at) in cells and (peer, at) in cells]
        if not both:
            continue
        worse = [
            f"{at} % (by {gap:.2f}{within(cells['saliency', at], cells[peer, at])})"
            for at in both
            if (gap := mean(cells[peer, at]) - mean(cells["saliency", at])) > 0.005
        ]
        where = f"at {len(worse)} of {len(both)} sparsities: {listed(worse)}" if worse else f"at none of {len(both)}"
        said.append(f"{METHODS[peer]} {where}")
    return f"Saliency (C1) is below {'; below '.join(said)}." if said else ""


def within(mine: list[float], theirs: list[float]) -> str:
    """Whether the seeds of both overlap."""
    return ", seeds overlap" if max(mine) >= min(theirs) else ""
