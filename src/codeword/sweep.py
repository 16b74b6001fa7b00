"""The front of a net: files at many targets from one pass over its weights, and peers on the same images.

Each point is written to the record as soon as it is made, and a point that is there is not made again.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

import msgspec
import numpy as np

from codeword.artifact import Artifact
from codeword.atomic import make_folder, replacing
from codeword.cache import Cache
from codeword.data import Dataset, load_data
from codeword.errors import PlanError
from codeword.evaluate import classes
from codeword.execute import Progress
from codeword.fold import eps_of
from codeword.front import OURS, Front, Measure, Row, margins
from codeword.job import Job, calibrated, runnable
from codeword.peers import PEERS, Subject, hushed, sizes
from codeword.sources import Source, open_source

if TYPE_CHECKING:
    import torch

TARGETS = ("4x", "6x", "8x", "10x", "12x", "15x", "20x", "30x")
RECORD = "front.json"
_BATCH = 100  # faster than 500 on one core by a third

OnRow = Callable[[Front, Row], None]


def sweep(
    model: Any,  # noqa: ANN401
    targets: Sequence[str | float] = TARGETS,
    *,
    data: Dataset | str,
    net: torch.nn.Module | None = None,
    calibrate: Dataset | str | None = None,
    peers: Sequence[str] = tuple(PEERS),
    folder: str | os.PathLike[str] | None = None,
    again: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    cache: Cache | Path | bool = False,
    progress: Progress | None = None,
    on_row: OnRow | None = None,
) -> Front:
    """Bytes of files against accuracy, at each target and of each peer, without retraining.

    model: a path, a module or anything else that `compress` takes; net: the module to score, where `model` is only
    weights. data: labelled test images, a Dataset or the name of one; all of it is scored. calibrate: images by which
    our errors cancel, as in `compress(data=...)`; a peer that weighs errors (coremltools SKM) gets the labels too.
    peers: names out of `peers.PEERS`. folder: where the files, TARGET.cw, and the record, front.json, go; points that
    stand in the record are not made again, but for those of the methods in `again` ("codeword", or a peer). cache:
    as for `compress`. on_row: told of each new point.

    Sizes are bytes of files on disk (of peers: `codeword.peers`). Raises PlanError if the record is of another net or
    of other data, or a peer is unknown; SourceError, TargetError, DataError, WriteError.
    """
    source = open_source(model)
    known = (OURS, *PEERS)
    for name in (*peers, *again):
        if name not in known:
            raise PlanError(f"{name!r} is no peer; there are {', '.join(PEERS)}")
    module = runnable(source, model if net is None else net)
    kept = cache if isinstance(cache, Cache) else Cache.of(cache)
    options: _Options = {"seed": seed, "workers": workers, "progress": progress, "cache": kept}
    jobs = {str(target): _job(target, module, options) for target in targets}
    for job in jobs.values():
        job.budget(source)  # a target that cannot be read is told before any work
    test = load_data(data) if isinstance(data, str) else data
    seen = load_data(calibrate) if isinstance(calibrate, str) else calibrate
    run = _Run(source, module, test, seen, None if folder is None else make_folder(folder), on_row)
    run.start(again)
    run.files(jobs)
    run.others(peers)
    return run.front


class _Options(TypedDict):
    """What the jobs of all targets have in common."""

    seed: int
    workers: int
    progress: Progress | None
    cache: Cache


def _job(target: str | float, net: torch.nn.Module, options: _Options) -> Job:
    return Job(
        target=target,
        plan=None,
        method=None,
        importance=None,
        anew=None,
        include=(),
        exclude=(),
        keep_nonfinite=False,
        metadata=None,
        fold_norms=True,
        eps=eps_of(net),
        **options,
    )


class _Run:
    """A sweep at work: what is known so far, and what scores a net."""

    def __init__(
        self,
        source: Source,
        module: torch.nn.Module,
        test: Dataset,
        seen: Dataset | None,
        folder: Path | None,
        on_row: OnRow | None,
    ) -> None:
        self._source = source
        self._module = module
        self._scored = copy.deepcopy(module)  # whose weights are set anew for each point
        self._test = test
        self._seen = seen
        self._folder = folder
        self._on_row = on_row
        self._said: np.ndarray | None = None  # by the uncompressed net: classes

    def start(self, again: Iterable[str]) -> None:
        """Read the record, or score the uncompressed net."""
        source, seen, own = self._source, self._seen, [i for i in self._source.infos if i.tied_to is None]
        self.front = Front(
            net=Path(source.location).name,
            digest=_digest(source),
            data=self._test.name,
            n=len(self._test),
            calibration=None if seen is None else f"{seen.name}, {len(seen):,} examples",
            dense_nbytes=sum(info.dense_nbytes for info in own),
            dense_top1=0.0,
        )
        before = self._record()
        if before is None:
            self.front = msgspec.structs.replace(self.front, dense_top1=self._scores(self._module)[0])
            return
        for field in ("digest", "data", "n", "calibration"):
            theirs, mine = getattr(before, field), getattr(self.front, field)
            if theirs != mine:
                raise PlanError(
                    f"{self._folder}/{RECORD} is a sweep with {field} {theirs!r}, this one has {mine!r}: name another "
                    "folder, or remove that file"
                )
        rows = [row for row in before.rows if row.method not in again]
        self.front = msgspec.structs.replace(before, rows=rows, missing={})

    def _record(self) -> Front | None:
        if self._folder is None or not (self._folder / RECORD).exists():
            return None
        try:
            return msgspec.json.decode((self._folder / RECORD).read_bytes(), type=Front)
        except (OSError, msgspec.MsgspecError) as error:
            raise PlanError(
                f"{self._folder}/{RECORD} is no record of a sweep ({error}): name another folder, or remove that file"
            ) from error

    def files(self, jobs: dict[str, Job]) -> None:
        """Our points."""
        done = {row.settings for row in self.front.of(OURS)}
        wanted = {text: job for text, job in jobs.items() if text not in done}
        if not wanted:
            return
        if self._seen is not None:
            told = calibrated(self._source, self._module, self._seen)._asdict()
            wanted = {text: replace(job, **told) for text, job in wanted.items()}
        from codeword.nn import load_into

        curves = next(iter(wanted.values())).curves(self._source)
        for text, job in wanted.items():
            start = time.perf_counter()
            made = job.run(self._source, curves=curves)
            seconds = time.perf_counter() - start
            file = None if self._folder is None else self._folder / f"{text}.cw"
            if file is not None:
                made.artifact.save(file)
            with made.artifact if file is None else Artifact.open(file) as artifact:
                load_into(self._scored, artifact)
                scores = self._scores(self._scored)
                self._add(Row(OURS, text, "cw", artifact.nbytes, *scores, seconds, None if file is None else file.name))

    def others(self, names: Sequence[str]) -> None:
        """The peers' points."""
        subject = Subject(self._module, self._test.x[:1], self._seen)
        for name in names:
            peer = PEERS[name]
            why_not = peer.why_not(subject)
            if why_not is not None:
                self._miss(name, why_not)
                continue
            done = {row.settings for row in self.front.of(name)}
            for settings, make in peer.settings(subject):
                if settings in done:
                    continue
                start = time.perf_counter()
                try:
                    with hushed():
                        made = make()
                    seconds = time.perf_counter() - start
                    self._set(made.weights)
                    scores = self._scores(self._scored)
                except Exception as error:  # noqa: BLE001 - another's code may raise anything; the sweep goes on
                    self._miss(f"{name}, {settings}", f"{type(error).__name__}: {error}")
                    continue
                self._add(*(Row(name, settings, how, size, *scores, seconds) for how, size in sizes(made).items()))

    def _set(self, weights: Mapping[str, np.ndarray]) -> None:
        import torch

        state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        self._scored.load_state_dict(state, strict=False)  # without the second names of tied weights, and counters

    def _scores(self, net: torch.nn.Module) -> tuple[float, float]:
        """(top-1, agreement with the uncompressed net), percent."""
        found = classes(net, self._test, batch_size=_BATCH, nan_is_none=True)
        if self._said is None:
            self._said = found if net is self._module else classes(self._module, self._test, batch_size=_BATCH)
        return 100 * float((found == self._test.y).mean()), 100 * float((found == self._said).mean())

    def _miss(self, name: str, why: str) -> None:
        self.front = msgspec.structs.replace(self.front, missing=self.front.missing | {name: why})
        self._write()

    def _add(self, *rows: Row) -> None:
        self.front = msgspec.structs.replace(self.front, rows=[*self.front.rows, *rows])
        self._write()
        if self._on_row is not None:
            for row in rows:
                self._on_row(self.front, row)

    def _write(self) -> None:
        if self._folder is not None:
            with replacing(self._folder / RECORD) as out:
                out.write(msgspec.json.format(msgspec.json.encode(facts_of(self.front)), indent=1) + b"\n")


def _digest(source: Source) -> str:
    """Of all weights."""
    digest = hashlib.sha256()
    for info in source.infos:
        if info.tied_to is None:
            digest.update(f"{info.name} {info.dtype} {info.shape} ".encode())
            digest.update(source.load(info.name).tobytes())
    return digest.hexdigest()


def facts_of(front: Front) -> dict[str, Any]:
    """What the record holds: the front and the margins, which are made anew from its rows and never read."""
    compared = {f"margins_by_{by}": msgspec.to_builtins(margins(front, by)) for by in get_args(Measure)}
    return msgspec.to_builtins(front) | compared
