"""One dial to a plan: a single lambda trades error against bits in every tensor, and is bisected on real files.

Each tensor has a curve: for a lambda, the method of least cost + lambda * bits. The cost is the tensor's relative
error, squared error over energy (times importance, if known), and it counts the same in every tensor whatever its size:
noise of one relative size at any layer disturbs what follows about equally, which is all that is known without data.
From it follows that a small layer gets more bits a weight than a large one.

Curves are estimates (entropy of binned weights), so `fit` compresses for real, compares the file with the budget and
corrects the estimate's goal, until the file is within TOLERANCE of the budget and not above it. Where the size of one
tensor jumps across the budget (its best codebook changes), that tensor takes the smaller side and the others the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from codeword.artifact import Artifact
from codeword.execute import Importance, Progress, load_checked
from codeword.expr import DTYPES, FLOATS
from codeword.math.bins import Bins, coarser, make_bins
from codeword.math.moments import Moments
from codeword.methods import Granularity, Keep, Method, RateAware, Scales, as_rows
from codeword.sources import Source

TOLERANCE = 0.02  # below the budget: what counts as reached
_GOOD = 0.005  # below the budget: what ends the search early
_AIM = 0.9975  # of the budget: what the next file is aimed at
_ROUNDS = 8  # files made before one within TOLERANCE will do
_MOST_ROUNDS = 32  # files made at all
_BINS = 1 << 20  # kept of all tensors together for estimates: 40 MB
_BINS_A_TENSOR = (2048, 32768)
_LEAST_CLUSTERED = 4096  # values of a vector worth clustering; matrices always are tried
_MANTISSAS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19)
_LEAF_BITS = 96  # what another leaf costs in header and coder states, about
_STEPS = 256  # of lambda an octave: 0.002 bits a weight
_RANGE = (-60 * _STEPS, 14 * _STEPS)  # from where nothing is worth a bit to where nothing is worth keeping


class Point(NamedTuple):
    """One way to store a tensor."""

    method: Method
    bits: float
    cost: float


class Curve(Protocol):
    """What a tensor offers for each lambda."""

    def at(self, lam: float) -> Point:
        """The point of least cost + lam * bits."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """A tensor that is kept as it is."""

    bits: float

    def at(self, lam: float) -> Point:
        """The only point there is."""
        del lam
        return Point(Keep(), self.bits, 0.0)


class Rounded:
    """A tensor kept as floats of fewer and fewer bits of mantissa."""

    def __init__(self, weight: np.ndarray) -> None:
        width = 8 * weight.itemsize
        sample = weight.reshape(-1)[: 1 << 16].astype(np.float32)
        _, exponents = np.frexp(sample)
        share = np.unique(exponents, return_counts=True)[1] / max(sample.size, 1)
        exponent_bits = float(-(share * np.log2(share)).sum())
        # Rounding to m bits errs by 2**-2m / 12 of the mantissa's unit squared; a mantissa's mean square is 7/3.
        self._points = [
            Point(Keep(bits), weight.size * (1 + bits + exponent_bits) + _LEAF_BITS, 4.0**-bits / 28)
            for bits in _MANTISSAS
            if 1 + bits + exponent_bits < width
        ]
        self._points.append(Point(Keep(), weight.size * width + _LEAF_BITS, 0.0))

    def at(self, lam: float) -> Point:
        """The cheapest of a handful."""
        return min(self._points, key=lambda point: point.cost + lam * point.bits)


class Clustered:
    """A tensor clustered rate-aware, or rounded where so many bits are wanted that clustering has no more to offer."""

    def __init__(self, bins: Bins, scales: Scales, granularity: Granularity, rounded: Rounded) -> None:
        self._bins = bins
        self._granularity: Granularity = granularity
        self._rounded = rounded
        self._side_bits = 2 * _LEAF_BITS + (0 if scales.relative is None else _LEAF_BITS / 2 + 5 * scales.relative.size)

    def at(self, lam: float) -> Point:
        """The better of both kinds. Clustering is solved at lam itself, not read off a table."""
        rounded = self._rounded.at(lam)
        n, energy = self._bins.n, self._bins.energy
        if not energy > 0:
            return Point(RateAware(1.0, granularity=self._granularity), self._side_bits, 0.0)
        method = RateAware(_four_digits(lam * n), granularity=self._granularity)
        found = method.design(self._bins)
        # Half a logarithm a codeword: what an adaptive coder pays to learn a frequency (Rissanen 1984).
        learning = (len(found.codewords) - 1) * 0.5 * math.log2(max(n / len(found.codewords), 2))
        clustered = Point(method, found.bits + learning + self._side_bits, found.sse / energy)
        return min(clustered, rounded, key=lambda point: point.cost + lam * point.bits)


def curves(
    source: Source,
    lossy: set[str],
    *,
    importance: Importance | None = None,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """The curve of each tensor that is not tied; those outside `lossy`, and those of integers, are kept as they are.

    One pass over the weights; what stays in memory is a few thousand bins a tensor.
    """
    # A norm undoes the scale of each output channel, so errors count relative to the channel (methods.md A5).
    normed = any(info.kind == "norm" and info.dtype in FLOATS for info in source.infos)
    granularity: Granularity = "row" if normed else "tensor"
    found: dict[str, Curve] = {}
    own = [info for info in source.infos if info.tied_to is None]
    most_bins = min(max(_BINS // max(len(own), 1), _BINS_A_TENSOR[0]), _BINS_A_TENSOR[1])
    total, done = sum(info.size for info in own), 0
    for info in own:
        if progress is not None:
            progress(done, total, info.name)
        if info.name in lossy and info.dtype in FLOATS and info.size:
            weight, finite = load_checked(source, info, keep_nonfinite=keep_nonfinite)
            cost = (importance or {}).get(info.name)
            # Which weights matter is one thing, that their errors cancel another: the estimate is as without data.
            h = None if isinstance(cost, Moments) else cost
            found[info.name] = _curve(weight, h, granularity, most_bins) if finite else Fixed(8.0 * weight.nbytes)
            del weight  # before the next is loaded: two large tensors at once would be the peak of memory
        else:
            found[info.name] = Fixed(8.0 * info.size * DTYPES[info.dtype].itemsize)
        done += info.size
    return found


def _curve(weight: np.ndarray, h: np.ndarray | None, granularity: Granularity, most_bins: int) -> Curve:
    rounded = Rounded(weight)
    if weight.ndim < 2 and weight.size < _LEAST_CLUSTERED:
        return rounded
    rows = as_rows(weight)
    scales = RateAware(1.0, granularity=granularity).scales(rows)
    bins = make_bins(rows, scales.divisor(len(rows)), None if h is None else as_rows(h))
    return Clustered(coarser(bins, most_bins), scales, granularity, rounded)


def predicted(curves: Mapping[str, Curve], nbytes: float) -> dict[str, Point]:
    """The point of each tensor at the least lambda whose estimated bytes, of all together, are at most `nbytes`.

    No file is made: what the curves say is all there is to go by.
    """
    lam = _lam(_solve(curves, nbytes))
    return {name: curve.at(lam) for name, curve in curves.items()}


@dataclass(frozen=True, slots=True)
class Fit:
    """What the bisection ended with."""

    artifact: Artifact
    methods: dict[str, Method]
    reached: bool  # within TOLERANCE below the budget


def fit(curves: dict[str, Curve], budget: int, compress: Callable[[dict[str, Method]], Artifact]) -> Fit:
    """The methods whose file comes closest to `budget` bytes from below, within TOLERANCE if it can be done.

    If even the smallest file is above the budget that file is the result; if the lossless one is not, the lossless.
    """
    return _Search(curves, budget, compress).run()


class _Made(NamedTuple):
    """What a file took that was made for a lambda, in all and for each tensor, and what had been expected."""

    step: int
    points: dict[str, Point]
    nbytes: int
    tensors: dict[str, int]


class _Search:
    """A bisection on files, where estimates choose which file to make next."""

    def __init__(
        self, curves: dict[str, Curve], budget: int, compress: Callable[[dict[str, Method]], Artifact]
    ) -> None:
        self._curves = curves
        self._budget = budget
        self._compress = compress
        self._best: Fit | None = None
        self._sizes: dict[tuple[Method, ...], tuple[int, dict[str, int]]] = {}  # of all files made, not their bytes
        self._pinned: dict[str, Point] = {}  # tensors that are settled

    def run(self) -> Fit:
        # Values with a pattern take less than their dtype's width: see first where the budget may be enough for them.
        raw = sum(curve.at(_lam(_RANGE[0])).bits for curve in self._curves.values()) / 8
        found = self._lossless() if 2 * self._budget >= raw else None
        if found is not None:
            return found
        under: _Made | None = None
        over: _Made | None = None
        before: _Made | None = None
        made: _Made | None = None
        step: int | None = _solve(self._curves, _AIM * self._budget)
        while step is not None:
            before, made = made, self._make_for(step)
            if made.nbytes <= self._budget:
                under = made
            else:
                over = made
            if self._is_enough():
                break
            if under is not None and over is not None and under.step - over.step < 2:
                if not self._pin(under, over):
                    break
                over = before = None
            step = self._next(made, before, under, over)
        # A pattern can make the lossless file the smaller one too.
        found = self._lossless() if self._best is None or not self._best.reached else None
        best = found or self._best
        if best is None:
            raise AssertionError("a search made no file")  # pragma: no cover - the loop runs once at least
        return best

    def _make(self, methods: dict[str, Method]) -> tuple[int, dict[str, int]]:
        key = tuple(methods.values())
        if key not in self._sizes:
            artifact = self._compress(methods)
            reached = (1 - TOLERANCE) * self._budget <= artifact.nbytes <= self._budget
            self._best = _better(self._best, Fit(artifact, methods, reached), self._budget)
            self._sizes[key] = artifact.nbytes, {name: artifact.entries[name].nbytes for name in methods}
        return self._sizes[key]

    def _make_for(self, step: int) -> _Made:
        points = {name: self._pinned.get(name) or curve.at(_lam(step)) for name, curve in self._curves.items()}
        return _Made(step, points, *self._make({name: point.method for name, point in points.items()}))

    def _lossless(self) -> Fit | None:
        """The lossless file, if it is within the budget: nothing better can be found then."""
        methods: dict[str, Method] = {name: Keep() for name in self._curves}
        if self._make(methods)[0] > self._budget:
            return None
        if self._best is not None and self._best.methods == methods:
            return self._best
        artifact = self._compress(methods)
        return Fit(artifact, methods, (1 - TOLERANCE) * self._budget <= artifact.nbytes)

    def _is_enough(self) -> bool:
        best, rounds = self._best, len(self._sizes)
        if best is None or rounds >= _MOST_ROUNDS:
            return best is not None
        close = (1 - _GOOD) * self._budget <= best.artifact.nbytes <= self._budget
        return close or (best.reached and rounds >= _ROUNDS)

    def _pin(self, under: _Made, over: _Made) -> bool:
        """Settle the tensor that jumps most between two files of neighbouring lambdas; False if none does."""
        jumps = {name: over.tensors[name] - under.tensors[name] for name in self._curves if name not in self._pinned}
        name = max(jumps, key=lambda name: jumps[name], default=None)
        if name is None or jumps[name] <= 0:
            return False
        self._pinned[name] = under.points[name]
        return True

    def _next(self, made: _Made, before: _Made | None, under: _Made | None, over: _Made | None) -> int | None:
        """The lambda to try next, between those of two files or beyond that of one; None if there is no other."""
        first = _RANGE[0] if over is None else over.step + 1
        last = _RANGE[1] if under is None else under.step - 1
        if first > last:
            return None
        if (
            before is not None
            and (step := _secant(before, made, _AIM * self._budget)) is not None
            and first <= step <= last
        ):
            return step
        free = {name: curve for name, curve in self._curves.items() if name not in self._pinned}
        # Estimates are off by a factor that hardly depends on lambda, and know nothing of the rest of the file.
        taken = sum(made.tensors[name] for name in free)
        wanted = _AIM * self._budget - (made.nbytes - taken)
        goal = wanted / max(taken, 1) * sum(made.points[name].bits for name in free) / 8
        step = _solve(free, goal)
        if first <= step <= last:
            return step
        if under is not None and over is not None:
            return (first + last) // 2
        reach = _STEPS << min(len(self._sizes) // 2, 5)
        return max(first, last - reach) if over is None else min(last, first + reach)


def _secant(before: _Made, made: _Made, goal: float) -> int | None:
    """Where the line through two files, log bytes over log lambda, reaches the goal; None if it does not fall."""
    slope = math.log(made.nbytes / before.nbytes) / (made.step - before.step) if made.step != before.step else 0.0
    return round(made.step + math.log(goal / made.nbytes) / slope) if slope < 0 else None


def _better(best: Fit | None, new: Fit, budget: int) -> Fit:
    """The larger of two files within the budget, the smaller of two above it."""
    if best is None:
        return new
    fits = [fit for fit in (best, new) if fit.artifact.nbytes <= budget]
    if fits:
        return max(fits, key=lambda fit: fit.artifact.nbytes)
    return min((best, new), key=lambda fit: fit.artifact.nbytes)


def _solve(curves: Mapping[str, Curve], goal: float) -> int:
    """The step of the least lambda whose estimated bytes are within the goal: a bracket from a guess, then halved."""

    def within(step: int) -> bool:
        return sum(curve.at(_lam(step)).bits for curve in curves.values()) / 8 <= goal

    first, last = _RANGE
    reach = 2 * _STEPS
    low = high = -20 * _STEPS  # about 3 bits a weight in a net of a million
    if within(low):
        while high == low or within(low):
            high, low, reach = low, max(low - reach, first), 2 * reach
            if high == first:
                return first
    else:
        while high == low or not within(high):
            low, high, reach = high, min(high + reach, last), 2 * reach
            if low == last:
                return last
    while high - low > 1:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle
    return high


def _lam(step: int) -> float:
    return 2.0 ** (step / _STEPS)


def _four_digits(value: float) -> float:
    """What a person reads in a plan; one part in ten thousand of lambda moves no file by a byte that matters."""
    return float(f"{value:.4g}")
