"""Make results.md, clustering.md, training_results.md and README's table: python docs/generate_results.py [--check]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "results.md"
TRAINING = ROOT / "docs" / "training_results.md"
CLUSTERING = ROOT / "docs" / "clustering.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: made by docs/generate_results.py -->", "<!-- end of results -->"
README_TARGETS = ("8x", "10x", "12x", "30x", "40x", "50x")  # the page has all
README_CALIBRATED = ("15x", "18x", "60x")
NETS = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10", "resnet56": "ResNet-56, CIFAR-10"}

sys.path.insert(0, str(BENCHMARKS))
import generate_clustering  # noqa: E402
import generate_training  # noqa: E402
import section_calibration  # noqa: E402
import section_candidates  # noqa: E402
import section_fronts  # noqa: E402
import section_planner  # noqa: E402

from main_job import table, tables  # noqa: E402

# In the order of the page, after what has been there for longest; a section of what was not measured is left out.
SECTIONS = {
    "calibration": section_calibration.calibration,
    "efficientnet": section_planner.agreement,
    "max_drop": section_planner.drops,
    "ordering": section_planner.ordering,
    "prediction": section_planner.prediction,
    "planner_time": section_planner.time,
    "candidates": section_candidates.candidates,
}


def sections(benchmarks: Path) -> list[str]:
    """What each benchmark says for itself."""
    parts = section_fronts.fronts(benchmarks / "fronts")
    for name, section in SECTIONS.items():
        file = benchmarks / f"{name}.json"
        parts += section(json.loads(file.read_text())) if file.exists() else []
    return parts


def page(main_job: dict, peers: dict, compensation: list[dict], rest: list[str]) -> str:
    parts = [
        "# Results",
        "<!-- Made by docs/generate_results.py from benchmarks/*.json. Edit those or the script, not this page. -->",
        "Sizes are bytes of files on disk, everything counted. Accuracy is top-1 in percent on the full test set, "
        "beside the uncompressed net on the same images; a drop below zero is a gain. Nothing was retrained, and no "
        "data used but where it is said.",
        "## The main job",
        "`CODEWORD_DATA=DATA python benchmarks/main_job.py --weights FOLDER` (raw: `benchmarks/main_job.json`). "
        "Rounding + xz is what anyone can make in five lines: symmetric rounding a channel to b bits, codes under "
        "`xz -9e`, scales and norms in fp16. Ours was told that size as its target.",
        tables(main_job),
        "## Beside coremltools' palettizer",
        "`CODEWORD_DATA=DATA python benchmarks/peers.py --weights FOLDER` (raw: `benchmarks/peers.json`). The peer: "
        "k-means to 2**bits codewords, one table a tensor; its bytes are counted kindly, the shorter of bit-packed "
        "codes and of codes under `xz -9e`, tables and other tensors in fp16, no header.",
    ]
    for name, part in peers.items():
        rows = [
            [
                f"{row['bits']} bits",
                f"{row['bytes']:,}",
                f"{row['top1']:.2f}",
                f"{row['codeword_bytes']:,}",
                f"{row['codeword_top1']:.2f}",
            ]
            for row in part["rows"]
        ]
        parts.append(f"**{name}**, {part['data']} (n = {part['n']:,}):")
        parts.append(table(["palettized", "bytes", "top-1", "our bytes", "our top-1"], rows))
    rows = [
        [
            f"{row['net']} {row['ratio']}x",
            f"{row['bytes_without']:,}",
            f"{row['kl_without']:.4f}",
            f"{row['bytes_with']:,}",
            f"{row['kl_with']:.4f}",
            f"{row['kl_without'] / row['kl_with']:.1f} times",
        ]
        for row in compensation
    ]
    parts += [
        "## What cancelling errors is worth",
        "`CODEWORD_DATA=DATA python benchmarks/compensation.py --weights FOLDER` "
        "(raw: `benchmarks/compensation.json`). "
        "Divergence of the outputs from the uncompressed net's (Kullback-Leibler, nats an image) on 3,000 training "
        "images, by which the method's constants were chosen, with and without errors made to cancel within kernels "
        "and rows.",
        table(["net, target", "bytes without", "divergence", "bytes with", "divergence", "less by"], rows),
        *rest,
    ]
    return "\n\n".join(parts) + "\n"


def readme_table(main_job: dict, peers: dict, calibration: dict) -> str:
    lines = ["| net | file | smaller | top-1 | uncompressed |", "|---|---:|---:|---:|---:|"]
    for name, title in NETS.items():
        part = main_job[name]
        for row in part["codeword"]:
            if row["target"] in README_TARGETS:
                lines.append(
                    f"| {title} | {row['bytes'] / 1000:.1f} KB | {row['ratio']:.1f}x | {row['top1']:.2f} | "
                    f"{part['dense_top1']:.2f} |"
                )
        for row in calibration["rows"]:
            if row["net"] == name and row["images"] and row["target"] in README_CALIBRATED:
                lines.append(
                    f"| {title}, saw {row['images']:,} images | {row['bytes'] / 1000:.1f} KB | {row['ratio']:.1f}x | "
                    f"{row['top1']:.2f} | {calibration['dense'][name]['top1']:.2f} |"
                )
    lines += generate_training.readme_rows(ROOT)
    lines += [
        "",
        "The same bytes, spent three ways (ResNet-20, top-1 in percent, 91.73 uncompressed):",
        "",
        "| bytes | Codeword | other | which |",
        "|---:|---:|---:|---|",
    ]
    rows = [(row["bytes"], row["codeword_top1"], row["top1"], f"coremltools k-means, {row['bits']} bits, + xz")
            for row in peers["resnet20"]["rows"]]  # fmt: skip
    rows += [(row["bytes"], row["codeword_top1"], row["top1"], f"rounding a channel to {row['bits']} bits, + xz")
             for row in main_job["resnet20"]["baseline"]]  # fmt: skip
    lines += [f"| {nbytes:,} | {ours:.2f} | {other:.2f} | {which} |" for nbytes, ours, other, which in sorted(rows)]
    return "\n".join(lines)


def main() -> None:
    names = ("main_job", "peers", "compensation", "calibration")
    main_job, peers, compensation, calibration = (
        json.loads((BENCHMARKS / f"{name}.json").read_text()) for name in names
    )
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    made = {
        PAGE: page(main_job, peers, compensation, sections(BENCHMARKS)),
        TRAINING: generate_training.page(ROOT),
        CLUSTERING: generate_clustering.page(BENCHMARKS),
        README: f"{before}{BEGIN}\n{readme_table(main_job, peers, calibration)}\n{END}{after}",
    }
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"not up to date: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        path.write_text(made[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
