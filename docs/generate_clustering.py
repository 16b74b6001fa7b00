"""docs/clustering.md from benchmarks/*.json, section by section; docs/generate_results.py writes and checks it."""

from __future__ import annotations

import json
from pathlib import Path

import section_accuracy
import section_scalar
import section_speed
import section_vectors

# In the order of the page; a section whose JSON is not there is left out.
SECTIONS = {
    "scalar": section_speed.scalar,
    "groups": section_speed.groups,
    "clustering": section_scalar.clustering,
    "vectors": section_vectors.vectors,
    "shared": section_vectors.shared,
    "growth": section_speed.growth,
    "accuracy": section_accuracy.accuracy,
}


def page(benchmarks: Path) -> str:
    parts = [
        "# Clustering, measured",
        "<!-- Made by docs/generate_results.py from benchmarks/*.json. Edit those or the scripts, not this page. -->",
        "What the methods of [methods.md](methods.md) cost and find, beside what else there is. Unless a line says "
        "otherwise a ratio is the other's over ours, of times (above 1 ours is faster) or of squared errors (above 1 "
        "ours is closer). Contenders ran in one process, taking turns, and medians are compared. A load average "
        "above the number of cores means that other work ran beside: read ratios then, not milliseconds. Every "
        "sentence on where ours is behind counts all cells of the JSON, also those that the table leaves out.",
    ]
    for name, section in SECTIONS.items():
        file = benchmarks / f"{name}.json"
        if file.exists():
            parts += section(json.loads(file.read_text()))
    return "\n\n".join(parts) + "\n"
