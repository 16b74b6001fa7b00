"""Draw docs/codewords.png and docs/rates.png, of the bundled LeNet-5: python docs/draw_methods.py (or make docs)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from codeword import zoo
from codeword.artifact import code_tensor
from codeword.expr import decode, leaves
from codeword.math.bins import make_bins
from codeword.methods import (
    Birch,
    DensityKMeans,
    KernelTemplates,
    KMeans,
    Lloyd,
    Method,
    ProductQuantization,
    RateAware,
    RowScaled,
)
from codeword.safetensors_file import read_header, read_tensor

FOLDER = Path(__file__).parent
INK, FAINT, BARS = "#1f2933", "#8593a3", "#d5dce6"
LAMBDAS = (0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.17, 0.28)
# Each curve: label, colour, line style, methods from coarse to fine.
Curve = tuple[str, str, str, Iterable[Method]]


class Point(NamedTuple):
    bits: float  # per weight, tables and scales included
    sqnr: float  # dB


def weight(name: str) -> np.ndarray:
    return read_tensor(zoo.lenet5_path(), read_header(zoo.lenet5_path()).entries[f"{name}.weight"])


def point(values: np.ndarray, method: Method) -> Point:
    expr = method.compress(values, None, generator=np.random.default_rng(0))
    error = decode(expr).reshape(values.shape).astype(np.float64) - values
    nbytes = code_tensor("w", "float32", values.shape, expr).nbytes
    energy = np.sum(np.square(values, dtype=np.float64))
    return Point(8 * nbytes / values.size, 10 * np.log10(energy / np.sum(np.square(error))))


def rate_aware(lam: float, start: Method | None = None) -> RateAware:
    return RateAware(lam, granularity="tensor", codebook="free", compensate=False, start=start)  # type: ignore[arg-type]


def curves(values: np.ndarray) -> list[Curve]:
    found: list[Curve] = [
        ("k-means, linear start (A1)", "#b7791f", ":", [Lloyd(k) for k in (3, 4, 6, 8, 12, 16, 24)]),
        ("exact k-means (A0)", "#2b6cb0", "-", [KMeans(k) for k in (3, 4, 6, 8, 12, 16, 24)]),
        ("density k-means, k found (A2)", "#2f855a", "--", [DensityKMeans(lam=lam) for lam in LAMBDAS]),
        ("BIRCH + k-means++ (A3)", "#805ad5", ":", [Birch(db) for db in (6.0, 9.0, 12.0, 15.0, 18.0, 21.0)]),
        ("k-means + row scales (A4)", "#d53f8c", "--", [RowScaled(k) for k in (3, 4, 6, 8, 12, 16, 24)]),
        ("rate-aware (A5)", "#c2410c", "-", [rate_aware(lam) for lam in LAMBDAS]),
    ]
    if values.ndim > 2:
        found.append(("kernel templates (B2)", "#0f766e", "-.", [KernelTemplates(k) for k in (4, 8, 16, 32, 64)]))
        return found
    books = [(8, 256), (4, 64), (4, 256), (2, 64), (2, 128), (2, 256)]
    found.append(("product quantization (B1)", "#0f766e", "-.", [ProductQuantization(d, k) for d, k in books]))
    on_top = [rate_aware(lam, ProductQuantization(2, 256)) for lam in LAMBDAS]
    found.append(("rate-aware on top of it (B1 + A5)", "#111827", "-.", on_top))
    return found


def draw_rates() -> None:
    figure = Figure(figsize=(13, 5.4), dpi=110, facecolor="white", layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("fc1", "conv2"), strict=True):
        values = weight(name)
        for label, colour, style, methods in curves(values):
            points = sorted(point(values, method) for method in methods)
            line = [(bits, sqnr - 6.02 * bits) for bits, sqnr in points]  # all curves rise alike: show what differs
            axes.plot(*zip(*line, strict=True), style, color=colour, label=label, marker="o", ms=3, lw=1.6)
        plain(axes, f"LeNet-5 {name}: {values.size:,} weights")
        axes.set_xlabel("bits per weight in the file, tables and scales counted")
        axes.set_ylabel("SQNR of the weights, less 6.02 dB a bit (higher is better)")
        axes.axhline(0, color=INK, lw=0.8)
        axes.text(4.6, 0.06, "the bound for Gaussian weights", ha="right", size=9, color=INK)
        axes.set_xlim(0, 4.6)
        axes.set_ylim(-4.5, 0.5)
        axes.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)
    figure.savefig(FOLDER / "rates.png")


def draw_codewords() -> None:
    values = weight("fc1")
    bins = make_bins(values)
    low, high = np.quantile(values, [0.0005, 0.9995])
    rows: list[tuple[str, Method]] = [
        ("k-means from a linear start (A1), 12 codewords asked for", Lloyd(12)),
        ("exact k-means (A0), 12 codewords asked for", KMeans(12)),
        ("k-means from the density (A2), their number found", DensityKMeans(lam=0.03)),
        ("rate-aware on a grid (A5), their number found", RateAware(0.027, granularity="tensor", compensate=False)),
    ]
    figure = Figure(figsize=(13, 6.2), dpi=110, facecolor="white", layout="constrained")
    for axes, (label, method) in zip(figure.subplots(2, 2).flat, rows, strict=True):
        edges = np.linspace(low, high, 161)
        counts, _ = np.histogram(bins.values, edges, weights=np.diff(bins.counts))
        axes.bar(edges[:-1], counts / counts.max(), width=np.diff(edges), align="edge", color=BARS)
        expr = method.compress(values, None, generator=np.random.default_rng(0))
        shared, members = np.unique(decode(expr), return_counts=True)
        axes.vlines(shared, 0, members / members.max(), color="#c2410c", lw=2)
        found = point(values, method)
        codes = next(array for path, array in leaves(expr) if path.endswith("codes"))
        count = len(np.unique(codes))
        plain(axes, f"{label}:\n{count} codewords, {found.bits:.2f} bits a weight, {found.sqnr:.1f} dB")
        axes.set_xlim(low, high)
        axes.set_yticks([])
    figure.supxlabel(
        "weights of LeNet-5's fc1 (grey: their histogram) and codewords (red: as high as their share of the weights)",
        size=10,
        color=INK,
    )
    figure.savefig(FOLDER / "codewords.png")


def plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color=BARS, lw=0.5)
    axes.set_axisbelow(True)


def main() -> None:
    draw_codewords()
    draw_rates()


if __name__ == "__main__":
    main()
