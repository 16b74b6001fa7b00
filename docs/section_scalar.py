"""Sections of docs/clustering.md on papers' scalar methods: starts (A1, A2), BIRCH (A3), row scales (A4)."""

from __future__ import annotations

import statistics

from wording import head, listed, milliseconds, speed, times, where

from main_job import table

COMMAND = "CODEWORD_DATA=DATA python benchmarks/clustering.py --nets FOLDER"
NAMES = {
    "linear": "linear start",
    "random": "random start",
    "kmeans++": "k-means++ start",
    "density": "A2's start, not revised",
    "A2": "density k-means (A2)",
    "exact": "exact (A0)",
    "row-scaled": "row scales (A4)",
}


def clustering(record: dict) -> list[str]:
    parts = head("Papers' scalar methods: starts, BIRCH, row scales", COMMAND, "clustering", record)
    sections = {"starts": starts, "birch": birch, "rows": row_scales, "fc": linear_layers, "accuracy": accuracy}
    for name, section in sections.items():
        if record.get(name):
            parts += section(record[name])
    return parts


def starts(rows: list[dict]) -> list[str]:
    """A2 beside Lloyd's algorithm from each start: excess and time."""
    found = {(row["data"], row["k"], row["start"]): row for row in rows}
    cells = dict.fromkeys((data, k) for data, k, _ in found)
    others = [name for name in dict.fromkeys(row["start"] for row in rows) if name not in ("A2", "density")]

    def ratio(cell: tuple[str, int], start: str, what: str) -> float:
        mine, other = found[*cell, "A2"][what], found[*cell, start][what]
        return other / mine if mine > 0 else 1.0 if other <= 0 else float("inf")

    lines = [
        [
            f"{data}, k = {k}",
            *(f"{found[data, k, start]['excess_percent']:.2f} %" for start in (*others, "A2")),
            *(times(ratio((data, k), start, "seconds")) for start in others),
        ]
        for data, k in cells
    ]
    shown = [NAMES[start] for start in others]
    parts = [
        "**Starts.** The same Lloyd's algorithm to the same end, on histograms, from each start, and density k-means "
        "(A2): squared error above the optimum's, then the time of each start over A2's, seeding included.",
        table(["weights", *shown, "A2", *(f"time: {name}" for name in shown)], lines),
    ]
    for start in others:
        took, excess = (
            {f"{data}, k = {k}": ratio((data, k), start, what) for data, k in cells}
            for what in ("seconds", "excess_percent")
        )
        said = speed(f"The {NAMES[start]}", took, "A2")
        parts.append(f"{said} A2 ends further from the optimum {where(excess)}.")
    worst, data, k = max((found[*cell, "A2"]["excess_percent"], *cell) for cell in cells)
    parts.append(f"A2 is furthest from the optimum, by {worst:.2f} %, on {data}, k = {k}.")
    return parts


def birch(parts: dict[str, list[dict]]) -> list[str]:
    """The scan beside scikit-learn's, then the number of codewords it finds beside the least."""
    said = []
    if parts.get("scan"):
        found = {(row["n"], row["db"], row["scan"]): row for row in parts["scan"]}
        cells = list(dict.fromkeys((n, db) for n, db, _ in found))
        peers = [name for name in dict.fromkeys(row["scan"] for row in parts["scan"]) if name not in ("raw", "bins")]

        def ratio(cell: tuple[int, float], peer: str, ours: str) -> float:
            """0 where the peer was not run."""
            row = found.get((*cell, peer))
            return row["seconds"] / found[*cell, ours]["seconds"] if row else 0.0

        lines = []
        for n, db in cells:
            mine = [found[n, db, ours] for ours in ("raw", "bins")]
            line = [f"{n:,}, {db:.0f} dB", *(f"{milliseconds(it['seconds'])}, {it['clusters']}" for it in mine)]
            for peer in peers:
                row = found.get((n, db, peer))
                line.append(f"{times(ratio((n, db), peer, 'raw'))}, {row['clusters']}" if row else "")
            lines.append(line)
        said += [
            "**BIRCH (A3), its scan**: time and clusters found at one threshold, on the values themselves (which is "
            "what scikit-learn does) and on a histogram; peers as their time over ours on the values.",
            table(["Gaussian weights, target", "ours", "ours, histogram", *peers], lines),
        ]
        for ours, name in (("raw", "ours"), ("bins", "ours on a histogram")):
            told = {}
            for peer in peers:
                told |= {f"{peer}, {n:,}, {db:.0f} dB": it for n, db in cells if (it := ratio((n, db), peer, ours))}
            if told:
                said.append(speed("scikit-learn", told, name))
        slower = {f"{n:,}, {db:.0f} dB": ratio((n, db), "raw", "bins") for n, db in cells}
        said.append(f"The scan of a histogram, making it included, is slower than that of the values {where(slower)}.")
    if parts.get("k"):
        said += codewords_found(parts["k"])
    return said


def codewords_found(rows: list[dict]) -> list[str]:
    found = {(row["data"], row["db"], row["method"]): row for row in rows}
    targets = sorted({row["db"] for row in rows})
    cells = list(dict.fromkeys((data, db) for data, db, _ in found))
    lines = [
        [data, *(f"{found[data, db, 'birch']['k']}, {found[data, db, 'exact']['k']}" for db in targets)]
        for data in dict.fromkeys(data for data, _ in cells)
    ]
    more = {f"{data}, {db:.0f} dB": found[data, db, "birch"]["k"] - found[data, db, "exact"]["k"] for data, db in cells}
    over = sorted(((extra, name) for name, extra in more.items() if extra > 0), reverse=True)
    took = [found[*cell, "exact"]["seconds"] / found[*cell, "birch"]["seconds"] for cell in cells]
    told = f": {listed([f'{name} (+{extra})' for extra, name in over])}" if over else ""
    return [
        "**BIRCH, the number of codewords** for a target of SQNR, and the least that reaches it (exact k-means, k read "
        "off its own curve):",
        table(["weights", *(f"{db:.0f} dB" for db in targets)], lines),
        f"BIRCH needs more codewords than exact k-means in {len(over)} of {len(more)} cells{told}; fewer in "
        f"{sum(extra < 0 for extra in more.values())}. Finding k exactly takes {times(min(took))} to "
        f"{times(max(took))} BIRCH's time, median {times(statistics.median(took))}.",
    ]


def row_scales(rows: list[dict]) -> list[str]:
    ratios = {(row["data"], row["k"]): row["plain_error_between"] / row["error"] for row in rows}
    ks = sorted({row["k"] for row in rows})
    lines = [[data, *(times(ratios.get((data, k))) for k in ks)] for data in dict.fromkeys(data for data, _ in ratios)]
    return [
        "**Row scales (A4), the error**: that of plain exact k-means at the same bytes, everything counted, over ours.",
        table(["weights", *(f"k = {k}" for k in ks)], lines),
        f"Row scales have the larger error {where({f'{data}, k = {k}': it for (data, k), it in ratios.items()})}.",
    ]


def linear_layers(rows: list[dict]) -> list[str]:
    """Points of top-1 that row scales gain over plain clustering at the same bytes, on each net's linear layers."""
    found = {(row["net"], row["k"], row["method"]): row for row in rows}
    cells = list(dict.fromkeys((net, k) for net, k, _ in found))
    # To an image: what lies between neighbours is interpolated.
    gain = {cell: round(found[*cell, "A4"]["top1"] - found[*cell, "A0 between"]["top1"], 2) + 0.0 for cell in cells}
    error = {cell: found[*cell, "A0 between"]["error"] / found[*cell, "A4"]["error"] for cell in cells}
    dense = {row["net"]: row["dense_top1"] for row in rows}
    ks = sorted({k for _, k in cells})
    lines = [
        [
            f"{net}, {top1:.2f} %",
            *(f"{gain[net, k]:+.2f}, {times(error[net, k])}" if (net, k) in gain else "" for k in ks),
        ]
        for net, top1 in dense.items()
    ]
    behind = sorted((it, f"{net}, k = {k} ({it:+.2f})") for (net, k), it in gain.items() if it < 0)
    told = f": {listed([label for _, label in behind])}" if behind else ""
    larger = where({f"{net}, k = {k}": it for (net, k), it in error.items()})
    return [
        "**Row scales (A4), linear layers of nets**, the rest kept, no retraining: points of top-1 over plain exact "
        "k-means at the same bytes (between its neighbours in bytes), and its squared error over ours.",
        table(["net, uncompressed top-1", *(f"k = {k}" for k in ks)], lines),
        f"Top-1 is below plain clustering's in {len(behind)} of {len(gain)} cells{told}. The error is larger {larger}.",
    ]


def accuracy(rows: list[dict]) -> list[str]:
    found = {(row["method"], row["k"]): row["top1"] for row in rows}
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    methods = [method for method in NAMES if any((method, k) in found for k in ks)]
    lines = [
        [NAMES[method], *(f"{found[method, k]:.2f}" if (method, k) in found else "" for k in ks)] for method in methods
    ]
    parts = [
        "**Accuracy at equal k**: LeNet-5, every layer to k codewords, MNIST test set, top-1 without retraining, "
        f"{found['uncompressed', None]:.2f} uncompressed.",
        table(["method", *(f"k = {k}" for k in ks)], lines),
    ]
    for method in ("A2", "exact", "row-scaled"):
        behind = []
        for k in ks:
            rivals = {start: found[start, k] for start in ("linear", "random", "kmeans++") if (start, k) in found}
            ahead = [NAMES[start] for start, top1 in rivals.items() if top1 > found[method, k]]
            if ahead:
                least = found[method, k] - max(rivals.values())
                behind.append(f"at k = {k} ({', '.join(ahead)}; {least:+.2f} at worst)")
        told = "; ".join(behind) or f"at none of {len(ks)} k"
        parts.append(f"Plain Lloyd's algorithm is ahead of {NAMES[method]} {told}.")
    return parts
