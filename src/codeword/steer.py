"""A file of a given size whose tensors are made one after another: what the first take too much, others make up for.

Methods were chosen for the sizes that tensors had in a first file. Made anew, a tensor takes other bytes, more or less
by a factor that is much the same for all. So each next tensor's lambda is set to where, after what has been made and by
the factor seen so far, all that is still to come fits what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from codeword.artifact import Artifact
from codeword.curves import Curve, lam_of, with_lam
from codeword.methods import Method

_OCTAVES = np.arange(-12, 13) / 4  # that lambda may move by
_PRIOR = 0.1  # of all bytes: how much it takes for the factor seen so far to outweigh that there is none


class Steering:
    """Chooses the method of each tensor as it is reached; `methods` tells which were chosen."""

    def __init__(
        self,
        curves: Mapping[str, Curve],
        first: Artifact,
        methods: Mapping[str, Method],
        goal: float,
        factor: float = 1.0,
    ) -> None:
        """first: the file that was made by `methods`, of the tensors that may move. goal: bytes of the file to make.

        factor: by which tensors made anew are likely to be larger than in that file.
        """
        self.methods = dict(methods)
        self._planned = {name: first.entries[name].nbytes for name in methods}
        self._shares = {name: _shares(curves[name], method) for name, method in methods.items()}
        self._goal = goal - (first.nbytes - sum(self._planned.values()))
        self._given = factor
        self._made: dict[str, tuple[float, int]] = {}  # what was expected but for the factor, and what came

    @property
    def factor(self) -> float:
        """How much larger tensors were than expected."""
        prior = _PRIOR * sum(self._planned.values())
        expected, came = (sum(part) for part in zip(*self._made.values(), strict=True)) if self._made else (0.0, 0.0)
        return (came + prior * self._given) / (expected + prior)

    def choose(self, name: str) -> Method:
        """The method for the tensor that comes next."""
        octave = self._octave()
        self.methods[name] = with_lam(self.methods[name], (lam_of(self.methods[name]) or 0.0) * 2.0**octave)
        self._made[name] = self._expected(name, octave), 0
        return self.methods[name]

    def made(self, name: str, nbytes: int) -> None:
        """What it took."""
        self._made[name] = self._made[name][0], nbytes

    def _octave(self) -> float:
        """Where all that is still to come fits what is left, by bisection."""
        left = self._goal - sum(nbytes for _, nbytes in self._made.values())
        names, factor = self._planned.keys() - self._made.keys(), self.factor
        low, high = _OCTAVES[[0, -1]]
        for _ in range(30):
            middle = (low + high) / 2
            fits = factor * sum(self._expected(name, middle) for name in sorted(names)) <= left
            low, high = (low, middle) if fits else (middle, high)
        return round(float(high), 3)

    def _expected(self, name: str, octave: float) -> float:
        return self._planned[name] * float(np.interp(octave, _OCTAVES, self._shares[name]))


def _shares(curve: Curve, method: Method) -> np.ndarray:
    """Bits around a method's lambda, over those at it."""
    here = lam_of(method)
    unit = lam_of(curve.at(1.0).method)  # a curve's lambda is that of its methods but for a factor
    if here is None or unit is None or here <= 0 or unit <= 0:
        return np.ones(len(_OCTAVES))
    bits = np.array([curve.at(here / unit * 2.0**octave).bits for octave in _OCTAVES])
    return bits / max(bits[len(bits) // 2], math.ulp(1.0))
