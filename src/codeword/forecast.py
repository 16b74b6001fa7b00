"""A dry run: the plan for a target, and what it will come to, without compressing the net.

One pass over the weights makes the curves, and a budget of estimated bytes chooses from them. Curves know nothing of
what compensation adds to bits and errors, which hangs on the layer: that is measured on a few thousand weights of each
tensor, whole rows. What a file has beside its codes is modelled, with numbers measured on LeNet-5, ResNet-20 and
ResNet-56 (benchmarks/prediction.py says how well they hold).
"""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from codeword import allocate
from codeword.artifact import code_tensor
from codeword.curves import Curve, Point, Weighed
from codeword.data import Dataset, load_data
from codeword.execute import Cost, Importance, Progress, express
from codeword.expr import decode, lookups
from codeword.fold import eps_of
from codeword.job import Job, calibrated, plan_for, runnable
from codeword.math.bins import make_bins
from codeword.math.moments import Moments
from codeword.methods import FixedPoint, Keep, Method, RateAware, as_rows
from codeword.plan import method_line
from codeword.sources import Kind, Source, TensorInfo, open_source

if TYPE_CHECKING:
    import torch

_SAMPLE = 1 << 14  # weights of a tensor that show what compensation adds
_ROUNDS = 3  # of a choice of points and a look at what compensation adds there
_RARE = 4.0  # bits for each codeword that 2**bits stands for: rare ones cost more than the curve says
_POOLS = 130.0  # bytes, of the pools' own tables
_START = 25.0  # bytes of a header before the names
_ENTRY = 35.0  # bytes of a header times the square root of the number of tensors: entries are deflated, and alike

_PROBES = (1 << 12, 1 << 15)  # values of a tensor's rows that are compressed to see how long it takes
_START_SECONDS, _TENSOR_SECONDS = 0.015, 0.0007  # that a plan takes, and each of its tensors, beside their values
_SPACE = 24 << 20  # bytes that work takes whatever its size
_SPACE_OF = {RateAware: 7.0, Keep: 18.0}  # bytes a weight of the largest tensor, at the height of its compression
_SPACE_ELSE = 20.0  # by other methods
_AGAIN = 2.6  # times what one look at the calibration data takes: making the file anew under them


class TensorForecast(msgspec.Struct, frozen=True):
    """What one tensor will be."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    method: str  # as `--method` takes it
    nbytes: float
    bits_per_weight: float
    error: float  # squared error over energy, that of rows relative to their own if the method scales them
    tied_to: str | None = None

    @property
    def sqnr_db(self) -> float | None:
        """The error in decibels; None if there is none."""
        return -10 * math.log10(self.error) if self.error > 0 else None


class Forecast(msgspec.Struct, frozen=True):
    """What a target will come to: predicted, but for what the target and the net say themselves."""

    target: str
    target_nbytes: int
    nbytes: int
    header_nbytes: int
    dense_nbytes: int
    ratio: float
    bits_per_weight: float
    error: float  # mean over tensors of `TensorForecast.error`, of those that have any
    seconds: float  # to compress by this plan, in one process on this machine with nothing else to do
    peak_nbytes: int  # of memory, of the process that does it
    missed: str | None  # why the target cannot be met
    tensors: list[TensorForecast]
    plan: dict[str, Any]  # `Plan.to_dict()`: what `Plan.from_dict` reads


def dry_run(
    model: Any,  # noqa: ANN401
    target: str | float | None = None,
    *,
    data: Iterable[Any] | Dataset | str | None = None,
    net: torch.nn.Module | None = None,
    importance: Importance | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold_norms: bool = True,
    seed: int = 0,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Forecast:
    """The plan that a target leads to, and its predicted bytes, error, time and memory; nothing is compressed.

    Arguments are those of `compress`. Running the plan gives about the bytes predicted; `compress` with the target
    looks for the file that has them. Time is that of running the plan on this machine with nothing else to do: rows of
    tensors are compressed to see how fast it is. Raises what `compress` raises of its arguments.
    """
    held = _peak()
    source = open_source(model)
    module = model if net is None else net
    job = Job(
        target=target,
        plan=None,
        method=None,
        importance=importance,
        anew=None,
        include=include,
        exclude=exclude,
        fold_norms=fold_norms,
        eps=eps_of(module),
        seed=seed,
        workers=1,
        keep_nonfinite=keep_nonfinite,
        metadata=None,
        progress=progress,
    )
    wanted, budget = job.budget(source)
    looking = 0.0
    if data is not None:
        start = time.perf_counter()
        seen = load_data(data) if isinstance(data, str) else data
        told = calibrated(source, runnable(source, module), seen)
        job = replace(job, importance=told.importance, sensitivity=told.sensitivity)
        looking, held = time.perf_counter() - start, _peak()
    folded = job.folded(source)
    own = [info for info in source.infos if info.tied_to is None]
    curves = job.curves(source)
    header = header_nbytes([info.name for info in source.infos])
    looks = {info.name: _Look(folded, info, job.importance or {}, seed) for info in own}
    points, added = dict[str, Point](), dict.fromkeys(looks, NOTHING)
    for _ in range(_ROUNDS):
        known = {info.name: _Stored(curves[info.name], info, added[info.name]) for info in own}
        points = allocate.predicted(known, budget - header)
        added = {name: look.at(points[name].method) for name, look in looks.items()}
    # Costs as errors again, of each tensor relative to itself.
    counts = {name: curve.weight for name, curve in curves.items() if isinstance(curve, Weighed)}
    points = {name: point._replace(cost=point.cost / counts.get(name, 1.0)) for name, point in points.items()}
    nbytes = round(header + sum(point.bits for point in points.values()) / 8)
    dense, size = sum(info.dense_nbytes for info in own), sum(info.size for info in own)
    errors = [point.cost for point in points.values() if point.cost > 0]
    paces = _paces(folded, own, points, job.importance or {}, seed)
    seconds = _START_SECONDS + _TENSOR_SECONDS * len(own)
    for info in own:
        fixed, each = paces.get(type(points[info.name].method), (0.0, 0.0))
        looked = looks[info.name].seconds(points[info.name].method, each)
        seconds += fixed + each * info.size if looked is None else looked
    passes = 1 if data is None else 2
    return Forecast(
        target=wanted.text,
        target_nbytes=budget,
        nbytes=nbytes,
        header_nbytes=round(header),
        dense_nbytes=dense,
        ratio=dense / nbytes,
        bits_per_weight=8 * nbytes / max(size, 1),
        error=float(np.mean(errors)) if errors else 0.0,
        seconds=passes * seconds + (1 + _AGAIN) * looking,
        peak_nbytes=held + _SPACE + round(max((_space(info, points[info.name].method) for info in own), default=0)),
        missed=f"target {wanted.text} is {budget} bytes; the smallest file would have about {nbytes}"
        if nbytes > budget
        else None,
        tensors=[_tensor(info, points) for info in source.infos],
        plan=plan_for(folded, {name: point.method for name, point in points.items()}, seed, wanted.text).to_dict(),
    )


# Bytes and errors


def header_nbytes(names: Sequence[str]) -> float:
    """Bytes of a file that are no tensor's: a deflated header of these names, and the tables of its pools."""
    listed = zlib.compress(b"\0".join(name.encode() for name in names), 9)
    return _START + len(listed) + _ENTRY * math.sqrt(len(names)) + _POOLS


class Added(NamedTuple):
    """What compensation adds to a point of a curve."""

    bits: float  # a weight
    error: float  # times what least squares would leave


NOTHING = Added(0.0, 1.0)


def stored(point: Point, info: TensorInfo, added: Added = NOTHING) -> Point:
    """The point as a file has it, of a point of a curve."""
    if isinstance(point.method, Keep | FixedPoint):
        return point
    rare = min(_RARE * 2.0 ** (point.bits / info.size), info.size)
    return point._replace(bits=point.bits + info.size * added.bits + rare, cost=added.error * point.cost)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A curve of points as a file has them."""

    curve: Curve
    info: TensorInfo
    added: Added

    def at(self, lam: float) -> Point:
        """Of least cost + lam * bits as the curve knows them."""
        return stored(self.curve.at(lam), self.info, self.added)


class _Look:
    """Rows of a tensor, evenly from all, that show what compensation adds under a method."""

    def __init__(self, source: Source, info: TensorInfo, importance: Importance, seed: int) -> None:
        self._source, self._info, self._seed = source, info, seed
        self._cost = importance.get(info.name)
        self._known: dict[Method, Added] = {}
        self._seconds = math.inf  # of the fastest look

    def at(self, method: Method) -> Added:
        """Beside what its codebook was designed to take and to leave."""
        if not isinstance(method, RateAware) or not method.compensate or len(self._info.shape) < 2:
            return NOTHING
        if method not in self._known:
            self._known[method] = self._measured(method)
        return self._known[method]

    def seconds(self, method: Method, each: float) -> float | None:
        """That the tensor takes if a weight takes `each`; None for a method that was not looked at."""
        if method not in self._known:
            return None
        return self._seconds + each * (self._info.size - self._rows[0].size)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, Cost | None]:
        weight = self._source.load(self._info.name)
        every = -(-weight.size // _SAMPLE)
        return weight[::every].copy(), _of_rows(self._cost, every)

    def _measured(self, method: RateAware) -> Added:
        weight, cost = self._rows
        rows = as_rows(weight)
        divisor = method.scales(rows).divisor(len(rows))
        bins = make_bins(rows, divisor, as_rows(cost) if isinstance(cost, np.ndarray) else None)
        found = method.design(bins)
        start = _clock()
        expr = express(weight, method, self._info.name, self._seed, cost)
        code_tensor(self._info.name, self._info.dtype, weight.shape, expr)
        self._seconds = min(self._seconds, _clock() - start)
        codes = next(lookups(expr), None)
        if codes is None or not found.sse > 0 or not bins.energy > 0:
            return NOTHING
        share = np.unique(codes.codes, return_counts=True)[1] / codes.codes.size
        wrong = (decode(expr).reshape(rows.shape) - rows).astype(np.float64)
        if divisor is not None:
            wrong /= divisor[:, None]
        scale = 1.0 if cost is None or isinstance(cost, Moments) else as_rows(cost)
        bits = float(-(share * np.log2(share)).sum()) - found.bits / bins.n
        return Added(bits, float(np.sum(scale * np.square(wrong))) / found.sse)


def _tensor(info: TensorInfo, points: Mapping[str, Point]) -> TensorForecast:
    if info.tied_to is not None:
        return TensorForecast(info.name, info.shape, info.kind, "", 0.0, 0.0, 0.0, info.tied_to)
    point = points[info.name]
    each = point.bits / max(info.size, 1)
    return TensorForecast(info.name, info.shape, info.kind, method_line(point.method), point.bits / 8, each, point.cost)


# Time and memory


def _paces(
    source: Source, infos: Sequence[TensorInfo], points: Mapping[str, Point], importance: Importance, seed: int
) -> dict[type, tuple[float, float]]:
    """Of each method, seconds for any tensor and for each weight, as rows of the largest tensor were seen to take."""
    largest: dict[type, TensorInfo] = {}
    for info in infos:
        kind = type(points[info.name].method)
        if info.size and (kind not in largest or info.size > largest[kind].size):
            largest[kind] = info
    found: dict[type, tuple[float, float]] = {}
    for kind, info in largest.items():
        weight, method = source.load(info.name), points[info.name].method
        timings: list[tuple[int, float]] = []
        for most in _PROBES:
            every = -(-weight.size // most)
            some, cost = (
                (weight[::every], _of_rows(importance.get(info.name), every)) if weight.ndim else (weight, None)
            )
            timings.append((some.size, min(_seconds(some, info, method, seed, cost) for _ in range(3))))
        (few, short), (many, long) = timings
        each = max(long - short, 0.0) / (many - few) if many > few else long / many
        found[kind] = (max(short - each * few, 0.0) if many > few else 0.0, each)
    return found


def _of_rows(cost: Cost | None, every: int) -> Cost | None:
    """The importance of every so many rows of a tensor; moments of groups of rows are left out."""
    if isinstance(cost, np.ndarray):
        return cost[::every]
    return cost if cost is not None and len(cost.second) == 1 else None


def _seconds(weight: np.ndarray, info: TensorInfo, method: Method, seed: int, cost: Cost | None) -> float:
    start = _clock()
    code_tensor(info.name, info.dtype, weight.shape, express(weight, method, info.name, seed, cost))
    return _clock() - start


def _clock() -> float:
    """Seconds that this thread has worked, which does its share of all parallel work; where they are coarse, the time.

    So other work on the machine does not count.
    """
    fine = time.get_clock_info("thread_time").resolution < 1e-4
    return time.thread_time() if fine else time.perf_counter()


def _space(info: TensorInfo, method: Method) -> float:
    return info.size * _SPACE_OF.get(type(method), _SPACE_ELSE)


def _peak() -> int:
    """Bytes of memory that this process has taken at its height; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        pass  # not Linux, where the call below would count the process that started this one too
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
