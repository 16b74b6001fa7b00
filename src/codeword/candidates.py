"""What else a tensor could be stored as: every family of methods, really coded and compared with rate-aware scalars.

Rate-aware scalars on a grid, whose errors cancel, are all that a plan is made of by default ("fast"). benchmarks/
candidates.py says why: on convolutions nothing else comes near them, for vectors and templates have no errors that
cancel, which is worth half a bit a weight and more; k-means, pruning by size and row scales never do. Rate-aware
vectors win on some large matrices: the outputs of LeNet-300-100 at 30x are three times as near (with calibration data)
to five times (without). Those of LeNet-5 without data are further off for them, though weights are nearer. So "all" is
to be asked for, best with data; it takes many times as long, until the cache knows what came out.

Two errors are measured, both relative: that of the weights, and that of outputs, e H e with H as it was measured or,
without data, as compensation supposes it to be. A method counts for what it wins on scalars of as many bits by the one
that says less: each alone is a model, and either has been seen to praise what made a net worse.

Bits are those of the coded tensor. Of tensors with more than SAMPLE weights some rows are taken, and what is coded for
each weight is counted up: codebooks are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from codeword.artifact import code_tensor
from codeword.errors import PlanError
from codeword.execute import Cost, express
from codeword.expr import decode, dtype_name, leaves
from codeword.kernels.compensate import FAR, NEAR
from codeword.math.moments import Moments
from codeword.methods import (
    Birch,
    BuiltIn,
    DensityKMeans,
    Granularity,
    KernelTemplates,
    KMeans,
    Lloyd,
    ProductQuantization,
    Prune,
    RateAware,
    RowScaled,
    as_rows,
)

Candidates: TypeAlias = Literal["fast", "all"]
SAMPLE = 1 << 17  # weights that candidates are measured on
LEAST = 512  # weights of a tensor that is worth it
_LEAST_ROWS = 16
_LAMBDAS = tuple(2.0**-octave for octave in range(-2, 9))  # of the scalars that others are compared with
_FEW_LAMBDAS = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
_MEMBERS = 8  # vectors a codeword, at least


class Measured(NamedTuple):
    """A method, what it takes, and the relative errors that it makes."""

    method: BuiltIn
    bits: float  # of the whole tensor, as coded
    weights: float  # squared error of the weights
    outputs: float  # and of what they are for: less, where errors cancel


class Rated(NamedTuple):
    """A method beside scalars of as many bits."""

    method: BuiltIn
    bits: float
    factor: float  # its error over theirs


def scalars(granularity: Granularity) -> list[BuiltIn]:
    """What others are compared with, by their outputs' error and by their weights'."""
    return [
        RateAware(lam, granularity=granularity, compensate=compensate)
        for compensate in (True, False)
        for lam in _LAMBDAS
    ]


def families(shape: tuple[int, ...], granularity: Granularity) -> dict[str, list[BuiltIn]]:
    """All others that a plan can be made of, for a tensor of this shape, of two dimensions or more; by family.

    Each kind comes at several lambdas, between which lie all others: so that a file can have any size.
    """
    starts = fixed(shape, granularity)
    vectors = [
        start
        for start in starts.get("product", [])
        if isinstance(start, ProductQuantization) and start.n_clusters > 16 and start.cluster_dim != 3
    ]
    few = _FEW_LAMBDAS[1::2]
    found: dict[str, list[BuiltIn]] = {
        "free": [RateAware(lam, granularity=granularity, codebook="free") for lam in few],
        "pruned": [
            Prune(share, then=RateAware(lam, granularity=granularity)) for share in (0.5, 0.7, 0.9) for lam in few
        ],
        "k-means": [
            RateAware(lam, granularity=granularity, start=KMeans(k, granularity=granularity, zero=True))
            for k in (4, 8, 16)
            for lam in few
        ],
        "row-scaled": [RateAware(lam, start=RowScaled(k)) for k in (4, 16) for lam in few],
        "product": [RateAware(lam, granularity=granularity, start=start) for start in vectors for lam in _FEW_LAMBDAS],
        "templates": [
            RateAware(lam, granularity=granularity, start=start)
            for start in starts.get("templates", [])
            if isinstance(start, KernelTemplates) and start.n_templates > 16
            for lam in few
        ],
    }
    return {name: methods for name, methods in found.items() if methods}


def fixed(shape: tuple[int, ...], granularity: Granularity) -> dict[str, list[BuiltIn]]:
    """Methods without a lambda, by family: to be compared with; in a plan their rate-aware form stands for them."""
    size, columns, kernel = math.prod(shape), math.prod(shape[1:]), math.prod(shape[2:])
    found: dict[str, list[BuiltIn]] = {
        "k-means": [KMeans(k, granularity=granularity) for k in (3, 4, 6, 8, 16)],
        "row-scaled": [RowScaled(k) for k in (3, 4, 8, 16)],
        "density-k-means": [DensityKMeans(k, granularity=granularity) for k in (4, 8, 16)],
        "lloyd": [Lloyd(k, "density", granularity=granularity) for k in (4, 8, 16)],
        "birch": [Birch(sqnr_db) for sqnr_db in (8.0, 12.0, 18.0)],
        "pruned": [Prune(share, then=KMeans(k)) for share in (0.7, 0.9) for k in (4, 8, 16)],
        "product": [
            ProductQuantization(d, k, granularity=granularity)
            for d in (2, 3, 4, 8, 9)
            for k in (16, 64, 256)
            if columns % d == 0 and k * _MEMBERS <= size // d
        ],
        "templates": [KernelTemplates(k) for k in (16, 64, 256) if kernel > 1 and k * _MEMBERS <= size // kernel],
    }
    return {name: methods for name, methods in found.items() if methods}


def measure(
    weight: np.ndarray, methods: Sequence[BuiltIn], granularity: Granularity, name: str, seed: int, cost: Cost | None
) -> list[Measured]:
    """What comes out of each method, without those that do not fit the tensor.

    weight: two dimensions or more, finite; cost: what its errors cost, as for `express`.
    """
    some, cost = _sampled(weight, cost, SAMPLE)
    share = weight.size / some.size
    rows = as_rows(some).astype(np.float64)
    energy = np.square(rows).mean(axis=1) if granularity == "row" else np.full(len(rows), np.square(rows).mean())
    scale = np.sqrt(np.where(energy > 0, energy, 1.0))
    kernel = math.prod(weight.shape[2:])
    whole = _errors(rows / scale[:, None], kernel, cost)[0]
    if not whole > 0:
        return []
    found: list[Measured] = []
    for method in methods:
        try:
            expr = express(some, method, name, seed, cost)
        except PlanError:
            continue
        error = (as_rows(decode(expr)).astype(np.float64) - rows) / scale[:, None]
        weights, outputs = _errors(error, kernel, cost)
        coded = code_tensor(name, dtype_name(some.dtype), some.shape, expr)
        each = [_grows(path, array, some) for path, array in leaves(expr)]
        streams = sum(
            len(leaf.stream) * (share if grows else 1) for leaf, grows in zip(coded.leaves, each, strict=True)
        )
        rest = coded.nbytes - sum(len(leaf.stream) for leaf in coded.leaves)
        found.append(Measured(method, 8 * (streams + rest), weights / whole, outputs / whole))
    return found


def rated(references: Sequence[Measured], others: Sequence[Measured]) -> list[Rated]:
    """Those whose bits lie between the references', beside scalars of as many.

    The error of scalars between two references is taken from the line through their logarithms.
    """
    by_outputs = _line([(point.bits, point.outputs) for point in references if is_compensated(point.method)])
    by_weights = _line([(point.bits, point.weights) for point in references if not is_compensated(point.method)])
    found: list[Rated] = []
    if by_outputs is None or by_weights is None:
        return found
    for point in others:
        outputs, weights = by_outputs.at(point.bits), by_weights.at(point.bits)
        if outputs is not None and weights is not None:
            found.append(Rated(point.method, point.bits, max(point.outputs / outputs, point.weights / weights)))
    return found


def is_compensated(method: BuiltIn) -> bool:
    """Whether errors cancel: of the references, those by their outputs' error."""
    return isinstance(method, RateAware) and method.compensate


class _Line(NamedTuple):
    """Falling error over rising bits."""

    bits: np.ndarray
    logarithms: np.ndarray

    def at(self, bits: float) -> float | None:
        """The error there; None beyond both ends."""
        if not self.bits[0] <= bits <= self.bits[-1]:
            return None
        return 2.0 ** float(np.interp(bits, self.bits, self.logarithms))


def _line(points: list[tuple[float, float]]) -> _Line | None:
    kept = sorted((bits, error) for bits, error in points if error > 0)
    if len(kept) < 2:
        return None
    bits, errors = np.array(kept).T
    return _Line(bits, np.log2(np.minimum.accumulate(errors)))


def _errors(error: np.ndarray, kernel: int, cost: Cost | None) -> tuple[float, float]:
    """(of the weights, of the outputs), equal for errors that have nothing to do with each other; error: (r, c)."""
    if isinstance(cost, Moments):
        own = cost.diagonal(len(error))
        parts = error.reshape(len(cost.second), -1, error.shape[1])
        weights = float(np.sum(own * np.square(error)))
        return weights, float(np.sum((parts @ cost.second.astype(np.float64)) * parts))
    if cost is not None:
        error = error * np.sqrt(as_rows(cost))
    plain = float(np.sum(np.square(error)))
    kernels = error.reshape(len(error), -1, kernel).sum(axis=2)
    near, far = float(np.sum(np.square(kernels))), float(np.sum(np.square(error.sum(axis=1))))
    return plain, (plain + NEAR * near + FAR * far) / (1 + NEAR + FAR)


def _sampled(weight: np.ndarray, cost: Cost | None, most: int) -> tuple[np.ndarray, Cost | None]:
    """Rows of a tensor, evenly spread, and what their errors cost; all rows, if that depends on where they stand."""
    every = min(weight.size // most, len(weight) // _LEAST_ROWS)
    if every < 2 or (isinstance(cost, Moments) and len(cost.second) > 1):
        return weight, cost
    some = np.ascontiguousarray(weight[::every])
    return some, cost if cost is None or isinstance(cost, Moments) else np.ascontiguousarray(cost[::every])


def _grows(path: str, array: np.ndarray, weight: np.ndarray) -> bool:
    """Whether a leaf is as much larger as a tensor has more rows: codes and scales are, codebooks and steps not."""
    return array.size >= len(weight) and path.rpartition(".")[2] != "codebook"
