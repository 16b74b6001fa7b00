"""A report as a page of Markdown."""

from __future__ import annotations

import os

import tomli_w

from codeword.finetune import History
from codeword.report.measure import Report
from codeword.report.page import Accuracy, Page
from codeword.report.words import by_reason, error_text, human_bytes, method_text, shape_text


def markdown(page: Page, *, picture: str | None = None) -> str:
    """The page. picture: the image to show, relative to the page."""
    parts = [f"# {_escaped(page.file)}", _headline(page)]
    if page.accuracy is not None:
        parts += ["## Accuracy", _accuracy(page.accuracy)]
    if picture is not None:
        parts.append(
            f"![Size of each layer before and after, and the weights of the largest with their codewords]({picture})"
        )
    parts += ["## Tensors", _tensors(page.measured), _legend(page)]
    parts += ["## Kept losslessly", _kept(page)]
    if page.training:
        parts += ["## Training", *map(_training, page.training)]
    if page.plan is not None:
        # Folded: a plan names every tensor, and a deep net has hundreds.
        parts += [
            "## Plan",
            "`codeword compress IN --plan plan.toml`, with this as `plan.toml`, makes "
            + ("what was trained from." if page.training else "the same file of the same net."),
            f"<details>\n<summary>plan.toml</summary>\n\n```toml\n{tomli_w.dumps(page.plan).strip()}\n```\n\n</details>",
        ]
    return "\n\n".join(parts) + "\n"


def _headline(page: Page) -> str:
    report = page.measured
    source = f" of `{os.path.basename(page.original)}`" if page.original else ""  # noqa: PTH119 - a label, not a path
    return (
        f"The weights{source} take **{report.nbytes:,} bytes** on disk instead of {report.dense_nbytes:,} in "
        f"float32 ({human_bytes(report.nbytes)} instead of {human_bytes(report.dense_nbytes)}): "
        f"**{report.ratio:.2f}x smaller**, {report.bits_per_weight:.3f} bits per weight with everything counted. "
        f"{report.container_nbytes:,} of these bytes are the container: header, names and checksums."
    )


def _accuracy(accuracy: Accuracy) -> str:
    rows = [("top-1 (%)", accuracy.original_top1, accuracy.top1, accuracy.drop_top1)]
    if accuracy.original_top5 is not None and accuracy.top5 is not None and accuracy.drop_top5 is not None:
        rows.append(("top-5 (%)", accuracy.original_top5, accuracy.top5, accuracy.drop_top5))
    lines = ["| | uncompressed | compressed | drop (points) |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {before:.2f} | {after:.2f} | {drop:+.2f} |" for name, before, after, drop in rows]
    same = "" if accuracy.agreement is None else f" The two nets agree on {accuracy.agreement:.2f} % of them."
    return "\n".join(lines) + f"\n\nMeasured on the same {accuracy.n:,} examples of `{accuracy.data}`.{same}"


def _training(history: History) -> str:
    """A stage epoch by epoch, the one that was kept in bold."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        f"The {history.stage}, {history.held_out:,} examples held out:\n",
        "| epoch | loss | held out: loss | held out: top-1 (%) | learning rate | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    dense = [] if history.dense is None else [("uncompressed", history.dense)]
    for name, it in [*dense, *((str(it.epoch), it) for it in history.done)]:
        name = f"**{name}**" if name == str(history.kept) else name
        rest = cell(it.learning_rate, ".2g"), cell(it.seconds, ".1f")
        scores = cell(it.loss, ".4f"), cell(it.held_out_loss, ".4f"), cell(it.held_out_top1, ".2f")
        lines.append(f"| {name} | {' | '.join((*scores, *rest))} |")
    return "\n".join(lines)


def _tensors(report: Report) -> str:
    lines = [
        "| tensor | shape | method | k | zeros | bytes | bits per weight | SQNR (dB) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for tensor in report.tensors:
        what = f"{_code(tensor.name)} | {shape_text(tensor.shape)} | {_escaped(method_text(tensor))}"
        size = f"{tensor.nbytes:,} | {tensor.bits_per_weight:.2f} | {error_text(tensor)}"
        lines.append(f"| {what} | {tensor.n_clusters or ''} | {tensor.sparsity:.1%} | {size} |")
    # What is no tensor's is the header; a tensor's own checksum is counted with the tensor.
    rest = report.nbytes - sum(tensor.nbytes for tensor in report.tensors)
    lines.append(f"| *header* | | | | | {rest:,} | | |")
    lines.append(f"| **file** | | | | | **{report.nbytes:,}** | **{report.bits_per_weight:.2f}** | |")
    return "\n".join(lines)


def _legend(page: Page) -> str:
    text = "k: codewords of the codebook; zeros: share of weights that are exactly 0"
    if page.original is not None:
        text += "; SQNR: energy of the weights over energy of the error, *exact* where every bit is the original's"
    return text + "."


def _kept(page: Page) -> str:
    if not page.kept:
        return "None: every tensor was approximated."
    return "\n".join(
        f"- {_escaped(reason)}: {', '.join(map(_code, names))}" for reason, names in by_reason(page.kept).items()
    )


def _code(name: str) -> str:
    """A name as code; a bar would end a table's cell all the same."""
    return f"`{name}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text whose characters mean nothing to Markdown."""
    return "".join(f"\\{char}" if char in "\\`*_|<[" else char for char in text)
