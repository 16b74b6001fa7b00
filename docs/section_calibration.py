"""Section of docs/results.md on what unlabelled images are worth."""

from __future__ import annotations

from wording import head, listed

from main_job import table

COMMAND = "CODEWORD_DATA=DATA python benchmarks/calibration.py --weights FOLDER"


def calibration(record: dict) -> list[str]:
    parts = head("With a thousand images and no labels", COMMAND, "calibration")
    parts += [
        "`--data`: 1,024 training images, evenly spaced, labels unused. Errors of weights then cancel at the outputs "
        "of their layers, each layer compressed for the inputs that the compressed ones before it make. Nothing is "
        "retrained. Beside it the same target without data. Vectors: bytes of the file with data that norms, biases "
        "and counters take." + (f" {record['note']}" if "note" in record else "")
    ]
    worse = []
    for name, net in record["dense"].items():
        rows = {(it["target"], it["images"]): it for it in record["rows"] if it["net"] == name}
        lines = []
        for target in dict.fromkeys(target for target, _ in rows):
            without = rows.get((target, 0))
            seen = next((it for (one, images), it in rows.items() if one == target and images), None)
            if without and seen:
                drops = [f"{net['top1'] - it['top1']:+.2f}" for it in (without, seen)]
                worse += [f"{name} at {target}"] if seen["top1"] < without["top1"] else []
                lines.append(
                    [
                        target,
                        f"{without['bytes']:,}",
                        drops[0],
                        f"{seen['bytes']:,}",
                        drops[1],
                        f"{seen['vectors_nbytes']:,}",
                        f"{seen['seconds']:.0f} s",
                    ]
                )
        if lines:
            parts.append(f"**{name}**, {net['data']}, top-1 {net['top1']:.2f} % uncompressed:")
            parts.append(table(["target", "bytes", "drop", "bytes with data", "drop", "vectors", "took"], lines))
    return [*parts, f"More is lost with data than without by {listed(worse)}."] if worse else parts
