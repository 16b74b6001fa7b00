"""One dial to a plan: a single lambda trades error against bits in every tensor, and is bisected on real files.

Each tensor has a curve (`codeword.curves`): for a lambda, the method of least cost + lambda * bits. Bits there are
estimates, so `fit` compresses for real: at lambdas of a grid, an eighth of an octave wide, until two neighbours have
the budget between them. From the smaller file single tensors then go to their next lambda, those first whose error
falls most for the bytes that this was seen to take, until the budget is filled. The grid is the same for each target,
so that what was coded for one is met again in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from codeword.artifact import Artifact
from codeword.curves import Curve, Point, is_mixed, settled
from codeword.methods import Keep, Method

TOLERANCE = 0.01  # below the budget: what counts as reached
_GOOD = 0.002  # below the budget: what ends the search early
_MOST_ROUNDS = 64  # files made at all
GRID = 8  # lambdas an octave that files are made at: 0.06 bits a weight from one to the next
OCTAVES = (-60, 14)  # log2 of lambda, from where nothing is worth a bit to where nothing is worth keeping
_STEPS = 256  # of lambda an octave: 0.002 bits a weight
_STRIDE = _STEPS // GRID
_RANGE = (OCTAVES[0] * _STEPS, OCTAVES[1] * _STEPS)


def predicted(curves: Mapping[str, Curve], nbytes: float) -> dict[str, Point]:
    """The point of each tensor at the least lambda whose estimated bytes, of all together, are at most `nbytes`.

    No file is made: what the curves say is all there is to go by.
    """
    lam = _lam(_solve(_estimate(curves), nbytes))
    return {name: curve.at(lam) for name, curve in curves.items()}


def octave_on_grid(curves: Mapping[str, Curve], nbytes: float) -> float:
    """Log2 of the least lambda of the grid whose estimated bytes are at most `nbytes`."""
    return _solve(_estimate(curves), nbytes, _STRIDE) / _STEPS


def _estimate(curves: Mapping[str, Curve]) -> Callable[[int], float]:
    """The bytes of all together at a step, as the curves estimate them."""
    return lambda step: sum(curve.at(_lam(step)).bits for curve in curves.values()) / 8


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
    calm = {name: settled(curve, found.methods[name]) for name, curve in curves.items() if is_mixed(curve)}
    if found.reached or not calm:
        return found
    again = _Search(curves | calm, budget, compress).run()
    return again if again.reached else found


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
