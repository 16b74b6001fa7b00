"""The whole of Codeword in one call: the bundled LeNet-5, made small without data or retraining, read back, tested."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import Any

import msgspec

from codeword import api
from codeword.atomic import make_folder
from codeword.data import load_data
from codeword.errors import MissingDependencyError
from codeword.evaluate import compare as run_both
from codeword.execute import Progress
from codeword.report import Accuracy, write_report
from codeword.sources import open_source

DEFAULT_TARGET = "30x"
_MODEL = "model.cw"


class Demo(msgspec.Struct, frozen=True):
    """What the demo measured. Sizes in bytes of files on disk, accuracies in percent."""

    files: dict[str, str]
    dense_nbytes: int
    nbytes: int
    container_nbytes: int
    ratio: float
    bits_per_weight: float
    target: str
    missed: str | None  # what to tell the user if the target was missed
    differences: list[str]  # what reading the file back found wrong: nothing, or Codeword has a bug
    accuracy: Accuracy
    seconds: float
    note: str | None = None  # why there is no picture


def run_demo(
    folder: str | os.PathLike[str] = "demo", target: str = DEFAULT_TARGET, *, progress: Progress | None = None
) -> Demo:
    """Compress the bundled LeNet-5 to `folder`/model.cw, read it back, score it beside the original, write the report.

    Raises TargetError, WriteError, or MissingDependencyError without torch. Without matplotlib the report has no
    picture, and `note` says how to get it.
    """
    start = time.perf_counter()
    try:
        from codeword import zoo
    except ImportError as error:
        raise MissingDependencyError('the demo needs PyTorch: pip install "codeword[torch,plot]"') from error
    place = make_folder(folder)
    path = place / _MODEL
    original = open_source(zoo.lenet5_path())
    made = api.fit(original, target, progress=progress)
    made.artifact.save(path)
    # From here on nothing of the compression is used but the file.
    with api.load(path) as artifact:
        differences = [f"{found.tensor} {found.what}" for found in api.verify(artifact, original)]
        accuracy = compare(zoo.lenet5_trained(), api.swap(zoo.lenet5(), artifact), "digits")
        picture = find_spec("matplotlib") is not None
        files = write_report(
            place,
            api.inspect(artifact, original),
            artifact,
            file=_MODEL,
            original=original,
            kept=made.kept,
            accuracy=accuracy,
            plan=made.plan.to_dict(),
            picture=picture,
        )
        return Demo(
            files={"model": str(path)} | {kind: str(file) for kind, file in files.items()},
            dense_nbytes=artifact.dense_nbytes,
            nbytes=artifact.nbytes,
            container_nbytes=artifact.container_nbytes,
            ratio=artifact.ratio,
            bits_per_weight=artifact.bits_per_weight,
            target=target,
            missed=made.missed,
            differences=differences,
            accuracy=accuracy,
            seconds=time.perf_counter() - start,
            note=None if picture else 'no picture without matplotlib: pip install "codeword[plot]"',
        )


def compare(original: Any, compressed: Any, data: Any, **options: Any) -> Accuracy:  # noqa: ANN401 - torch modules
    """Both nets on the same examples. data: a spec or a Dataset; options: those of `evaluate`."""
    dataset = load_data(data) if isinstance(data, str) else data
    before, after, same = run_both(original, compressed, dataset, **options)
    return Accuracy(
        data=dataset.name,
        n=after.n,
        original_top1=before.top1,
        top1=after.top1,
        drop_top1=_points(before.top1, after.top1),
        original_top5=before.top5,
        top5=after.top5,
        drop_top5=None if before.top5 is None or after.top5 is None else _points(before.top5, after.top5),
        agreement=same,
    )


def _points(before: float, after: float) -> float:
    return round(before - after, 6)  # the noise of float subtraction is no fact
