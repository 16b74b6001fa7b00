"""A front as a table and a picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from codeword.atomic import make_folder, replacing
from codeword.front import OURS, Front, Margin, Measure, Row, margins, unbeaten, worth
from codeword.peers import PEERS
from codeword.report.draw import BEFORE, CODEWORD, FAINT, INK
from codeword.report.words import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKDOWN, PICTURE = "front.md", "front.png"
_BELOW = 10.0  # points under the uncompressed net that a picture shows
_COLOURS = ("#8593a3", "#5b7083", "#b7791f", "#2f855a", "#805ad5", "#0987a0", "#b83280")
_MARKERS = "svPD^XP*"
COUNTED = (
    "Ours are .cw files as they lie on the disk. Peers are counted kindly: no header and no names; tables, scales, "
    "norms and biases in float16; codes bit-packed, or under xz -9e."
)


def label(method: str) -> str:
    """How a method is called where people read."""
    return "Codeword" if method == OURS else PEERS[method].label if method in PEERS else method


def write_front(folder: str | os.PathLike[str], front: Front, *, picture: bool = True) -> dict[str, Path]:
    """Write front.md, and front.png if picture, into `folder`; returns {"md": path, ...}. Raises WriteError."""
    contents = {MARKDOWN: front_markdown(front, picture=PICTURE if picture else None).encode()}
    if picture:
        contents[PICTURE] = draw_front(front)
    target = make_folder(folder)
    for name, content in contents.items():
        with replacing(target / name) as out:
            out.write(content)
    return {name.rpartition(".")[2]: target / name for name in contents}


# The table


def ours_table(front: Front, found: Sequence[Margin], by: Measure = "top1") -> tuple[list[str], list[list[str]]]:
    """(columns, rows): each of our files, and the best of all peers within its bytes."""
    scores = ["top-1 %", "drop"] if by == "top1" else ["agrees %"]
    columns = ["target", "bytes", "ratio", *scores, "best peer in these bytes", "ahead", "rounding + xz"]
    rows = []
    for margin in found:
        row, best = margin.row, margin.within
        own = [f"{row.top1:.2f}", f"{front.dense_top1 - row.top1:+.2f}"] if by == "top1" else [f"{row.agreement:.2f}"]
        beside = ["", ""] if best is None else [f"{worth(best.row, by):.2f} ({named(best.row)})", f"{best.ahead:+.2f}"]
        saved = "" if margin.saved is None else f"{-margin.saved:+.0%}"
        rows.append([row.settings, f"{row.nbytes:,}", f"{front.ratio(row):.2f}x", *own, *beside, saved])
    return columns, rows


def larger_table(front: Front, found: Sequence[Margin]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): how far ours are ahead of each peer's next larger file, and how much larger that is."""
    names = [name for name in front.peers if any(name in margin.larger for margin in found)]
    rows = []
    for margin in found:
        cells = [margin.larger.get(name) for name in names]
        texts = ["" if c is None else f"{c.ahead:+.2f} ({c.row.nbytes / margin.row.nbytes:.2f}x)" for c in cells]
        rows.append([margin.row.settings, *texts])
    return ["target", *map(label, names)], rows


def named(row: Row) -> str:
    """A row in words."""
    return ", ".join(part for part in (label(row.method), row.settings, row.packing) if part)


def front_markdown(front: Front, *, picture: str | None = None) -> str:
    """The page."""
    found, agreeing = margins(front), margins(front, "agreement")
    calibration = "no data" if front.calibration is None else f"{front.calibration} without their labels"
    parts = [
        f"# {front.net}: bytes against accuracy",
        f"{front.n:,} images of {front.data}; uncompressed {front.dense_nbytes:,} bytes in float32, top-1 "
        f"{front.dense_top1:.2f} %. Nothing was retrained; ours were made with {calibration}.",
        *([] if picture is None else [f"![bytes against accuracy]({picture})"]),
        "## Ours\n\n" + _table(*ours_table(front, found)),
        "Ahead: points of top-1 above the best peer that takes no more bytes. Rounding + xz: bytes beside what "
        "rounding a channel under xz takes for the same top-1, on lines between its settings.",
    ]
    if front.peers:
        parts += [
            "## Beside the next larger file of each peer\n\n" + _table(*larger_table(front, found)),
            "Points of top-1 that ours are ahead of it, and how many times larger it is, up to twice. Of a peer's "
            "files those count that none of its smaller ones beats.",
        ]
    parts += [
        "## By agreement with the uncompressed net\n\n" + _table(*ours_table(front, agreeing, "agreement")),
        "The share of images whose top-1 class is the uncompressed net's, and all columns by it. Near the "
        "uncompressed net top-1 is mostly luck: of the images that change sides some turn right.",
        *([_table(*larger_table(front, agreeing))] if front.peers else []),
    ]
    rows = sorted(front.rows, key=lambda row: row.nbytes)
    cells = [
        [
            *(label(r.method), r.settings, r.packing, f"{r.nbytes:,}"),
            *(f"{front.ratio(r):.2f}x", f"{r.top1:.2f}", f"{r.agreement:.2f}"),
        ]
        for r in rows
    ]
    columns = ["method", "settings", "packing", "bytes", "ratio", "top-1 %", "agrees %"]
    parts.append("## All files\n\n" + _table(columns, cells, 3))
    parts += [f"- {name}: {why}" for name, why in front.missing.items()]
    return "\n\n".join([*parts, COUNTED]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    marks = ["---" if at < left else "---:" for at in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


# The picture


def draw_front(front: Front) -> bytes:
    """The picture as PNG. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": FAINT}):
        figure = Figure(figsize=(10.5, 6.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw(axes, front)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "codeword"})
    return out.getvalue()


def _draw(axes: Axes, front: Front) -> None:
    bottom = max(front.dense_top1 - _BELOW, 0.0)
    top = max([front.dense_top1, *(row.top1 for row in front.rows)]) + 0.06 * _BELOW
    seen = [front.ratio(row) for row in front.ours if row.top1 >= bottom] or [4.0, 10.0]
    left, right = min(seen) / 1.35, max(seen) * 1.45
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.axhline(front.dense_top1, color=INK, lw=0.9, ls=":")
    labels = []
    for at, name in enumerate(front.peers):
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        x, y = [front.ratio(row) for row in front.of(name)], [row.top1 for row in front.of(name)]
        axes.scatter(x, y, s=16, alpha=0.3, lw=0, color=colour, marker=marker)
        best = unbeaten(front.of(name))
        x, y = [front.ratio(row) for row in best], [row.top1 for row in best]
        axes.plot(x, y, lw=1, ms=4.5, color=colour, marker=marker)
        labels += _last(front, best, name, bottom, left)
    axes.plot([front.ratio(r) for r in front.ours], [r.top1 for r in front.ours], "o-", color=CODEWORD, lw=2.4, ms=7)
    labels += _last(front, front.ours, OURS, bottom, left)
    _write(axes, labels, dict(zip(front.peers, _COLOURS * len(front.peers), strict=False)) | {OURS: CODEWORD})
    calibrated = "" if front.calibration is None else f", ours calibrated on {front.calibration}"
    axes.set_title(
        f"{front.net}: {front.n:,} images of {front.data}, no retraining{calibrated}", loc="left", fontsize=11, pad=12
    )
    axes.annotate(
        f"uncompressed, {front.dense_top1:.2f} %", (0.995, front.dense_top1), (0, 3), size=9, ha="right", va="bottom",
        xycoords=axes.get_yaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80, 100, 150) if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick}x\n{human_bytes(round(front.dense_nbytes / tick))}" for tick in ticks], size=9)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("times smaller than float32 (log), and bytes")
    axes.set_ylabel("top-1, percent")
    axes.grid(color=BEFORE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


class _Label(NamedTuple):
    method: str
    ratio: float
    top1: float


def _last(front: Front, rows: Sequence[Row], method: str, bottom: float, left: float) -> list[_Label]:
    """Where the name of a line stands: at the smallest of its files that the picture shows, if it shows one."""
    shown = [row for row in rows if row.top1 >= bottom and front.ratio(row) >= left]
    return [_Label(method, front.ratio(shown[0]), shown[0].top1)] if shown else []


def _write(axes: Axes, labels: Sequence[_Label], colours: dict[str, str]) -> None:
    """A name beside the end of each line, moved down where it would cover another."""
    from matplotlib.patheffects import withStroke

    taken: list[_Label] = []
    low, high = axes.get_ylim()
    for name in sorted(labels, key=lambda name: -name.top1):
        at = name.top1 - (high - low) / 60
        while any(abs(at - other.top1) < (high - low) / 26 and 0.5 < name.ratio / other.ratio < 2 for other in taken):
            at -= (high - low) / 100
        taken.append(name._replace(top1=at))
        ours = name.method == OURS
        axes.annotate(
            label(name.method), (name.ratio, at), (8, 0), textcoords="offset points", va="center", zorder=6,
            size=13 if ours else 9.5, fontweight="bold" if ours else "normal", color=colours[name.method],
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
