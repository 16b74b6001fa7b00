"""Sections of docs/results.md on the planner: what a drop comes to, how plans are ordered, what a dry run predicts."""

from __future__ import annotations

from collections.abc import Sequence

from wording import head, listed

from main_job import table

DATA = "CODEWORD_DATA=DATA "
WEIGHED = {"equal": "all alike", "weights": "weights alone", "data": "256 images"}


def ordering(record: dict) -> list[str]:
    sets = {name: facts["summary"] for name, facts in record.items() if "summary" in facts}
    if not sets:
        return []
    parts = head(
        "Whether predicted loss orders plans", f"{DATA}python benchmarks/ordering.py --weights FOLDER", "ordering"
    )
    rows = [
        [
            name,
            str(facts["plans"]),
            f"{facts['drops'][0]:.1f} to {facts['drops'][1]:.1f}",
            *(
                f"{facts['spearman with drop'][way]:.3f} ({facts['spearman with divergence'][way]:.3f})"
                for way in WEIGHED
            ),
        ]
        for name, facts in sets.items()
    ]
    return [
        *parts,
        "Random plans are ranked by what the planner minimises, the sum of relative errors times "
        "[sensitivity](planner.md#what-it-minimises), and by what they lose on 3,000 training images: Spearman's rank "
        "correlation with the drop in top-1, in brackets with the divergence of outputs. Plans of a mixed set differ "
        "in level too, those of a level set only in where their errors are.",
        table(["plans", "number", "points lost", *WEIGHED.values()], rows),
    ]


def prediction(record: Sequence[dict]) -> list[str]:
    if not record:
        return []
    parts = head("How well a dry run predicts", "python benchmarks/prediction.py --weights FOLDER", "prediction")
    rows, ratios = [], {kind: [row["predicted_over_measured"][kind] for row in record] for kind in KINDS}
    for row in record:
        ahead, came, ratio = row["predicted"], row["measured"], row["predicted_over_measured"]
        rows.append(
            [
                f"{row['net']} {row['target']}{', with data' if row['data'] else ''}",
                f"{came['nbytes']:,}",
                off(ratio["nbytes"]),
                off(ratio["error"]),
                f"{came['cpu_seconds']:.2f} s",
                off(ratio["cpu_seconds"], 0),
                f"{came['peak_nbytes'] / 1e6:.0f} MB",
                off(ratio["peak_nbytes"], 0),
                f"{ahead['planning_seconds']:.1f} s",
            ]
        )
    said = [f"{name} are {off(min(ratios[kind]))} to {off(max(ratios[kind]))} off" for kind, name in KINDS.items()]
    return [
        *parts,
        "`codeword plan`, and its plan really run: what came, and how far from it the prediction was. Seconds are the "
        "processor's, of one core; planning itself took what the last column says, by the clock. "
        f"{said[0]}, {', '.join(said[1:])}.",
        table(["net, target", "bytes", "off", "error off", "takes", "off", "memory", "off", "planning"], rows),
    ]


def off(ratio: float, digits: int = 1) -> str:
    """'-1.4 %': what was predicted, beside what came."""
    return f"{100 * (ratio - 1):+.{digits}f} %"


KINDS = {"nbytes": "Bytes", "error": "errors", "cpu_seconds": "seconds", "peak_nbytes": "bytes of memory"}


def drops(record: dict) -> list[str]:
    rows = record["rows"]
    if not rows:
        return []
    parts = head("What `--max-drop` finds", f"{DATA}python benchmarks/max_drop.py --weights FOLDER", "max_drop")
    lines, over = [], []
    for row in rows:
        found = row["measured"]
        span = "" if found["low"] is None else f" ({found['low']:+.2f} to {found['high']:+.2f})"
        checks = sum(trial["check"] for trial in found["trials"])
        lines.append(
            [
                row["net"],
                f"{found['most']:g}",
                f"{row['bytes']:,}",
                f"{row['ratio']:.2f}x",
                f"{found['drop']:+.2f}{span}",
                f"{row['drop']:+.2f}",
                f"{len(found['trials']) - checks} + {checks}",
                f"{row['seconds']:.0f} s",
            ]
        )
        over += [f"{row['net']} ({row['drop']:+.2f} for {found['most']:g})"] if row["drop"] > found["most"] else []
    said = f"More than was asked for is lost on the test set by {listed(over)}. " if over else ""
    return [
        *parts,
        "The smallest file within so many points on the training images, calibrated on 1,024 of them and measured on "
        "the others; 95 % confidence in brackets. The test set is scored once, at the end. Nets scored: while "
        f"searching, on 5,000 images, and then on all. {said}Training images may lose more or less than others.",
        table(["net", "points", "bytes", "ratio", "drop measured", "on the test set", "nets scored", "took"], lines),
    ]


def agreement(record: dict) -> list[str]:
    rows = record["rows"]
    if not rows:
        return []
    parts = head("EfficientNet-Lite0", f"{DATA}python benchmarks/efficientnet.py", "efficientnet")
    images = record["images"]
    kinds = [
        f"{name} (n = {facts['n']:,}, {facts['classes']} classes, the net's highest probability "
        f"{facts['mean top probability']:.2f} on average)"
        for name, facts in images.items()
    ]
    lines = [
        [
            row["target"],
            "yes" if row["calibrated"] else "no",
            f"{row['bytes']:,}",
            f"{row['ratio']:.2f}x",
            *(f"{row['agreement'][name]:.1f}" for name in images),
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    return [
        *parts,
        "Trained on ImageNet, which is not at hand: what is counted is how often top-1 is that of the uncompressed net "
        f"({record['dense_nbytes']:,} bytes), in percent, on {listed(kinds)}. With data: {record['calibration']}, "
        "without labels. The photographs that are counted are crops of 20 of ImageNet that foolbox brings along; those "
        "of calibration are others.",
        table(["target", "data", "bytes", "ratio", *images, "took"], lines),
    ]


def time(record: Sequence[dict]) -> list[str]:
    if not record:
        return []
    parts = head(
        "How long a target takes",
        f"{DATA}python benchmarks/planner_time.py --weights FOLDER --lite0 CHECKPOINT",
        "planner_time",
    )
    rows = [
        [row["net"], *(clocks(row.get(kind)) for kind in RUNS), f"{row['cache_nbytes'] / 1e6:.1f} MB"] for row in record
    ]
    return [
        *parts,
        "Plan, file and writing it, one thread, each in a process of its own, without importing: seconds of the clock, "
        "in brackets of the processor; where they are far apart, others used the machine. First with an empty cache, "
        "then another target with what the first left, then the first target again.",
        table(["net", *RUNS.values(), "cache holds"], rows),
    ]


RUNS = {"no_cache": "no cache", "first": "first target", "second": "second target", "again": "first again"}


def clocks(run: dict | None) -> str:
    return "" if run is None else f"{run['seconds']:.1f} s ({run['processor_seconds']:.1f})"
