"""Draw docs/file.png, the bytes of the demo's model.cw to scale: python docs/draw_file.py (or make docs)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

import codeword
from codeword import zoo
from codeword.artifact.layout import PREFIX_NBYTES

OUT = Path(__file__).with_name("file.png")
INK, PAPER = "#1f2933", "#d5dbe5"
COLOURS = {"weight": "#2b6cb0", "bias": "#90b4dc", "header": "#c53f0b"}


def main() -> None:
    with codeword.compress(zoo.lenet5_path(), "30x") as artifact:
        header = artifact.nbytes - sum(entry.nbytes for entry in artifact.entries.values())
        parts = [("header", header)] + [(name, entry.nbytes) for name, entry in artifact.entries.items()]
        total = artifact.nbytes
        largest = max(artifact.entries.values(), key=lambda entry: entry.nbytes)
        leaves = [(leaf.path.rpartition(".")[2], leaf.codec.name.lower(), leaf.nbytes) for leaf in largest.leaves]
        ratio = artifact.ratio

    figure = Figure(figsize=(11, 3.9), dpi=110, facecolor="white")
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    axes.text(
        0, 0.95, f"model.cw: {total:,} bytes, {ratio:.1f}x smaller than float32", size=13, weight="bold", color=INK
    )

    at = 0.0
    for name, nbytes in parts:
        width = nbytes / total
        kind = "header" if name == "header" else name.rpartition(".")[2]
        axes.add_patch(Rectangle((at, 0.62), width, 0.17, color=COLOURS[kind], ec="white", lw=0.6))
        if width > 0.06:
            text = f"{name}\n{nbytes:,} bytes" if width > 0.08 else name
            colour = "white" if kind == "weight" else INK
            axes.text(at + width / 2, 0.705, text, ha="center", va="center", size=9, color=colour)
        if name == largest.name:
            start, end = at, at + width
        at += width
    axes.text(
        0,
        0.82,
        "the whole file, to scale: header, then tensor after tensor, no holes (numbers are bytes)",
        size=9,
        color=INK,
    )

    prefix = ["magic 8", "version 1", "length 4", "CRC 4"]
    fields = [
        *prefix,
        f"header, deflated {header - PREFIX_NBYTES}: names, dtypes, shapes, expressions, codecs, lengths",
    ]
    widths = [0.06, 0.06, 0.06, 0.06, 0.32]
    _strip(axes, 0.0, 0.14, fields, widths, COLOURS["header"])
    _zoom(figure, axes, (0.0, header / total), (0.0, sum(widths)), 0.62, 0.31)

    fields = [f"{path}: {codec}\n{nbytes:,}" for path, codec, nbytes in leaves] + ["CRC\n4"]
    width = 0.36 / len(fields)
    _strip(axes, 0.62, 0.14, fields, [width] * len(fields), COLOURS["weight"])
    _zoom(figure, axes, (start, end), (0.62, 0.98), 0.62, 0.31)
    axes.text(
        0, 0.06, "any tensor can be read and checked alone; one flipped bit anywhere is detected", size=9, color=INK
    )
    figure.savefig(OUT, metadata={"Software": None})


def _strip(axes, x: float, y: float, fields: list[str], widths: list[float], colour: str) -> None:
    for field, width in zip(fields, widths, strict=True):
        axes.add_patch(Rectangle((x, y), width, 0.17, fc="white", ec=colour, lw=1.2))
        wrapped = field.replace(": ", ":\n", 1).replace(" expressions", "\nexpressions") if len(field) > 30 else field
        axes.text(x + width / 2, y + 0.085, wrapped.replace(" ", "\n") if width < 0.07 else wrapped, ha="center",
                  va="center", size=8, color=INK)  # fmt: skip
        x += width


def _zoom(figure, axes, top: tuple[float, float], bottom: tuple[float, float], y0: float, y1: float) -> None:
    for x0, x1 in zip(top, bottom, strict=True):
        line = ConnectionPatch((x0, y0), (x1, y1), "data", "data", axesA=axes, axesB=axes, color=PAPER, lw=1)
        figure.add_artist(line)


if __name__ == "__main__":
    main()
