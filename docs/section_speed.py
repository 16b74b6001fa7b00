"""Sections of docs/clustering.md on speed: one codebook a tensor, a codebook a row or group, growth with size."""

from __future__ import annotations

import re
import statistics
from itertools import groupby

from wording import counted, errors, head, milliseconds, percent, speed, times

from main_job import table

KS = (4, 16, 64, 256)  # that tables show; sentences are on all


def scalar(record: dict) -> list[str]:
    parts = head(
        "One codebook for a tensor: exact k-means",
        "python benchmarks/scalar.py --weights FOLDER --efficientnet FILE",
        "scalar",
        record,
    )
    parts.append(
        "From float32 Gaussian weights to codes and exact means. Ratios are a peer's time over ours; a cell is empty "
        "where the peer would have taken too long or was not installed. coremltools is its palettizer as a user calls "
        "it, kmeans1d is exact, scikit-learn is Lloyd from one k-means++ start."
    )
    if rows := record.get("speed"):
        parts += speeds(rows)
    if half := record.get("float16"):
        ours, total = (statistics.median(half["milliseconds"][name]) / 1e3 for name in ("ours", "np.sum of float32"))
        parts.append(
            f"**float16.** {half['n']:,} weights to {half['k']} codewords take {milliseconds(ours)}, `np.sum` over as "
            f"many float32 {milliseconds(total)}: clustering costs {times(ours / total)} one sum."
        )
    if found := record.get("excess percent"):
        parts += excess(found)
    return parts


def speeds(rows: list[dict]) -> list[str]:
    seconds = {
        (row["n"], row["k"]): {name: statistics.median(took) / 1e3 for name, took in row["milliseconds"].items()}
        for row in rows
    }
    peers = list(dict.fromkeys(name for took in seconds.values() for name in took if name != "ours"))
    ratios = {
        peer: {cell: took[peer] / took["ours"] for cell, took in seconds.items() if peer in took} for peer in peers
    }
    lines = [
        [f"{n:,}, k = {k}", milliseconds(took["ours"]), *(times(ratios[peer].get((n, k))) for peer in peers)]
        for (n, k), took in seconds.items()
        if k in KS
    ]
    parts = [table(["weights", "ours", *peers], lines)]
    for peer in peers:
        worse = {f"{row['n']:,}, k = {row['k']}": row["sse over ours"].get(peer) for row in rows}
        said = speed(peer, {f"{n:,}, k = {k}": ratio for (n, k), ratio in ratios[peer].items()})
        parts.append(f"{said} {errors(peer, {cell: it for cell, it in worse.items() if it is not None})}")
    return parts


def excess(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        [
            re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", name),
            *(f"{each[str(k)] + 0.0:.4f}".replace("-0.0000", "0.0000") if str(k) in each else "" for k in KS),
        ]
        for name, each in found.items()
    ]
    most, name, k = max((it, name, k) for name, each in found.items() for k, it in each.items())
    least = min(it for each in found.values() for it in each.values())
    said = f"At worst {percent(most / 100)} above the optimum ({name}, k = {k})"
    if least < 0:
        said += (
            f". Below zero, by {percent(-least / 100)} at most, where values outnumber bins: the reference keeps a "
            "bin's values together, our thresholds may part them"
        )
    return [
        "**Squared error over the optimum's**, in percent (the optimum: dynamic programming over all bins):",
        table(["weights", *(f"k = {k}" for k in KS)], lines),
        f"{said}.",
    ]


def groups(record: dict) -> list[str]:
    cases = record["cases"]
    peers = [name for name in dict.fromkeys(n for row in cases for n in row["seconds"]) if not name.startswith("ours")]
    parts = head("A codebook for each row or group of rows", "python benchmarks/groups.py", "groups", record)
    parts.append(
        "A linear layer of Gaussian weights. Ours is the kernel; the method is `KMeans(k, group_size=...)`, to an "
        "expression. kmeans1d and scikit-learn loop over groups: they were timed on a few and scaled up."
    )

    def label(row: dict) -> str:
        shape = f"{row['rows']} x {row['columns']}, {counted(row['group_size'], 'row')} a group"
        return f"{shape}, k = {row['k']}" + (", deviation 1" if row["standard deviation"] == 1 else "")

    def ratio(row: dict, peer: str) -> float | None:
        took = row["seconds"]
        return took[peer] / took["ours"] if peer in took else None

    most = max(row["rows"] for row in cases)
    lines = [
        [
            label(row),
            milliseconds(row["seconds"]["ours"]),
            times(ratio(row, "ours, method")),
            *(times(ratio(row, peer)) for peer in peers),
        ]
        for row in cases
        if row["rows"] == most or row["k"] == 16
    ]
    parts.append(table(["weights", "ours", "our method", *peers], lines))
    for peer in peers:
        cells = {label(row): found for row in cases if (found := ratio(row, peer)) is not None}
        worse = {label(row): row["sse over ours"][peer] for row in cases if peer in row["sse over ours"]}
        said = [speed(peer, cells), errors(peer, worse)]
        if peer.startswith("coremltools"):  # a whole tool: like beside like
            whole = {label(row): took[peer] / took["ours, method"] for row in cases if peer in (took := row["seconds"])}
            said.insert(1, speed("It", whole, "our method"))
        parts.append(" ".join(said))
    return parts


def growth(record: dict) -> list[str]:
    rows = record["rows"]
    parts = head("Growth: time and memory", "python benchmarks/growth.py", "growth", record)
    parts.append(
        f"{record['what'][0].upper()}{record['what'][1:]}. Memory is the peak of the process beyond the weights and "
        "the codes, a byte each; `np.sum` is over as many float32."
    )
    parts.append(
        table(
            ["weights", "time", "a weight", "over np.sum", "memory beyond"],
            [
                [
                    f"{row['n']:,} {row['dtype']}",
                    milliseconds(row["seconds"]),
                    f"{1e9 * row['seconds'] / row['n']:.1f} ns",
                    times(row["seconds"] / row["sum_seconds"] if row["sum_seconds"] else None),
                    f"{row['extra_nbytes'] / 1e6:.1f} MB",
                ]
                for row in rows
            ],
        )
    )
    for dtype, some in groupby(sorted(rows, key=lambda row: (row["dtype"], row["n"])), lambda row: row["dtype"]):
        some = list(some)
        first, last = some[0], some[-1]
        high = max(some, key=lambda row: row["extra_nbytes"])
        parts.append(
            f"{dtype}: {last['n'] / first['n']:,.0f} times as many weights, from {first['n']:,} to {last['n']:,}, take "
            f"{last['seconds'] / first['seconds']:,.1f} times as long, and memory beyond them stays under "
            f"{high['extra_nbytes'] / 1e6:.1f} MB (most at {high['n']:,})."
        )
    return parts
