"""Section of docs/clustering.md on accuracy without retraining, at equal bytes, of our methods and of peers."""

from __future__ import annotations

from pathlib import Path

from wording import head, listed

from main_job import table

FRONTS = Path(__file__).with_name("fronts.png")
COMMAND = "CODEWORD_DATA=DATA python benchmarks/accuracy.py --weights FOLDER"
SCORES = {"top1": "top-1", "kl": "divergence of outputs"}
NAMES = {
    "A0": "exact k-means (A0)",
    "A1": "Lloyd's k-means (A1)",
    "A2": "density k-means (A2)",
    "A3": "BIRCH (A3)",
    "A4": "row scales (A4)",
    "A5": "rate-aware (A5)",
    "B1": "product quantization (B1)",
    "B2": "kernel templates (B2)",
}
BUDGETS = (8, 12)  # of the table by method: times smaller than the net in float32


def accuracy(record: dict) -> list[str]:
    nets = [net for net in record["table"] if any(row["net"] == net for row in record["ours"] + record["dial"])]
    if not nets:
        return []
    parts = head("Accuracy without retraining, at equal bytes", COMMAND, "accuracy", record)
    parts += [
        "Files of whole nets on disk, no data, nothing retrained, whole test sets. Peers are counted kindly: no "
        "header, the best of their packings (bit-packed or a byte a code, under zip, xz or zstd), float16 for "
        "what is not coded. Ours: every method with a dial of its own, and the dial itself, which is `compress` with a "
        "target and nothing else. One image of 10,000 is 0.01.",
    ]
    if FRONTS.exists():  # docs/draw_fronts.py makes it, by matplotlib
        parts.append(
            "![Top-1 over bytes of ours and of peers, one panel a net; lines join what no smaller file beats]"
            f"({FRONTS.name})"
        )
    for net in nets:
        part, facts = record["table"][net], record["nets"][net]
        parts.append(
            f"**{net}**, {facts['data']}, {facts['bytes']:,} bytes, top-1 {facts['top1']:.2f} %: the best within each "
            "size."
        )
        parts.append(table(["smaller", "best peer", "best of ours", "the dial", "ahead by"], ratios(part["ratios"])))
        parts += [owned(part[score], score) for score in SCORES if score in part]
    return parts + by_method(record, nets)


def ratios(lines: list[dict]) -> list[list[str]]:
    rows = []
    for line in lines:
        peer, mine, dial = (line[kind] for kind in ("peers", "ours", "dial"))
        known = [it["top1"] for it in (mine, dial) if it]
        rows.append(
            [
                f"{line['ratio']}x",
                f"{peer['top1']:.2f} ({peer['method']})" if peer else "",
                f"{mine['top1']:.2f} ({mine['method']})" if mine else "",
                f"{dial['top1']:.2f}" if dial else "",
                f"{round(max(known) - peer['top1'], 2) + 0.0:+.2f}" if peer and known else "",
            ]
        )
    return rows


def owned(part: dict, score: str) -> str:
    """Whether ours is no worse at every point of the peers' front, and where it is."""
    points = part["peer_front"]
    said = []
    for kind, lost, name in (("ours", "lost", "the best of ours"), ("dial", "lost_by_dial", "the dial alone")):
        if not any(point.get(kind) for point in points):
            continue
        told = [
            f"{it['bytes']:,} bytes, {it['method']} {number(it[score], score)} against "
            + (number(it[kind][score], score) if it.get(kind) else "nothing so small")
            for it in part[lost]
        ]
        said.append(f"{name} is behind at {len(told)} ({listed(told)})" if told else f"{name} is behind at none")
    return (
        f"By {SCORES[score]}, at the {len(points)} sizes of peers that no smaller peer beats, "
        f"{'; '.join(said) or 'ours was not run'}."
    )


def number(value: float, score: str) -> str:
    return f"{value:.2f}" if score == "top1" else f"{value:.4f}"


def by_method(record: dict, nets: list[str]) -> list[str]:
    """The best file of each method within a budget, whatever its settings."""
    rows = record["peers"] + record["ours"] + record["dial"]
    columns = [(net, budget) for net in nets for budget in BUDGETS]
    best: dict[tuple[str, str, int], float] = {}
    for row in rows:
        for net, budget in columns:
            if row["net"] == net and row["ratio"] >= budget:
                key = row["method"], net, budget
                best[key] = max(row["top1"], best.get(key, 0.0))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if any(name == it for it, *_ in best)]
    lines = [
        [
            " + ".join(NAMES.get(part, part) for part in name.split(" + ")),
            *(f"{best[name, net, at]:.2f}" if (name, net, at) in best else "" for net, at in columns),
        ]
        for name in methods
    ]
    return [
        "**Each method's best file** of at least so many times smaller, whatever its settings (empty: none so small, "
        "or not run):",
        table(["method", *(f"{net}, {at}x" for net, at in columns)], lines),
    ]
