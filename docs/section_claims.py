"""Section of docs/training_results.md on what papers claim, what was reached here, and by how much it fell short."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from statistics import mean
from typing import Any, NamedTuple

from wording import points, spread

from main_job import table

COMMAND = "CODEWORD_DATA=DATA python recipes/claims.py --weights NET=FILE ..."
NETS = {
    "lenet300": "LeNet-300-100, MNIST",
    "lenet5": "LeNet-5, MNIST",
    "resnet20": "ResNet-20, CIFAR-10",
    "vgg16_32": "VGG-16-32, CIFAR-10",
    "alexnet32": "AlexNet-32, CIFAR-10",
}
CLAIMS = {
    "deep-compression": "Deep Compression (Han et al. 2016): prune, share weights, code",
    "fang": "Prune and quantize by product (Fang et al. 2020), 23 to 38 times smaller",
    "chen": "Kernels as a * template + b (Chen, Chen & Su 2019), convolutions 4 times smaller",
    "jia": "Global dynamic saliency, BIRCH and k-means++ (Jia 2019)",
    "wang": "Where codewords start (Wang, Chen & Wu 2017), before and after training",
}
SEEDS = 3
README_NETS, README_DROP = ("lenet5", "resnet20"), 0.5  # points


class Goal(NamedTuple):
    """What is to be reached on a net by one of the rows of a claim; drop, top1: at most, at least; None: any."""

    claim: str
    net: str
    ratio: float
    drop: float | None = None
    top1: float | None = None
    rows: str = "*"
    of: str = "ratio"  # or conv_ratio: of convolutions alone


# Published top-1 of Deep Compression: 98.42 and 99.26 %.
GOALS = (
    Goal("deep-compression", "lenet300", 40, top1=98.42, rows="*-han"),
    Goal("deep-compression", "lenet5", 39, top1=99.26, rows="*-han"),
    Goal("fang", "lenet5", 38, drop=0.5),
    Goal("fang", "resnet20", 23, drop=0.5),
    Goal("fang", "alexnet32", 23, drop=0.5),
    Goal("chen", "resnet20", 12, drop=0.5, of="conv_ratio"),
    Goal("chen", "vgg16_32", 12, drop=0.5, of="conv_ratio"),
    Goal("jia", "lenet5", 40, drop=0.1),
    Goal("jia", "resnet20", 15, drop=0.3),
)


class Group(NamedTuple):
    """The seeds of a row."""

    name: str
    seeds: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """One for each seed that has it."""
        return [it[key] for it in self.seeds if it[key] is not None]

    def mean(self, key: str) -> float:
        return mean(self.values(key))


def claims(record: dict) -> list[str]:
    groups = list(grouped(record.get("rows", [])))
    dense = "; ".join(f"{NETS.get(net, net)} {facts['test_top1']:.2f} %" for net, facts in record["dense"].items())
    dense = f" ({dense})" if dense else ""
    parts = [
        "## What papers claim, and what was reached",
        f"`{COMMAND}` (raw, with curves, k and bytes of each tensor: `recipes/claims.json`; the rows: "
        "`recipes/claims_rows.py`). Bytes are those of the written file, all tensors in it, read back and verified. "
        f"Top-1 is on the whole test set, drop against the uncompressed net{dense}. Mean over seeds ± the farthest of "
        "them. Before training is the file that training starts from, which may be larger. "
        f"{''.join(f'Note: {note}. ' for note in record['notes'][1:])}".strip(),
    ]
    for claim in dict.fromkeys([*CLAIMS, *(it.seeds[0]["claim"] for it in groups)]):
        mine = [it for it in groups if it.seeds[0]["claim"] == claim]
        parts.append(f"### {CLAIMS.get(claim, claim)}")
        if claim == "wang":
            parts += starts(mine) if mine else ["Not measured yet."]
            continue
        parts += [table(HEAD, [line(it) for it in mine])] if mine else []
        parts.append("\n".join(f"- {said}" for said in verdicts(claim, mine)))
        hows = dict.fromkeys(it.seeds[0]["how"] for it in mine)
        named = {how: ", ".join(f"*{it.name}*" for it in mine if it.seeds[0]["how"] == how) for how in hows}
        parts += ["\n".join(f"- {names}: {how}." for how, names in named.items())] if mine else []
    return parts


def grouped(rows: list[dict[str, Any]]) -> Iterator[Group]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["claim"], row["row"]), []).append(row)
    return (Group(name, seeds) for (_, name), seeds in found.items())


HEAD = ["row", "bytes", "smaller", "convolutions", "zeros", "before training", "top-1", "drop", "epochs", "seeds"]


def line(it: Group) -> list[str]:
    return [
        it.name,
        f"{it.mean('nbytes'):,.0f}",
        spread(it.values("ratio"), 1, "x"),
        spread(it.values("conv_ratio"), 1, "x"),
        f"{100 * it.mean('sparsity'):.1f} %",
        spread(topped(it, "before")),
        spread(it.values("test_top1")),
        points(it.mean("drop")),
        f"{it.seeds[0]['epochs']}",
        f"{len(it.seeds)}",
    ]


def verdicts(claim: str, groups: list[Group]) -> Iterator[str]:
    """For each goal whether a row reaches it, and if none does by how much the nearest falls short."""
    for goal in (goal for goal in GOALS if goal.claim == claim):
        yield verdict(goal, [it for it in groups if it.seeds[0]["net"] == goal.net])
    if claim == "deep-compression":
        yield from beaten(groups)


def verdict(goal: Goal, groups: list[Group]) -> str:
    what = "convolutions " if goal.of == "conv_ratio" else ""
    at = f"{goal.drop:g} points or less" if goal.drop is not None else f"{goal.top1:.2f} %, the accuracy published"
    said = f"**{NETS[goal.net]}**, target {what}{goal.ratio:g}x at {at}"
    rows = [it for it in groups if fnmatch(it.name, goal.rows)]
    if not rows:
        return f"{said}: not measured yet."
    nearest = min(rows, key=lambda it: shortfall(goal, it))
    over, times = lost(goal, nearest), goal.ratio - nearest.mean(goal.of)
    short = [f"{points(over, '')} points"] * (over > 0) + [f"{times:.1f} times"] * (times > 0)
    reached = f"{nearest.mean(goal.of):.1f}x, {nearest.mean('test_top1'):.2f} %, drop {points(nearest.mean('drop'))}"
    seeds = seeds_of(nearest)
    if short:
        return f"{said}: fell short by {' and '.join(short)}: *{nearest.name}* has {reached}{seeds}."
    others = [it.name for it in rows if it is not nearest and shortfall(goal, it) <= 0]
    also = f"; also by {', '.join(f'*{name}*' for name in others)}" if others else ""
    return f"{said}: reached by *{nearest.name}*, {reached}{seeds}{also}."


def seeds_of(it: Group) -> str:
    return "" if len(it.seeds) >= SEEDS else f" ({len(it.seeds)} of {SEEDS} seeds)"


def lost(goal: Goal, it: Group) -> float:
    """Points beyond what may be lost."""
    if goal.drop is not None:
        return round(it.mean("drop") - goal.drop, 3)
    return round((goal.top1 or 0) - it.mean("test_top1"), 3)


def shortfall(goal: Goal, it: Group) -> float:
    """0 or less where the goal is reached, the less the better; else how far off it is, a point as much as a tenth."""
    over, times = lost(goal, it), 10 * (1 - it.mean(goal.of) / goal.ratio)
    return max(over, 0) + max(times, 0) if max(over, times) > 0 else times


def beaten(groups: list[Group]) -> Iterator[str]:
    """Whether our own pipeline is smaller than the reproduction at no lower accuracy."""
    for theirs in (it for it in groups if it.name.endswith("-han")):
        net, ratio, top1 = theirs.seeds[0]["net"], theirs.mean("ratio"), theirs.mean("test_top1")
        smaller = [it for it in groups if ours(it) and it.seeds[0]["net"] == net and it.mean("ratio") > ratio]
        said = f"**{NETS[net]}**, target smaller than *{theirs.name}* at no lower top-1"
        if not smaller:
            yield f"{said}: not measured yet."
            continue
        best = max(smaller, key=lambda it: (min(it.mean("test_top1") - top1, 0.0), it.mean("ratio")))
        less = top1 - best.mean("test_top1")
        facts = f"*{best.name}*, {best.mean('ratio') / ratio:.2f} times smaller{seeds_of(best)}"
        short = f"fell short by {points(less, '')} points: {facts}"
        yield f"{said}: {short if less > 5e-4 else f'reached by {facts}, {points(-less)} points'}."


def ours(it: Group) -> bool:
    return it.seeds[0]["how"].startswith("ours")


def starts(groups: list[Group]) -> list[str]:
    """Top-1 at equal k by start, before and after training."""
    cells: dict[tuple[str, str, str], Group] = {}
    for it in groups:
        net, k, start = it.name.split("-", 2)
        cells[net, k.removeprefix("k"), start] = it
    names = list(dict.fromkeys(start for *_, start in cells))
    head = ["net, codewords", *(f"{name}, {when}" for when in ("before", "after") for name in names)]
    lines, said = [], []
    for net, k in dict.fromkeys((net, k) for net, k, _ in cells):
        row = [f"{NETS.get(net, net)}, {k}"]
        for when in ("before", "after"):
            tops = {name: topped(cells[net, k, name], when) for name in names if (net, k, name) in cells}
            row += [spread(tops.get(name, [])) for name in names]
            means = {name: mean(values) for name, values in tops.items()}
            if "density" in means and (others := {n: it for n, it in means.items() if n != "density"}):
                gap = means["density"] - max(others.values())
                if gap < -0.005:
                    said.append(f"{NETS.get(net, net)}, k = {k}, {when} training (by {-gap:.2f})")
        lines.append(row)
    seeds = sorted({len(it.seeds) for it in groups})
    few = "" if seeds == [SEEDS] else f" Seeds: {', '.join(map(str, seeds))} of {SEEDS}."
    where = "; ".join(said) or "none"
    return [
        f"Top-1 with so many codewords a tensor, one epoch of training with codes fixed.{few}",
        table(head, lines),
        f"The density start is behind the best other at: {where}.",
    ]


def topped(it: Group, when: str) -> list[float]:
    """Top-1 of each seed, before training where that was noted."""
    rows = it.seeds if when == "after" else [seed["before_tuning"] for seed in it.seeds if "before_tuning" in seed]
    return [row["test_top1"] for row in rows if "test_top1" in row]


def readme_rows(record: dict) -> Iterator[str]:
    """Lines of the README's table: our own pipeline, where it loses half a point or less."""
    for it in grouped(record.get("rows", [])):
        net = it.seeds[0]["net"]
        if ours(it) and net in README_NETS and it.mean("drop") <= README_DROP:
            size = f"{it.mean('nbytes') / 1000:.1f} KB | {it.mean('ratio'):.1f}x"
            yield f"| {NETS[net]}, trained | {size} | {it.mean('test_top1'):.2f} | {it.seeds[0]['dense_top1']:.2f} |"
