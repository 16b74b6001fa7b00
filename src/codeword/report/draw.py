"""A report as one picture: size by layer, and the weights of the largest coded layer with their codewords."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from codeword.artifact import Artifact
from codeword.expr import Affine, Expr, Lookup, Permute, Reshape
from codeword.report.measure import Report, TensorReport
from codeword.report.words import human_bytes
from codeword.sources import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS = 26  # bars that stay readable; smaller tensors share the last one
_BINS = 160
BEFORE, AFTER, CODEWORD, INK, FAINT = "#d5dce6", "#2b6cb0", "#c2410c", "#1f2933", "#8593a3"


class Codewords(NamedTuple):
    """The codebook of one tensor, in the units its weights are shared in."""

    values: np.ndarray  # (k,) float64
    shares: np.ndarray  # (k,) of the weights that have this value, 0..1
    row_scale: np.ndarray | None  # (rows,): what each row of the weights is divided by; None for 1


def draw(report: Report, artifact: Artifact, original: Source | None, *, title: str) -> bytes:
    """The picture as PNG. Without an original the second panel shows codewords only. Needs matplotlib."""
    # Never pyplot: it would pick a backend and keep figures in the process's global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(report, artifact)
    # The user's matplotlibrc must not change a report: the same file gives the same picture.
    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": FAINT}):
        figure = Figure(figsize=(13.5, max(4.8, 1.6 + 0.27 * len(rows))), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)  # type: ignore[union-attr]
        figure.suptitle(_literal(title), fontsize=14, fontweight="bold")
        sizes, weights = figure.subplots(1, 2, width_ratios=(1, 1))
        _draw_sizes(sizes, rows)
        _draw_weights(weights, report, artifact, original)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "codeword"})
    return out.getvalue()


class _Row(NamedTuple):
    label: str
    before: int
    after: int


def _rows(report: Report, artifact: Artifact) -> list[_Row]:
    """A bar for each tensor in the file's order; if there are many, the smallest in one bar at the end."""
    own = [
        _Row(tensor.name, artifact.entries[tensor.name].dense_nbytes, tensor.nbytes)
        for tensor in report.tensors
        if artifact.entries[tensor.name].tied_to is None and artifact.entries[tensor.name].size
    ]
    if len(own) <= _ROWS:
        return own
    largest = {row.label for row in sorted(own, key=lambda row: -row.before)[: _ROWS - 1]}
    rest = [row for row in own if row.label not in largest]
    total = _Row(f"{len(rest)} smaller tensors", sum(r.before for r in rest), sum(r.after for r in rest))
    return [row for row in own if row.label in largest] + [total]


def _draw_sizes(axes: Axes, rows: list[_Row]) -> None:
    places = np.arange(len(rows))
    before, after = np.array([row.before for row in rows]), np.array([row.after for row in rows])
    axes.barh(places, before, height=0.74, color=BEFORE, label="before (float32)")
    axes.barh(places, after, height=0.74, color=AFTER, label="after (in the file)")
    axes.set_xscale("log")
    low, high = 10 ** np.floor(np.log10(max(min(after.min(), before.min()) / 2, 1))), before.max()
    axes.set_xlim(low, high * (high / low) ** 0.42)  # room for the text to the right of the longest bar
    for place, row in zip(places, rows, strict=True):
        text = f"{human_bytes(row.before)} → {human_bytes(row.after)}  ({row.before / row.after:.1f}x)"
        axes.annotate(
            text, (max(row.before, row.after), place), (5, 0), textcoords="offset points", va="center", size=8
        )
    axes.set_yticks(places, [_shortened(row.label) for row in rows], size=9)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    decades = 10.0 ** np.arange(round(np.log10(low)), np.floor(np.log10(high)) + 1)
    axes.set_xticks(decades, [_tick(round(value)) for value in decades])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("size (log scale)")
    axes.set_title("Size by layer", loc="left", fontsize=11, pad=24)
    axes.grid(axis="x", color=BEFORE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    # Outside, as bars and their texts may end anywhere inside.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)


def _draw_weights(axes: Axes, report: Report, artifact: Artifact, original: Source | None) -> None:
    found = next(((t, c) for t in _largest(report) if (c := codewords(artifact[t.name])) is not None), None)
    axes.spines[["top", "right"]].set_visible(False)
    if found is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no tensor of this file has one codebook", ha="center", va="center", color=FAINT)
        return
    tensor, book = found
    size = artifact.entries[tensor.name].size
    used = book.shares > 0
    values, shares = book.values[used], book.shares[used]
    floor = 0.5 / size
    if original is not None:
        weights = original.load(tensor.name).astype(np.float64)
        flat = (
            weights.reshape(len(book.row_scale), -1) / book.row_scale[:, None]
            if book.row_scale is not None
            else weights
        )
        flat = flat[np.isfinite(flat)]
        counts, edges = np.histogram(flat, _BINS)
        axes.stairs(
            counts / size, edges, fill=True, color=BEFORE, baseline=floor, label="weights before (share of each bin)"
        )
    axes.vlines(values, floor, shares, color=CODEWORD, linewidth=1.2, alpha=0.55)
    axes.scatter(values, shares, s=26, color=CODEWORD, zorder=3, label="codewords (share of the weights)")
    axes.set_yscale("log")
    axes.set_ylim(floor, 4 * float(shares.max()))  # room for the label of the largest
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.5g} %" if value <= 1 else "")
    top = int(np.argmax(shares))
    axes.annotate(
        f"{100 * shares[top]:.1f} % become {values[top]:.3g}",
        (values[top], shares[top]),
        (0, 7),
        textcoords="offset points",
        ha="center",
        size=9,
        color=CODEWORD,
    )
    axes.set_xlabel("weight" if book.row_scale is None else "weight / scale of its row")
    axes.set_ylabel("share of the weights (log scale)")
    name = f"{_shortened(tensor.name)}: {size:,} weights, {len(values)} codewords"
    axes.set_title(name, loc="left", fontsize=11, pad=24)
    axes.grid(axis="y", color=BEFORE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)


def _largest(report: Report) -> list[TensorReport]:
    """Tensors with a codebook, those of most values first."""
    coded = [t for t in report.tensors if t.n_clusters is not None and not t.method.startswith("tied to ")]
    return sorted(coded, key=lambda tensor: -int(np.prod(tensor.shape, dtype=np.int64)))


def codewords(expr: Expr) -> Codewords | None:
    """The codewords of scalar weight sharing with one codebook, perhaps scaled by row; None for all else."""
    unit, row_scale = 1.0, None
    while not isinstance(expr, Lookup):
        if isinstance(expr, Reshape) or (isinstance(expr, Permute) and row_scale is None):
            expr = expr.inner
        elif isinstance(expr, Affine) and expr.offset is None and expr.scale is not None:
            if expr.scale.size == 1:
                unit *= float(expr.scale.astype(np.float64).reshape(-1)[0])
            elif row_scale is None and expr.scale.size == expr.scale.shape[0]:
                row_scale = expr.scale.astype(np.float64).reshape(-1)
            else:
                return None
            expr = expr.inner
        else:
            return None
    if expr.codebook.shape[0] != 1 or expr.codebook.shape[2] != 1:
        return None
    values = expr.codebook.reshape(-1).astype(np.float64) * unit
    counts = np.bincount(expr.codes.reshape(-1), minlength=len(values))
    return Codewords(values, counts / max(expr.codes.size, 1), row_scale)


def _tick(count: int) -> str:
    return human_bytes(count).replace(".00", "").replace(".0", "").replace(" bytes", " B")


def _shortened(name: str, limit: int = 34) -> str:
    """A label that leaves room for the bars: the end of a name tells more than its middle."""
    return _literal(name if len(name) <= limit else f"{name[:9]}…{name[-(limit - 10) :]}")


def _literal(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")
