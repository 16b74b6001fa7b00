"""What the verbs found, as tables a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeword import console
from codeword.drop import Trial
from codeword.finetune import History
from codeword.forecast import Forecast
from codeword.front import Front, Row, margins
from codeword.report import Report
from codeword.report.front import COUNTED, larger_table, named, ours_table
from codeword.report.words import by_reason, error_text, human_bytes, method_text, shape_text

if TYPE_CHECKING:
    from codeword.demo import Demo


def compressed(facts: Mapping[str, Any]) -> None:
    """What `compress` did, from the facts it also gives as JSON."""
    groups = [f"{len(names)} {reason}" for reason, names in by_reason(facts["kept"]).items()]
    tied = f", {facts['tied']} tied to another" if facts["tied"] else ""
    wrong = [f"{found['tensor']} {found['what']}" for found in facts["differences"]]
    rows = [
        ("before", f"{facts['dense_nbytes']:,} bytes in float32 ({human_bytes(facts['dense_nbytes'])})"),
        ("after", f"{facts['nbytes']:,} bytes on disk ({human_bytes(facts['nbytes'])}): {facts['output']}"),
        ("ratio", f"{facts['ratio']:.2f}x, {facts['bits_per_weight']:.3f} bits per weight"),
        ("tensors", f"{facts['compressed']} compressed, {len(facts['kept'])} kept losslessly{tied}"),
        *([("kept", "; ".join(groups))] if groups else []),
        *_measured(facts["measured"]),
        *(_trained(history) for history in facts.get("training", ())),
        ("verified", "NO: " + "; ".join(wrong) if wrong else "the written file was read back and compared"),
        ("seconds", f"{facts['seconds']:.1f}"),
    ]
    if "report" in facts:
        rows.append(("report", str(facts["report"]["md"])))
    console.facts(rows)


def _measured(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    searches = [trial for trial in found["trials"] if not trial["check"]]
    checks = len(found["trials"]) - len(searches)
    words = f"{found['drop']:+.2f} points of {found['dense']:.2f} %"
    words += f", 95 % confidence {found['low']:+.2f} to {found['high']:+.2f}"
    words += f"; on {found['examples']:,} examples, at most {found['most']:g} was asked for"
    said = f"{len(searches)} nets on {found['search_examples']:,} examples"
    said += f", then {checks} on all {found['examples']:,}" if checks else ""
    rows = [("drop", words), ("measured", f"{said}; the uncompressed net once")]
    return rows if found["note"] is None else [*rows, ("note", found["note"])]


def trial(made: Trial) -> str:
    """A file that was measured, in a line."""
    what = "check on" if made.check else "on"
    return f"{made.nbytes:,} bytes  drop {made.drop:+.2f} points  {what} {made.examples:,} examples"


def _trained(history: Mapping[str, Any]) -> tuple[str, str]:
    kept, dense = history["done"][history["kept"]], history["dense"]
    said = f"{history['epochs']} epochs, kept that of epoch {history['kept']}"
    if kept["held_out_top1"] is not None:
        said += f": top-1 {kept['held_out_top1']:.2f} % of {history['held_out']:,} held out"
        said += "" if dense is None else f", uncompressed {dense['held_out_top1']:.2f} %"
    return "pruned" if history["stage"] == "pruner" else "trained", said


def epoch(history: History) -> str:
    """The newest epoch in a line."""
    last, dense = history.last, history.dense
    stage = "pruning " if history.stage == "pruner" else ""
    words = [f"{stage}epoch {last.epoch}/{history.epochs}" if last.epoch else f"{stage}before"]
    words += [] if last.loss is None else [f"loss {last.loss:.4f}"]
    if last.held_out_top1 is not None:
        beside = "" if dense is None else f" (uncompressed {dense.held_out_top1:.2f} %)"
        words.append(f"held out {last.held_out_top1:.2f} %{beside}")
    elif last.held_out_loss is not None:
        beside = "" if dense is None else f" (uncompressed {dense.held_out_loss:.4f})"
        words.append(f"held out {last.held_out_loss:.4f}{beside}")
    return "  ".join([*words, f"{last.seconds:.1f} s"])


def inspected(found: Report, *, compared: bool) -> None:
    """A file tensor by tensor, and in all. compared: whether there was an original to tell errors by."""
    rows = [
        [
            tensor.name,
            shape_text(tensor.shape),
            method_text(tensor),
            str(tensor.n_clusters or ""),
            f"{tensor.sparsity:.1%}",
            f"{tensor.nbytes:,}",
            f"{tensor.bits_per_weight:.3f}",
            error_text(tensor),
        ]
        for tensor in found.tensors
    ]
    rest = found.nbytes - sum(tensor.nbytes for tensor in found.tensors)
    footer = [
        ["header", "", "", "", "", f"{rest:,}", "", ""],
        [f"{len(found.tensors)} tensors", "", "", "", "", f"{found.nbytes:,}", f"{found.bits_per_weight:.3f}", ""],
    ]
    columns = ["name", "shape", "method", "k", "zeros", "bytes", "bpw", "SQNR dB"]
    last = None if compared else -1
    console.table(columns[:last], [row[:last] for row in rows], footer=[row[:last] for row in footer], left=3)
    console.say(
        f"\n{found.nbytes:,} bytes, {found.ratio:.2f}x smaller than {found.dense_nbytes:,} in float32; "
        f"{found.container_nbytes:,} bytes are the container (header, names, checksums)"
    )
    for key, value in found.metadata.items():
        console.say(f"{key}: {value}")


def compared(facts: Mapping[str, Any]) -> None:
    """Two nets on the same data."""
    top5 = facts["drop_top5"] is not None
    rows = [
        [str(facts["against"]), f"{facts['original_top1']:.2f}", f"{facts['original_top5']:.2f}" if top5 else ""],
        [str(facts["file"]), f"{facts['top1']:.2f}", f"{facts['top5']:.2f}" if top5 else ""],
    ]
    footer = [["drop (points)", f"{facts['drop_top1']:+.2f}", f"{facts['drop_top5']:+.2f}" if top5 else ""]]
    last = None if top5 else -1
    columns = ["net", "top-1 %", "top-5 %"]
    console.table(columns[:last], [row[:last] for row in rows], footer=[row[:last] for row in footer])
    console.say(f"\n{facts['n']:,} examples of {facts['data']}; both nets agree on {facts['agreement']:.2f} %")


def demonstrated(found: Demo) -> None:
    """The demo: sizes, accuracies, where the files are."""
    accuracy = found.accuracy
    rows = [
        ["bytes", f"{found.dense_nbytes:,}", f"{found.nbytes:,}", f"{found.ratio:.2f}x smaller"],
        ["bits per weight", "32", f"{found.bits_per_weight:.3f}", ""],
        ["top-1 %", f"{accuracy.original_top1:.2f}", f"{accuracy.top1:.2f}", f"{accuracy.drop_top1:+.2f} points"],
    ]
    console.say("LeNet-5, compressed without data or retraining:\n")
    console.table(["", "float32", "compressed", "drop"], rows)
    console.say(
        f"\nScored on {accuracy.n:,} MNIST test digits; both nets agree on {accuracy.agreement:.1f} % of them.\n"
        f"{'The file was read back and verified' if not found.differences else 'The file DIFFERS'}. "
        f"{found.seconds:.1f} seconds.\n"
    )
    console.facts([(kind, path) for kind, path in found.files.items()])
    for note in (found.note, found.missed, *found.differences):
        if note is not None:
            console.warn(note)


def forecast(found: Forecast, out: Path | None) -> None:
    """A plan tensor by tensor, and what it will come to. out: where it was written."""
    rows = [
        [
            tensor.name,
            shape_text(tensor.shape),
            tensor.kind,
            tensor.method if tensor.tied_to is None else f"tied to {tensor.tied_to}",
            f"{tensor.nbytes:,.0f}",
            f"{tensor.bits_per_weight:.3f}",
            "" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}",
        ]
        for tensor in found.tensors
    ]
    footer = [
        ["header", "", "", "", f"{found.header_nbytes:,}", "", ""],
        [f"{len(found.tensors)} tensors", "", "", "", f"{found.nbytes:,}", f"{found.bits_per_weight:.3f}", ""],
    ]
    console.table(["name", "shape", "kind", "method", "bytes", "bpw", "SQNR dB"], rows, footer=footer, left=4)
    console.say("")
    size = f"{found.nbytes:,} bytes, {found.ratio:.2f}x smaller than {found.dense_nbytes:,} in float32"
    console.facts(
        [
            ("target", f"{found.target}: {found.target_nbytes:,} bytes"),
            ("predicted", size),
            ("error", f"{found.error:.2%} of the energy of a tensor, on average over those that are not exact"),
            ("seconds", f"{found.seconds:.1f} to compress by this plan, in one process on this machine"),
            ("memory", f"{human_bytes(found.peak_nbytes)} at its height"),
            *([("plan", f"{out}: run it with codeword compress --plan")] if out is not None else []),
        ]
    )


def point(found: Front, row: Row) -> str:
    """A new point of a front in a line."""
    scores = f"top-1 {row.top1:6.2f} %  agrees {row.agreement:6.2f} %"
    return f"{found.ratio(row):6.2f}x {row.nbytes:>12,} bytes  {scores}  {named(row)}"


def front(found: Front, files: Mapping[str, Any]) -> None:
    """Our files beside the peers."""
    beside = margins(found)
    console.table(*ours_table(found, beside))
    if found.peers:
        console.say("\nPoints ahead of the next larger file of each peer (and how many times larger that is):\n")
        console.table(*larger_table(found, beside))
    console.say(
        f"\n{found.n:,} examples of {found.data}; uncompressed {found.dense_nbytes:,} bytes, top-1 "
        f"{found.dense_top1:.2f} %. {COUNTED}\n"
    )
    console.facts([(kind, str(path)) for kind, path in files.items()])
    for name, why in found.missing.items():
        console.warn(f"{name}: {why}")
