"""docs/training_results.md from recipes/*.json and benchmarks/*.json; docs/generate_results.py writes and checks it."""

from __future__ import annotations

import json
from pathlib import Path

import section_claims
import section_pruning
import section_steps

# In the order of the page: where it lies, from the root; a section says itself what has not been measured yet.
SECTIONS = {
    "recipes/claims.json": (section_claims.claims, {"notes": [], "dense": {}, "rows": []}),
    "recipes/prune_sweep.json": (section_pruning.pruning, {}),
    "benchmarks/training_step.json": (section_steps.steps, {"rows": []}),
}


def read(root: Path, name: str) -> dict:
    file = root / name
    return json.loads(file.read_text()) if file.exists() else SECTIONS[name][1]


def readme_rows(root: Path) -> list[str]:
    return list(section_claims.readme_rows(read(root, "recipes/claims.json")))


def page(root: Path) -> str:
    parts = [
        "# Training, measured",
        "<!-- Made by docs/generate_results.py from recipes/*.json and benchmarks/training_step.json. Edit those or "
        "the scripts, not this page. -->",
        "What pruning and training of compressed nets reach ([how to](training.md)), beside what papers claim and what "
        "was wanted here. What fell short of a target says by how much; what has not been run says so.",
    ]
    for name, (section, _) in SECTIONS.items():
        parts += section(read(root, name))
    return "\n\n".join(parts) + "\n"
