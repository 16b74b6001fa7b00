"""Section of docs/results.md on fronts beside other tools, of benchmarks/fronts/*/front.json."""

from __future__ import annotations

from pathlib import Path

import msgspec
from wording import listed

from codeword.front import Front, Margin, Measure, margins
from codeword.report.front import COUNTED, PICTURE, label, larger_table, ours_table
from main_job import table

WANTED = 0.35  # bytes less than rounding + xz at equal accuracy


def fronts(folder: Path) -> list[str]:
    """One part a front; nothing where none was drawn."""
    parts = []
    for record in sorted(folder.glob("*/front.json")):
        front = msgspec.json.decode(record.read_bytes(), type=Front)
        if front.ours:
            parts += of_net(front, record.parent)
    if not parts:
        return []
    return [
        "## Fronts beside other tools",
        "`codeword sweep`, by the commands of `benchmarks/fronts/README.md` (raw: `benchmarks/fronts/*/front.json`; "
        f"`front.md` beside them has all files). {COUNTED} Ahead: points of top-1 above the best peer that takes no "
        "more bytes. Rounding + xz: bytes beside what rounding a channel under xz takes for the same top-1. Second "
        "table: points ahead of the next larger file of each peer, and how many times larger that is, up to twice. "
        "Where 1 % of 10,000 images are right in one net only, a difference has a standard error of 0.1 points; "
        "agreement with the uncompressed net does not depend on that luck.",
        *parts,
    ]


def of_net(front: Front, folder: Path) -> list[str]:
    found = margins(front)
    seen = "no data" if front.calibration is None else f"{front.calibration}, labels unused"
    parts = [
        f"**{front.net.removesuffix('.safetensors')}**, {front.n:,} images of {front.data}, top-1 "
        f"{front.dense_top1:.2f} % uncompressed; ours were made with {seen}."
    ]
    if (folder / PICTURE).exists():
        parts.append(f"![bytes against accuracy](../benchmarks/fronts/{folder.name}/{PICTURE})")
    parts.append(table(*ours_table(front, found)))
    if any(margin.larger for margin in found):
        parts.append(table(*larger_table(front, found)))
    parts.append(" ".join(said(found)))
    agreeing = margins(front, "agreement")
    parts.append("The same by how often they say what the uncompressed net says:")
    parts.append(table(*ours_table(front, agreeing, "agreement")))
    if any(margin.larger for margin in agreeing):
        parts.append(table(*larger_table(front, agreeing)))
    parts.append(" ".join(said(agreeing, "agreement")))
    if front.missing:
        parts.append("\n".join(f"- {name}: {why}" for name, why in front.missing.items()))
    return parts


def said(found: list[Margin], by: Measure = "top1") -> list[str]:
    """Where a peer is the better one, and how much smaller ours are than rounding + xz."""
    better = "is more accurate" if by == "top1" else "agrees more often"
    within = [
        f"{it.row.settings} ({it.within.ahead:+.2f})" for it in found if it.within is not None and it.within.ahead < 0
    ]
    beyond = [
        f"{it.row.settings} ({label(name)}, {beside.ahead:+.2f} at {beside.row.nbytes / it.row.nbytes:.2f}x)"
        for it in found
        for name, beside in it.larger.items()
        if beside.ahead < 0
    ]
    texts = [
        f"A peer within our bytes {better} at {listed(within)}." if within else f"No peer within our bytes {better}.",
        f"The next larger file of one is at {listed(beyond)}." if beyond else "No next larger file of one is.",
    ]
    saved = {it.row.settings: it.saved for it in found if it.saved is not None}
    if saved:
        short = [f"{target} ({less(share)})" for target, share in saved.items() if share < WANTED]
        rest = f"; {less(WANTED)} was wanted, which fell short at {listed(short)}" if short else ""
        span = " to ".join(dict.fromkeys(less(share) for share in (max(saved.values()), min(saved.values()))))
        texts.append(f"Beside rounding + xz ours take {span}{rest}.")
    return texts


def less(share: float) -> str:
    """'-35 %' of bytes, of the share that is saved."""
    return f"{-100 * share:+.0f} %"
