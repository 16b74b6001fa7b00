"""One dial to a plan: a single lambda trades error against bits in every tensor, and is bisected on real files.

Each tensor has a curve: for a lambda, the method of least cost + lambda * bits. The cost is the tensor's relative
error, squared error over energy (times importance, if known), times how much the tensor counts: its sensitivity
(`codeword.sensitivity`), by data or by the weights of a net with batch norms, else 1, whatever its size. From that
follows that a small layer gets more bits a weight than a large one.

Curves are estimates (entropy of binned weights), so `fit` compresses for real: at lambdas of a grid, an eighth of an
octave wide, until two neighbours have the budget between them. From the smaller file single tensors then go to their
next lambda, those first whose error falls most for the bytes that this was seen to take, until the budget is filled.
The grid is the same for each target, so that what was coded for one is met again in the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, get_args

import msgspec
import numpy as np

from codeword import candidates as others
from codeword.artifact import Artifact
from codeword.cache import Results
from codeword.candidates import Candidates, Measured
from codeword.errors import PlanError
from codeword.execute import Cost, Importance, Progress, load_checked
from codeword.expr import DTYPES, FLOATS
from codeword.math.bins import Bins, coarser, make_bins
from codeword.math.moments import Moments
from codeword.methods import Granularity, Keep, Method, Prune, RateAware, Scales, as_rows
from codeword.sensitivity import from_weights
from codeword.sources import Source, TensorInfo

TOLERANCE = 0.01  # below the budget: what counts as reached
_GOOD = 0.002  # below the budget: what ends the search early
_MOST_ROUNDS = 64  # files made at all
_BINS = 1 << 20  # kept of all tensors together for estimates: 40 MB
_BINS_A_TENSOR = (2048, 32768)
_LEAST_CLUSTERED = 4096  # values of a vector worth clustering; matrices always are tried
_MANTISSAS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19)
_LEAF_BITS = 96  # what another leaf costs in header and coder states, about
_STEPS = 256  # of lambda an octave: 0.002 bits a weight
_STRIDE = 32  # steps from one lambda of the grid to the next: 0.06 bits a weight
_FINE = 32  # lambdas an octave that other kinds of methods are taken at
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


class Mixed:
    """Rate-aware scalars, or another kind of method where it was measured to be better at some lambda."""

    def __init__(self, scalars: Curve, n: int, references: list[Measured], measured: list[Measured]) -> None:
        self._scalars = scalars
        self._n = n
        self._series: dict[Method, _Series] = {}
        # What scalars take and cost by their curve where they take so many bits in truth: others are put on its scale.
        known = [
            (point.bits, scalars.at(point.method.lam / n))
            for point in references
            if isinstance(point.method, RateAware) and others.is_compensated(point.method)
        ]
        known = sorted((bits, at.bits, math.log2(at.cost)) for bits, at in known if at.cost > 0)
        if not known:
            return
        real, bits, costs = np.array(known).T
        kinds: dict[Method, list[tuple[float, float, float]]] = {}
        better = set[Method]()
        for method, taken, factor in others.rated(references, measured):
            kind, lam = with_lam(method, 1.0), lam_of(method)
            if lam is None:
                continue
            at = float(np.interp(taken, real, bits))
            kinds.setdefault(kind, []).append(
                (math.log2(lam), at, float(np.interp(taken, real, costs)) + math.log2(factor))
            )
            better |= {kind} if factor < 1 else set()
        for kind in (kind for kind in kinds if kind in better):  # in an order that is always the same
            octaves, taken, cost = np.array(sorted(kinds[kind])).T
            self._series[kind] = _Series(kind, n, octaves, taken, cost)

    def at(self, lam: float) -> Point:
        """The best of all."""
        offers = (self._scalars.at(lam), *(series.best(lam) for series in self._series.values()))
        return min(offers, key=lambda point: point.cost + lam * point.bits)

    def settled(self, method: Method) -> Curve:
        """The curve of that method's kind alone, which has no jumps from one kind to another."""
        return self._series.get(with_lam(method, 1.0), self._scalars)


class _Series(NamedTuple):
    """One kind of rate-aware clustering at several lambdas of its own, rising."""

    kind: Method
    n: int
    octaves: np.ndarray
    bits: np.ndarray
    costs: np.ndarray  # logarithms

    def best(self, lam: float) -> Point:
        """Of least cost + lam * bits, at whatever lambda of its own that is, between those measured.

        The two differ where a kind takes an importance into account and the curves of scalars do not.
        """
        octaves = np.arange(math.ceil(_FINE * self.octaves[0]), math.floor(_FINE * self.octaves[-1]) + 1) / _FINE
        bits, costs = (np.interp(octaves, self.octaves, part) for part in (self.bits, self.costs))
        at = int(np.argmin(np.exp2(costs) + lam * bits))
        return Point(with_lam(self.kind, _four_digits(2.0 ** octaves[at])), float(bits[at]), 2.0 ** float(costs[at]))

    def at(self, lam: float) -> Point:
        """At the same lambda; beyond those measured with what the last of them took, for want of a better guess."""
        octave = math.log2(lam * self.n)
        bits, cost = (float(np.interp(octave, self.octaves, part)) for part in (self.bits, self.costs))
        return Point(with_lam(self.kind, _four_digits(lam * self.n)), bits, 2.0**cost)


def lam_of(method: Method) -> float | None:
    """Of rate-aware clustering, the rest of a pruned tensor's included; None for another method."""
    inner = method.then if isinstance(method, Prune) else method
    return inner.lam if isinstance(inner, RateAware) else None


def with_lam(method: Method, lam: float) -> Method:
    """The same kind of rate-aware clustering at another lambda; other methods as they are."""
    if isinstance(method, Prune) and isinstance(method.then, RateAware):
        return msgspec.structs.replace(method, then=msgspec.structs.replace(method.then, lam=lam))
    return msgspec.structs.replace(method, lam=lam) if isinstance(method, RateAware) else method


@dataclass(frozen=True, slots=True)
class Weighed:
    """The curve of a tensor whose relative error counts more than that of others, or less."""

    curve: Curve
    weight: float

    def at(self, lam: float) -> Point:
        """The point of the curve at the lambda that comes to the same."""
        point = self.curve.at(lam / self.weight)
        return point._replace(cost=self.weight * point.cost)


def curves(
    source: Source,
    lossy: set[str],
    *,
    importance: Importance | None = None,
    sensitivity: Mapping[str, float] | None = None,
    keep_nonfinite: bool = False,
    candidates: Candidates = "fast",
    seed: int = 0,
    results: Results | None = None,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """The curve of each tensor that is not tied; those outside `lossy`, and those of integers, are kept as they are.

    One pass over the weights; what stays in memory is a few thousand bins a tensor. sensitivity: by what the relative
    error of a tensor counts, 1 if it is not named; None for what the weights of a net with batch norms tell of it
    (`codeword.sensitivity`), and all alike in other nets. candidates: "all" measures methods of every family too
    (`codeword.candidates`), by this seed; results: where that is looked up and kept. Raises PlanError for other
    candidates.
    """
    if candidates not in get_args(Candidates):
        raise PlanError(f"candidates must be {' or '.join(get_args(Candidates))}, got {candidates!r}")
    # A norm undoes the scale of each output channel, so errors count relative to the channel (methods.md A5).
    normed = any(info.kind == "norm" and info.dtype in FLOATS for info in source.infos)
    granularity: Granularity = "row" if normed else "tensor"
    found: dict[str, Curve] = {}
    norms: dict[str, tuple[float, int]] = {}
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
            curve = _curve(weight, h, granularity, most_bins) if finite else Fixed(8.0 * weight.nbytes)
            if candidates == "all" and isinstance(curve, Clustered) and weight.ndim > 1 and weight.size >= others.LEAST:
                curve = _mixed(curve, weight, info, granularity, seed, cost, results)
            found[info.name] = curve
            if weight.ndim > 1 and finite:
                norms[info.name] = _energy(weight), weight.size
            del weight  # before the next is loaded: two large tensors at once would be the peak of memory
        else:
            found[info.name] = Fixed(8.0 * info.size * DTYPES[info.dtype].itemsize)
        done += info.size
    if sensitivity is None:
        sensitivity = from_weights(norms) if any(info.name.endswith("running_var") for info in source.infos) else {}
    return {name: Weighed(curve, sensitivity[name]) if name in sensitivity else curve for name, curve in found.items()}


def _energy(weight: np.ndarray) -> float:
    """The sum of squares, in pieces: a float64 copy of a large tensor would be the peak of memory."""
    flat = weight.reshape(-1)
    parts = (flat[at : at + (1 << 20)].astype(np.float64) for at in range(0, flat.size, 1 << 20))
    return sum(float(part @ part) for part in parts)


def _curve(weight: np.ndarray, h: np.ndarray | None, granularity: Granularity, most_bins: int) -> Curve:
    rounded = Rounded(weight)
    if weight.ndim < 2 and weight.size < _LEAST_CLUSTERED:
        return rounded
    rows = as_rows(weight)
    scales = RateAware(1.0, granularity=granularity).scales(rows)
    bins = make_bins(rows, scales.divisor(len(rows)), None if h is None else as_rows(h))
    return Clustered(coarser(bins, most_bins), scales, granularity, rounded)


def _mixed(
    curve: Clustered,
    weight: np.ndarray,
    info: TensorInfo,
    granularity: Granularity,
    seed: int,
    cost: Cost | None,
    results: Results | None,
) -> Curve:
    """The curve with other families, measured or as they were found before."""
    found = others.families(weight.shape, granularity).values()
    parts = [others.scalars(granularity), [method for methods in found for method in methods]]
    measured: list[list[Measured]] = []
    for methods in parts:
        facts = {"methods": methods, "granularity": granularity, "seed": seed}
        key = None if results is None else results.key("candidates", info, weight, **facts)
        known = None if results is None or key is None else results.get(key, list[Measured])
        if known is None:
            known = others.measure(weight, methods, granularity, info.name, seed, cost)
            if results is not None and key is not None:
                results.put(key, known, weight.size)
        measured.append(known)
    return Mixed(curve, weight.size, *measured)


def predicted(curves: Mapping[str, Curve], nbytes: float) -> dict[str, Point]:
    """The point of each tensor at the least lambda whose estimated bytes, of all together, are at most `nbytes`.

    No file is made: what the curves say is all there is to go by.
    """
    lam = _lam(_solve(lambda step: sum(curve.at(_lam(step)).bits for curve in curves.values()) / 8, nbytes))
    return {name: curve.at(lam) for name, curve in curves.items()}


@dataclass(frozen=True, slots=True)
class Fit:
    """What the search ended with."""

    artifact: Artifact
    methods: dict[str, Method]
    reached: bool  # within TOLERANCE below the budget


def fit(curves: dict[str, Curve], budget: int, compress: Callable[[dict[str, Method]], Artifact]) -> Fit:
    """The methods whose file comes closest to `budget` bytes from below, within TOLERANCE if it can be done.

    If even the smallest file is above the budget that file is the result; if the lossless one is not, the lossless.
    compress: makes files that differ in a few tensors, one after another, and had better know the others from before.
    """
    found = _Search(curves, budget, compress).run()
    # Where a tensor goes over to another kind of method its size jumps: then let each keep to its kind.
    settled = {name: _settled(curve, found.methods[name]) for name, curve in curves.items() if _is_mixed(curve)}
    if found.reached or not settled:
        return found
    again = _Search(curves | settled, budget, compress).run()
    return again if again.reached else found


def _is_mixed(curve: Curve) -> bool:
    return isinstance(curve.curve if isinstance(curve, Weighed) else curve, Mixed)


def _settled(curve: Curve, method: Method) -> Curve:
    """The curve without its jumps from one kind of method to another."""
    if isinstance(curve, Weighed):
        return Weighed(_settled(curve.curve, method), curve.weight)
    return curve.settled(method) if isinstance(curve, Mixed) else curve


class _Made(NamedTuple):
    """A file that was made: the step of each tensor, and what it takes in all and for each."""

    steps: dict[str, int]
    nbytes: int
    tensors: dict[str, int]


class _Search:
    """Two files of neighbouring lambdas around the budget, then the larger one's points as far as they fit."""

    def __init__(
        self, curves: dict[str, Curve], budget: int, compress: Callable[[dict[str, Method]], Artifact]
    ) -> None:
        self._curves = curves
        self._budget = budget
        self._compress = compress
        self._best: Fit | None = None
        self._sizes: dict[tuple[Method, ...], tuple[int, dict[str, int]]] = {}  # of all files made, not their bytes
        self._points: dict[tuple[str, int], Point] = {}

    def run(self) -> Fit:
        # Values with a pattern take less than their dtype's width: see first where the budget may be enough for them.
        found = self._lossless() if 2 * self._budget >= self._estimate(_RANGE[0]) else None
        if found is not None:
            return found
        under = self._bracket()
        if under is not None:
            self._fill(under)
        # A pattern can make the lossless file the smaller one too.
        found = self._lossless() if self._best is None or not self._best.reached else None
        best = found or self._best
        if best is None:
            raise AssertionError("a search made no file")  # pragma: no cover - a bracket is at least one
        return best

    def _point(self, name: str, step: int) -> Point:
        if (name, step) not in self._points:
            self._points[name, step] = self._curves[name].at(_lam(step))
        return self._points[name, step]

    def _estimate(self, step: int) -> float:
        """Bytes of all tensors at one lambda."""
        return sum(self._point(name, step).bits for name in self._curves) / 8

    def _make(self, methods: dict[str, Method]) -> tuple[int, dict[str, int]]:
        key = tuple(methods.values())
        if key not in self._sizes:
            artifact = self._compress(methods)
            reached = (1 - TOLERANCE) * self._budget <= artifact.nbytes <= self._budget
            self._best = _better(self._best, Fit(artifact, methods, reached), self._budget)
            self._sizes[key] = artifact.nbytes, {name: artifact.entries[name].nbytes for name in methods}
        return self._sizes[key]

    def _made(self, steps: dict[str, int]) -> _Made:
        return _Made(steps, *self._make({name: self._point(name, step).method for name, step in steps.items()}))

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
        if self._best is None or len(self._sizes) >= _MOST_ROUNDS:
            return self._best is not None
        return (1 - _GOOD) * self._budget <= self._best.artifact.nbytes <= self._budget

    def _bracket(self) -> _Made | None:
        """The file of the least lambda on the grid within the budget; None if there is none."""
        first, last = _RANGE  # what may be the least lambda within the budget
        under: _Made | None = None
        step = _solve(self._estimate, self._budget, _STRIDE)
        while first <= last:
            made = self._made(dict.fromkeys(self._curves, step))
            if made.nbytes <= self._budget:
                under, last = made, step - _STRIDE
            else:
                first = step + _STRIDE
            if self._is_enough():
                break
            # Estimates are off by a factor that hardly depends on lambda.
            step = _solve(self._estimate, self._budget * self._estimate(step) / max(made.nbytes, 1), _STRIDE)
            if made.nbytes <= self._budget:
                step -= _STRIDE  # to see that this is too large
            step = min(max(step, first), last)
        return under

    def _fill(self, made: _Made) -> None:
        """From a file below the budget to larger ones: tensors go to smaller lambdas, together while they can.

        One whose next step is too large for what is left takes half of it, and so on, and stays where it is then.
        """
        free, reach = set(self._curves), _STRIDE
        while free and not self._is_enough():
            moved, stride = set[str](), reach
            while stride and not self._is_enough():
                made, fitting = self._advance(made, sorted(free - moved), stride)
                if stride == reach:
                    moved = fitting
                stride //= 2 if moved != free else stride + 1
            reach = 2 * reach if moved == free else _STRIDE
            free = {name for name in moved if made.steps[name] - reach >= _RANGE[0]}

    def _advance(self, made: _Made, names: list[str], stride: int) -> tuple[_Made, set[str]]:
        """The file in which those of `names` that fit have gone a stride on, and which those are.

        First come those whose error falls most for their bytes, which are those of a file that has all of them.
        """
        ahead = {name: made.steps[name] - stride for name in names}
        probe = self._made(made.steps | ahead)
        if probe.nbytes <= self._budget:
            return probe, set(names)
        now, then = ({name: self._point(name, steps[name]) for name in names} for steps in (made.steps, ahead))
        more = {name: probe.tensors[name] - made.tensors[name] for name in names}
        for name in names:  # what lies in common with others shows in no tensor's size
            if not more[name] and now[name].method != then[name].method:
                more[name] = round((then[name].bits - now[name].bits) / 8)
        gain = {name: (now[name].cost - then[name].cost) / max(more[name], 1e-9) for name in names}
        chosen: list[str] = []
        room = self._budget - made.nbytes
        for name in sorted(names, key=lambda name: -gain[name]):
            if more[name] <= room:
                chosen.append(name)
                room -= max(more[name], 0)
        while any(more[name] for name in chosen):
            probe = self._made(made.steps | {name: ahead[name] for name in chosen})
            if probe.nbytes <= self._budget:
                return probe, set(chosen)
            above = probe.nbytes - self._budget  # a file is not quite the sum of its tensors
            enough = [name for name in chosen if more[name] >= above]
            chosen.remove(min(enough or chosen, key=lambda name: (more[name] <= 0, gain[name])))
        return made, set()


def _better(best: Fit | None, new: Fit, budget: int) -> Fit:
    """The larger of two files within the budget, the smaller of two above it."""
    if best is None:
        return new
    fits = [fit for fit in (best, new) if fit.artifact.nbytes <= budget]
    if fits:
        return max(fits, key=lambda fit: fit.artifact.nbytes)
    return min((best, new), key=lambda fit: fit.artifact.nbytes)


def _solve(nbytes_at: Callable[[int], float], goal: float, stride: int = 1) -> int:
    """The step of the least lambda whose estimated bytes are within the goal: a bracket from a guess, then halved.

    Only steps that the stride divides: a grid that is the same for each target, so that what was coded for one serves
    another.
    """
    first, last = _RANGE
    reach = 2 * _STEPS
    low = high = -20 * _STEPS  # about 3 bits a weight in a net of a million
    if nbytes_at(low) <= goal:
        while high == low or nbytes_at(low) <= goal:
            high, low, reach = low, max(low - reach, first), 2 * reach
            if high == first:
                return first
    else:
        while high == low or nbytes_at(high) > goal:
            low, high, reach = high, min(high + reach, last), 2 * reach
            if low == last:
                return last
    while high - low > stride:
        middle = (low + high) // (2 * stride) * stride
        if nbytes_at(middle) <= goal:
            high = middle
        else:
            low = middle
    return high


def _lam(step: int) -> float:
    return 2.0 ** (step / _STEPS)


def _four_digits(value: float) -> float:
    """What a person reads in a plan; one part in ten thousand of lambda moves no file by a byte that matters."""
    return float(f"{value:.4g}")
