"""What each tensor offers the planner: for a lambda, the method of least cost + lambda * bits.

The cost is the tensor's relative error, squared error over energy (times importance, if known), times how much the
tensor counts: its sensitivity (`codeword.sensitivity`), by data or by the weights of a net with batch norms, else 1,
whatever its size. From that follows that a small layer gets more bits a weight than a large one. Bits are estimates:
the entropy of binned weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, get_args

import msgspec
import numpy as np

from codeword import candidates as others
from codeword.artifact.layout import MAX_POOLED
from codeword.cache import Results
from codeword.candidates import Candidates, Measured
from codeword.errors import PlanError
from codeword.execute import Cost, Importance, Progress, load_checked
from codeword.expr import DTYPES, FLOATS
from codeword.math.bins import Bins, coarser, make_bins
from codeword.math.moments import Moments
from codeword.methods import FixedPoint, Granularity, Keep, Method, Prune, RateAware, Scales, as_rows
from codeword.sensitivity import from_weights, of_biases
from codeword.sources import Source, TensorInfo

_BINS = 1 << 20  # kept of all tensors together for estimates: 40 MB
_BINS_A_TENSOR = (2048, 32768)
_LEAST_CLUSTERED = 4096  # values of a vector worth clustering; matrices always are tried
_MANTISSAS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19)
_VARIANCE = "running_var"  # the last word of the name of a norm's
_FRACTIONS = range(13)
_NORMAL = 0.5 * math.log2(2 * math.pi * math.e)  # bits of a normal distribution of variance 1
_OCTAVE = 0.19  # standard deviation of what is anywhere in an octave, over its mean
_LEAST_BITS = 0.5  # that a value takes, however wide the step
_LEARNING = 1.0  # bits a value that two byte planes of a few hundred values take beyond their entropy, about
_LEAF_BITS = 96  # what another leaf costs in header and coder states, about
_POOLED_BITS = 44  # and a small one, which shares a stream with others
_FINE = 32  # lambdas an octave that other kinds of methods are taken at


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
    """A tensor kept as floats of fewer and fewer bits of mantissa, or as whole numbers of a step if it is short.

    One that is worth clustering has finer choices than steps of a power of two, at no more bits. divisor: a square root
    of it is divided by, as by a variance, so that small values err as dearly as large ones: no steps.
    """

    def __init__(self, weight: np.ndarray, *, short: bool, divisor: bool) -> None:
        width = 8 * weight.itemsize
        sample = weight.reshape(-1)[: 1 << 16].astype(np.float32)
        _, exponents = np.frexp(sample)
        share = np.unique(exponents, return_counts=True)[1] / max(sample.size, 1)
        exponent_bits = float(-(share * np.log2(share)).sum())
        # Rounding to m bits errs by 2**-2m / 12 of the mantissa's unit squared; a mantissa's mean square is 7/3.
        learning = _LEARNING if short else 0.0
        leaf = _POOLED_BITS if weight.size <= MAX_POOLED else _LEAF_BITS
        self._points = [
            Point(Keep(bits), weight.size * (1 + bits + exponent_bits + learning) + leaf, 4.0**-bits / 28)
            for bits in _MANTISSAS
            if 1 + bits + exponent_bits < width
        ]
        self._points.append(Point(Keep(), weight.size * width + leaf, 0.0))
        if short and not divisor and sample.any():
            self._points += _fixed_points(sample.astype(np.float64))

    def at(self, lam: float) -> Point:
        """The cheapest of a handful."""
        return min(self._points, key=lambda point: point.cost + lam * point.bits)


def _fixed_points(values: np.ndarray) -> list[Point]:
    """Steps for values (n,), not all of them 0.

    Their entropy is that of a normal distribution: about 0, or about their mean, which may lie anywhere in an octave of
    that of others that they are coded with.
    """
    square, mean = float(np.mean(values**2)), float(np.mean(values))
    spread = math.sqrt(min(square, square - mean**2 + (_OCTAVE * mean) ** 2))
    found = []
    for bits in _FRACTIONS:
        method = FixedPoint(bits)
        step = method.step(values)
        error = float(np.mean((values - step * np.rint(values / step)) ** 2))
        each = max(math.log2(spread / step) + _NORMAL, _LEAST_BITS)
        found.append(Point(method, values.size * each + _POOLED_BITS, error / square))
    return found


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


def curves_of(
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
    error of a tensor counts, 1 if it is not named; None for what the weights tell of it (`codeword.sensitivity`), which
    in a net without batch norms is something of biases alone. candidates: "all" measures methods of every family too
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
    energies: dict[str, float] = {}  # of vectors
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
            curve: Curve = Fixed(8.0 * weight.nbytes)
            if finite:
                curve = _curve(weight, h, granularity, most_bins, divisor=info.name.endswith(_VARIANCE))
            if candidates == "all" and isinstance(curve, Clustered) and weight.ndim > 1 and weight.size >= others.LEAST:
                curve = _mixed(curve, weight, info, granularity, seed, cost, results)
            found[info.name] = curve
            if finite and weight.ndim > 1:
                norms[info.name] = _energy(weight), weight.size
            elif finite:
                energies[info.name] = _energy(weight)
            del weight  # before the next is loaded: two large tensors at once would be the peak of memory
        else:
            found[info.name] = Fixed(8.0 * info.size * DTYPES[info.dtype].itemsize)
        done += info.size
    if sensitivity is None:
        balanced = any(info.name.endswith(_VARIANCE) for info in source.infos)
        sensitivity = from_weights(norms) if balanced else {}
        sensitivity |= of_biases(norms, energies, sensitivity)
    return {name: Weighed(curve, sensitivity[name]) if name in sensitivity else curve for name, curve in found.items()}


def _energy(weight: np.ndarray) -> float:
    """The sum of squares, in pieces: a float64 copy of a large tensor would be the peak of memory."""
    flat = weight.reshape(-1)
    parts = (flat[at : at + (1 << 20)].astype(np.float64) for at in range(0, flat.size, 1 << 20))
    return sum(float(part @ part) for part in parts)


def _curve(
    weight: np.ndarray, h: np.ndarray | None, granularity: Granularity, most_bins: int, *, divisor: bool
) -> Curve:
    short = weight.ndim < 2 and weight.size < _LEAST_CLUSTERED
    rounded = Rounded(weight, short=short, divisor=divisor)
    if short:
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


def is_mixed(curve: Curve) -> bool:
    """Whether a tensor may go from one kind of method to another."""
    return isinstance(curve.curve if isinstance(curve, Weighed) else curve, Mixed)


def settled(curve: Curve, method: Method) -> Curve:
    """The curve without its jumps from one kind of method to another."""
    if isinstance(curve, Weighed):
        return Weighed(settled(curve.curve, method), curve.weight)
    return curve.settled(method) if isinstance(curve, Mixed) else curve


def _four_digits(value: float) -> float:
    """What a person reads in a plan; one part in ten thousand of lambda moves no file by a byte that matters."""
    return float(f"{value:.4g}")
