"""`max_drop`: the smallest file that costs at most so many points of accuracy, found by measuring few.

A file is made for one lambda (see `allocate`), and its net scored beside the uncompressed one on the same examples.
The drop grows about as a power of lambda, so a bracket is narrowed by lines through log drop over log lambda, until its
ends differ by 2 % in bytes or 8 nets were scored. That search looks at up to 5,000 examples; what it found is checked
on all there are, and a larger file is taken as long as those say no.

What is measured is a difference of two nets on the same n examples, of which b are right before and wrong after and c
the other way round; all others cancel. The drop is (b - c) / n, its interval that of Bonett & Price (2012, Adjusted
Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data): one example is added to b and
to c and two to n, so that no changed example does not mean no doubt, as it does without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np

from codeword.allocate import GRID, OCTAVES, octave_on_grid
from codeword.artifact import Artifact
from codeword.calibrate import spread
from codeword.curves import Curve
from codeword.data import Dataset
from codeword.errors import DataError, TargetError
from codeword.evaluate import eval_mode, hits
from codeword.methods import Keep, Method, is_lossless

if TYPE_CHECKING:
    from torch import nn

_GLANCE = 5_000  # examples that the search looks at
_CLOSE = 0.02  # of bytes, between the ends of a bracket: near enough
_SEARCHES = 8  # nets scored at most while searching
_CHECKS = 4  # nets scored at most on all examples
_LEAST_STEP = 2.0**-8  # octaves of lambda
_FIRST_RATIO = 10  # of the first file, about
_REACH = (0.5, 3.0)  # of lambda, from the first file to the second; then up to twice as many each time
_FLOOR = 2.0**-6  # of the most: drops below it are noise, and have a logarithm of their own choosing
_STEP_BACK = 0.125  # octaves of lambda at least, after a check that failed; four times that after each other
_SPARE = 0.95  # of the most: what a step back is aimed at
_Z = 1.959964  # of the normal distribution: 95 % lie within


class Loss(NamedTuple):
    """Points of accuracy lost, and between which bounds that is with 95 % confidence, where it can be told."""

    drop: float
    low: float | None = None
    high: float | None = None


class Trial(msgspec.Struct, frozen=True):
    """A file that was measured."""

    nbytes: int
    drop: float
    examples: int | None  # None where a function of the user's scores
    check: bool  # on all examples, not while searching


class Measured(msgspec.Struct, frozen=True):
    """What a file made to a largest drop was measured to lose. JSON-able: `msgspec.to_builtins(measured)`.

    Accuracies in percent, drops in points, or in what a function of the user's returns.
    """

    most: float  # what was asked for
    dense: float  # accuracy of the uncompressed net, on all examples
    drop: float  # on all examples
    low: float | None  # bounds of the drop with 95 % confidence; None where a function of the user's scores
    high: float | None
    examples: int | None  # all that were scored
    search_examples: int | None  # those of them that the search looked at
    trials: list[Trial]  # in order; the uncompressed net is scored once more
    note: str | None  # where the answer is an end of the scale


class Judge(Protocol):
    """Says what a file loses against the uncompressed net."""

    dense: float
    examples: int | None
    search_examples: int | None

    def glance(self, artifact: Artifact) -> Loss:
        """On the examples of the search."""
        ...

    def check(self, artifact: Artifact) -> Loss:
        """On all."""
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many points, and who measures them."""

    most: float
    judge: Judge
    on_trial: Callable[[Trial], None] | None = None


class Found(NamedTuple):
    """The file, how each tensor was made, and what was measured."""

    artifact: Artifact
    methods: dict[str, Method]
    measured: Measured


def check_most(most: float) -> float:
    """The largest drop, checked. Raises TargetError."""
    if type(most) not in (int, float) or not 0 <= most < 100:
        raise TargetError(
            f"max_drop must be a number of points of accuracy from 0 to below 100, 0.5 for instance, got {most!r}"
        )
    return float(most)


def paired(before: np.ndarray, after: np.ndarray) -> Loss:
    """What is lost between two nets that are right (n,) bool on the same examples."""
    n, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    shift = (lost - won) / (n + 2)
    half = _Z * math.sqrt(((lost + won + 2) / (n + 2) - shift**2) / (n + 2))
    return Loss(100 * (lost - won) / n, 100 * max(shift - half, -1), 100 * min(shift + half, 1))


class Labelled:
    """Top-1 on labelled examples. Those that errors were made to cancel for are left out where enough others remain."""

    def __init__(self, net: nn.Module, data: Dataset, calibrated: bool) -> None:
        seen = spread(len(data)) if calibrated else np.arange(0)
        rest = np.setdiff1d(np.arange(len(data)), seen)
        self._places = rest if len(rest) >= len(seen) else np.arange(len(data))
        self._data, self._coded = data, copy.deepcopy(net)
        self._right = hits(net, data)
        self.dense = 100 * float(self._right[self._places].mean())
        self.examples: int | None = len(self._places)
        self._glanced = self._places[spread(len(self._places), _GLANCE)]
        self.search_examples: int | None = len(self._glanced)
        self._part = Dataset(data.name, data.x[self._glanced], data.y[self._glanced])

    def glance(self, artifact: Artifact) -> Loss:
        """On the examples of the search."""
        return paired(self._right[self._glanced], hits(_loaded(self._coded, artifact), self._part, nan_is_wrong=True))

    def check(self, artifact: Artifact) -> Loss:
        """On all."""
        after = hits(_loaded(self._coded, artifact), self._data, nan_is_wrong=True)
        return paired(self._right[self._places], after[self._places])


class Scored:
    """A function of the user's, higher being better. NaN of a compressed net is as bad as can be."""

    examples: int | None = None
    search_examples: int | None = None

    def __init__(self, net: nn.Module, score: Callable[[nn.Module], float]) -> None:
        self._net, self._score = net, score
        self.dense = self._of(copy.deepcopy(net))
        if not math.isfinite(self.dense):
            raise DataError(
                f"score gives {self.dense} for the uncompressed net; it must be a number, higher for better"
            )

    def glance(self, artifact: Artifact) -> Loss:
        """What it says."""
        drop = self.dense - self._of(_loaded(copy.deepcopy(self._net), artifact))
        return Loss(math.inf if math.isnan(drop) else drop)

    check = glance

    def _of(self, net: nn.Module) -> float:
        import torch

        with eval_mode(net), torch.no_grad():
            value = self._score(net)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"score must return a number, higher for better, got {value!r}") from None


def _loaded(net: nn.Module, artifact: Artifact) -> nn.Module:
    from codeword.nn import load_into

    load_into(net, artifact)
    return net


def smallest(curves: Mapping[str, Curve], limit: Limit, make: Callable[[dict[str, Method]], Artifact]) -> Found:
    """The smallest file found that loses at most limit.most; the lossless one if no other does."""
    return _Search(curves, limit, make).run()


class _Made(NamedTuple):
    at: float  # log2 of lambda
    methods: dict[str, Method]
    artifact: Artifact
    loss: Loss


class _Search:
    def __init__(
        self, curves: Mapping[str, Curve], limit: Limit, make: Callable[[dict[str, Method]], Artifact]
    ) -> None:
        self._curves, self._most, self._judge, self._tell = curves, limit.most, limit.judge, limit.on_trial
        self._make = make
        self._trials: list[Trial] = []
        self._known: dict[tuple[Method, ...], Loss] = {}

    def run(self) -> Found:
        """Narrow the bracket, check what was found, and see that the lossless file is not the better one."""
        under, over = self._bracket()
        made = None if under is None else self._checked(under, over)
        note = "even the smallest file there is loses no more" if made is not None and made.at == OCTAVES[1] else None
        raw = sum(curve.at(2.0 ** OCTAVES[0]).bits for curve in self._curves.values()) / 8
        if made is None or 2 * made.artifact.nbytes >= raw:  # values with a pattern take less than their width
            lossless = self._made(OCTAVES[0], dict.fromkeys(self._curves, Keep()))
            if made is None or lossless.artifact.nbytes <= made.artifact.nbytes:
                made, note = lossless, "no smaller file loses as little: this one is lossless"
        return Found(made.artifact, made.methods, self._measured(made.loss, note))

    def _bracket(self) -> tuple[_Made | None, _Made | None]:
        """The file of most lambda that loses little enough and that of least which does not, as far as found."""
        under: _Made | None = None
        over: _Made | None = None
        before: bool | None = None
        at, most = self._start(), _REACH[1]
        while at is not None and len(self._trials) < _SEARCHES:
            made = self._glanced(self._made(at))
            within = made.loss.drop <= self._most
            under, over = (made, over) if within else (under, made)
            if under is not None and over is not None:
                at = self._between(under, over, again=within == before)
            else:
                most = 2 * most if within == before else most
                reach = self._octaves(made.loss.drop, most)
                at = min(max(made.at + (reach if within else -reach), OCTAVES[0]), OCTAVES[1])
                at = None if at == made.at else at
            before = within
        return under, over

    def _glanced(self, made: _Made) -> _Made:
        """With its loss on the examples of the search, which is measured once."""
        key = tuple(made.methods.values())
        if key not in self._known:
            lossless = is_lossless(made.methods.values())
            self._known[key] = (
                made.loss if lossless else self._told(made, self._judge.glance(made.artifact), check=False)
            )
        return made._replace(loss=self._known[key])

    def _start(self) -> float:
        """Log2 of the lambda whose file is a tenth of the weights by the curves' own estimate, on the grid."""
        most = sum(curve.at(2.0 ** OCTAVES[0]).bits for curve in self._curves.values()) / 8
        return octave_on_grid(self._curves, most / _FIRST_RATIO)

    def _octaves(self, drop: float, most: float) -> float:
        """How far lambda is off, if drops are in proportion to it, and no farther than `most`."""
        if not self._most or drop == math.inf:
            return most
        return min(max(abs(math.log2(self._most / max(drop, _FLOOR * self._most))), _REACH[0]), most)

    def _between(self, under: _Made, over: _Made, *, again: bool) -> float | None:
        """Where to look within a bracket; None if its ends are near enough. again: the same end moved as before."""
        if under.artifact.nbytes <= (1 + _CLOSE) * over.artifact.nbytes or over.at - under.at < _LEAST_STEP:
            return None
        share = 0.5
        if not again and self._most and over.loss.drop < math.inf:
            least = max(under.loss.drop, _FLOOR * self._most)
            share = math.log(self._most / least) / math.log(over.loss.drop / least)
        return under.at + min(max(share, 0.15), 0.85) * (over.at - under.at)

    def _checked(self, made: _Made, over: _Made | None) -> _Made | None:
        """The file, or the first of larger and larger ones, that holds on all examples; None if none did."""
        if self._judge.examples == self._judge.search_examples:
            return made
        slope = self._slope(made, over)
        step = _STEP_BACK
        for turn in range(_CHECKS):
            if turn:
                aim = _SPARE * self._most
                off = math.log2(made.loss.drop / aim) if aim and made.loss.drop < math.inf else 0.0
                made = self._made(max(made.at - max(off / slope, step), OCTAVES[0]))
                step *= 4
            if not is_lossless(made.methods.values()):
                made = made._replace(loss=self._told(made, self._judge.check(made.artifact), check=True))
            if made.loss.drop <= self._most:
                return made
        return None

    def _slope(self, under: _Made, over: _Made | None) -> float:
        """Of log drop over log lambda, as the bracket shows it."""
        if over is None or not self._most or over.loss.drop == math.inf:
            return 1.0
        least = max(under.loss.drop, _FLOOR * self._most)
        return min(max(math.log2(over.loss.drop / least) / (over.at - under.at), 0.5), 2.0)

    def _made(self, at: float, methods: dict[str, Method] | None = None) -> _Made:
        """A file not measured yet; what a lossless one loses is known."""
        methods = methods or self._methods(at)
        return _Made(
            at, methods, self._make(methods), Loss(0.0) if self._judge.examples is None else Loss(0.0, 0.0, 0.0)
        )

    def _methods(self, at: float) -> dict[str, Method]:
        """Those of a lambda on the grid; between two, tensors take the next until that share of the bits is saved.

        Those that save least come first: where one saves much at once, as where its codebook becomes another, the
        others are settled before it. That coded tensors meet again in other files is what the grid is for.
        """
        low = math.floor(at * GRID) / GRID
        now, then = (
            {name: curve.at(2.0**step) for name, curve in self._curves.items()} for step in (low, low + 1 / GRID)
        )
        saved = {name: max(now[name].bits - then[name].bits, 0.0) for name in now}
        left = (at - low) * GRID * sum(saved.values())
        for name in sorted(now, key=lambda name: (saved[name], name)):
            left -= saved[name]
            if left < 0:
                break
            now[name] = then[name]
        return {name: point.method for name, point in now.items()}

    def _told(self, made: _Made, loss: Loss, *, check: bool) -> Loss:
        examples = self._judge.examples if check else self._judge.search_examples
        self._trials.append(Trial(made.artifact.nbytes, loss.drop, examples, check))
        if self._tell is not None:
            self._tell(self._trials[-1])
        return loss

    def _measured(self, loss: Loss, note: str | None) -> Measured:
        judge = self._judge
        return Measured(
            most=self._most,
            dense=judge.dense,
            drop=loss.drop,
            low=loss.low,
            high=loss.high,
            examples=judge.examples,
            search_examples=judge.search_examples,
            trials=self._trials,
            note=note,
        )
