"""What a report says beside the measured file, and its three forms on disk: JSON, Markdown, a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from codeword.artifact import Artifact
from codeword.atomic import make_folder, replacing
from codeword.errors import MissingDependencyError
from codeword.finetune import History
from codeword.report.measure import Report
from codeword.sources import Source

JSON, MARKDOWN, PICTURE = "report.json", "report.md", "report.png"


class Accuracy(msgspec.Struct, frozen=True):
    """A net before and after on the same n examples. Percent; a drop is in percentage points, positive if worse."""

    data: str
    n: int
    original_top1: float
    top1: float
    drop_top1: float
    original_top5: float | None
    top5: float | None
    drop_top5: float | None
    agreement: float | None  # percent of the examples on which both nets have the same first class


class Page(msgspec.Struct, frozen=True):
    """All that the page tells. Every number was measured: on the file on disk, or by running the nets."""

    file: str
    original: str | None
    measured: Report
    kept: dict[str, str]  # tensor -> why it was stored losslessly
    accuracy: Accuracy | None = None
    plan: dict[str, Any] | None = None
    training: list[History] = []


def write_report(
    folder: str | os.PathLike[str],
    report: Report,
    artifact: Artifact,
    *,
    file: str,
    original: Source | None = None,
    kept: Mapping[str, str] | None = None,
    accuracy: Accuracy | None = None,
    plan: Mapping[str, Any] | None = None,
    training: Sequence[History] = (),
    picture: bool = True,
) -> dict[str, Path]:
    """Write report.json, report.md and report.png into `folder`, made if need be; returns {"json": path, ...}.

    report: what `inspect` measured on `artifact`, which should be the file on disk, opened. file: what to call it.
    original: the net before, for the histogram. plan: `Plan.to_dict()`. training: what
    its stages recorded. picture: False leaves report.png out.

    All three are made before the first is written, and each replaces an older one whole. Raises WriteError,
    MissingDependencyError if the picture needs matplotlib and there is none.
    """
    page = Page(
        file=file,
        original=None if original is None else original.location,
        measured=report,
        kept=dict(kept or {}),
        accuracy=accuracy,
        plan=None if plan is None else dict(plan),
        training=list(training),
    )
    contents = {JSON: msgspec.json.format(msgspec.json.encode(page), indent=2) + b"\n"}
    if picture:
        need_pictures()
        from codeword.report.draw import draw

        contents[PICTURE] = draw(report, artifact, original, title=_title(page))
    from codeword.report.markdown import markdown

    contents[MARKDOWN] = markdown(page, picture=PICTURE if picture else None).encode()
    target = make_folder(folder)
    for name in (JSON, PICTURE, MARKDOWN):
        if name in contents:
            with replacing(target / name) as out:
                out.write(contents[name])
    return {name.rpartition(".")[2]: target / name for name in (JSON, MARKDOWN, PICTURE) if name in contents}


def need_pictures() -> None:
    """Raises MissingDependencyError now if there is no matplotlib, and not after the work."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError('drawing a report needs matplotlib: pip install "codeword[plot]"')


def _title(page: Page) -> str:
    return f"{page.file}: {page.measured.ratio:.1f}x smaller than float32"
