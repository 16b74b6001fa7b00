"""Second moments of what weights multiply: what an error of theirs costs at the output of their layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from codeword.errors import PlanError

# Of the mean of the diagonal, added to it, for a sample is no certainty: at least so much, for some inputs were never
# seen, and more where the inputs are not many times fewer than the vectors they were measured on, for then directions
# that seem not to matter were only missed. LeNet-5's 800 inputs of fc1 and 1,024 images: 0.2 points at 40x.
_LEAST_DAMPING = 0.01
_DAMPING = 0.4
_FITTED_ROWS = 64  # that codewords are fitted to, at least
_FITTED = 1 << 17  # weights of them, at least
_HELD = 1e-4  # share of a codeword as it was


@dataclass(frozen=True, eq=False)
class Moments:
    """H = E[x x^T] of the inputs x that the rows of a weight (r, c) multiply, of each of g groups of r / g rows.

    The squared error of a row's output is e H e, where e is the error of the row (LeCun et al. 1990; Frantar 2022).
    """

    second: np.ndarray  # (g, c, c) float32, symmetric
    count: int | None = None  # vectors x that it is the mean over; None: many times c

    @property
    def damping(self) -> float:
        """What is added to the diagonal, over its mean, before it is inverted."""
        inputs = self.second.shape[-1]
        return _LEAST_DAMPING if self.count is None else max(_LEAST_DAMPING, _DAMPING * inputs / max(self.count, 1))

    @cached_property
    def factors(self) -> list[np.ndarray]:
        """`factor` of each group: found once, however many files are made."""
        return [factor(second, self.damping) for second in self.second]

    def diagonal(self, rows: int) -> np.ndarray:
        """(rows, c) float32: what a squared error of each weight costs if errors are independent."""
        return np.einsum("gii->gi", self.second)[self.owners(rows)]

    def compensated(self, rows: int) -> np.ndarray:
        """(rows, c) float32: what it costs once the weights to the right have made up for it as they best can."""
        own = [_mean(h) / np.square(np.diagonal(upper)) for h, upper in zip(self.second, self.factors, strict=True)]
        return np.asarray(own, np.float32)[self.owners(rows)]

    def owners(self, rows: int) -> np.ndarray:
        """(rows,): the group of each row."""
        return np.arange(rows) * len(self.second) // max(rows, 1)

    def fitted(
        self, values: np.ndarray, owners: np.ndarray, worth: np.ndarray, codes: np.ndarray, codebook: np.ndarray
    ) -> np.ndarray:
        """The codebook (k,) of least sum of worth * e H e for these codes (r, c), e the error of values (r, c).

        owners (r,): the group of each row; worth (r,): what it counts. Least squares, with a little of the codebook
        given, for codewords that nothing tells. Of many rows some are read: they are to tell k numbers.
        """
        every = max(1, len(values) // max(_FITTED_ROWS, _FITTED // values.shape[1]))
        values, owners, worth, codes = (array[::every] for array in (values, owners, worth, codes))
        k = len(codebook)
        normal, right = np.zeros((k, k)), np.zeros(k)
        for owner in np.unique(owners):
            mine = owners == owner
            h = self.second[owner] / np.float32(_mean(self.second[owner]))
            h[np.diag_indices_from(h)] += np.float32(self.damping)
            members = [codes[mine] == code for code in range(k)]
            for i, own in enumerate(members):
                spread = (own.astype(np.float32) @ h * worth[mine, None]).astype(np.float64)
                right[i] += np.sum(spread * values[mine])
                normal[i] += [np.sum(spread, where=others) for others in members]
        held = _HELD * np.trace(normal) / k
        return np.linalg.solve(normal + held * np.eye(k), right + held * codebook) if held else codebook


def factor(second: np.ndarray, damping: float = _LEAST_DAMPING) -> np.ndarray:
    """(c, c) float32 upper triangular U, for which U^T U is the inverse of H (c, c) / its mean diagonal + damping.

    Raises PlanError if H is not positive semidefinite: no second moments of anything.
    """
    h = second.astype(np.float64)
    h /= _mean(h)
    h[np.diag_indices_from(h)] += damping
    try:
        lower = np.linalg.cholesky(np.linalg.inv(h))
    except np.linalg.LinAlgError as error:
        raise PlanError(f"moments of {len(h)} inputs are not positive semidefinite; give E[x x^T] of some x") from error
    return np.ascontiguousarray(lower.T.astype(np.float32))


def _mean(second: np.ndarray) -> float:
    """Of the diagonal; 1 if that is 0."""
    return float(np.mean(np.diagonal(second), dtype=np.float64)) or 1.0
