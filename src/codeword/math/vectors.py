"""k-means on vectors, weighted by the importance of each entry: what product quantization clusters with.

Lloyd's rounds on a sample, each of them one pass of `kernels.vectors`, which is what takes the time. A result is a
function of the generator; nothing else is drawn, and the number of threads changes nothing.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from codeword.errors import MissingDependencyError
from codeword.kernels.vectors import nearest, nearest_and_members
from codeword.math.bins import weighted_means

Engine: TypeAlias = Literal["numpy", "faiss"]

_TRAINED = 256  # vectors a codeword is trained on, as faiss has it; more change the third digit of the error
_FINISHED = 512  # vectors a codeword is the mean of in the end: halves what a sample costs in error
_AT_LEAST = 1 << 14  # of them, which take no time
_SEEDED = 32  # vectors a codeword is seeded from
_ROUNDS = 25
_SETTLED = 1e-3  # relative gain of a round that is not worth another: going on takes 1.4 times as long for 0.3 % less
_BLOCK = 1 << 14  # values brought into a frame at once: they stay in the cache


class Assigned(NamedTuple):
    """Vectors under a codebook."""

    codes: np.ndarray  # (n,) smallest unsigned dtype
    sse: float  # sum of importance * squared error


class _Frame(NamedTuple):
    """Coordinates in which no square of float32 over- or underflows: moved to 0, a power of two the unit of length."""

    centre: np.ndarray  # (d,) float64
    scale: float

    @classmethod
    def around(cls, points: np.ndarray, top: float) -> _Frame:
        """Where points (m, d) have mean 0 and mean square about 1, but nothing as small as top exceeds 2**41."""
        centre = np.asarray(np.mean(points, axis=0, dtype=np.float64))
        away = points - centre
        most = float(np.abs(away).max()) or 1.0
        away /= most
        # Codewords may be rounded off a tight cluster: its size is not all that counts.
        size = max(most * math.sqrt(float(np.mean(away * away))), 2.0**-40 * top)
        return cls(centre, math.ldexp(1.0, min(max(math.frexp(size)[1], -1000), 1000)) if size else 1.0)

    def moved(self, vectors: np.ndarray) -> np.ndarray:
        """vectors (n, d), float32."""
        step = max(1, _BLOCK // vectors.shape[1])
        flat, centres = vectors.reshape(-1), np.tile(self.centre, step)
        out = np.empty(flat.shape, np.float32)
        for at in range(0, flat.size, centres.size):
            some = flat[at : at + centres.size] - centres[: flat.size - at]
            some *= 1 / self.scale
            out[at : at + centres.size] = some
        return out.reshape(vectors.shape)


class _Weights(NamedTuple):
    """Importance over about its mean."""

    h: np.ndarray | None  # (n, d) float32, None: all entries matter alike
    unit: float  # a power of two: importance is h * unit

    @classmethod
    def of(cls, importance: np.ndarray | None) -> _Weights:
        """None and importance of 0 throughout are no importance at all."""
        mean = 0.0 if importance is None else float(np.mean(importance, dtype=np.float64))
        if importance is None or not mean:
            return cls(None, 1.0)
        unit = math.ldexp(1.0, min(max(math.frexp(mean)[1], -1000), 1000))
        return cls((importance * (1 / unit)).astype(np.float32), unit)


def kmeans_vectors(
    vectors: np.ndarray,
    k: int,
    *,
    generator: np.random.Generator,
    importance: np.ndarray | None = None,
    engine: Engine = "numpy",
) -> np.ndarray:
    """(k', d) float64 codewords for vectors (n, d), finite, n > 0; k' = min(k, distinct vectors).

    importance: (n, d), >= 0; entries of importance 0 (pruned weights) have no say in distance or mean. At most k
    distinct vectors come back exactly. engine "faiss" (an extra) serves vectors without importance; what it
    returns may differ with its version, the machine and the number of threads.
    """
    distinct = _distinct(vectors, k)
    if distinct is not None:
        return distinct
    k = min(k, len(vectors))  # distinct ones may pass for equal
    h, index = _Weights.of(importance).h, _drawn(len(vectors), max(_FINISHED * k, _AT_LEAST), generator)
    some, weight = vectors[index], None if h is None else h[index]
    frame = _Frame.around(some, _top(some))
    x = frame.moved(some)
    index = _drawn(len(x), _TRAINED * k, generator)
    trained, h = x[index], None if weight is None else weight[index]
    if engine == "faiss" and h is None:
        codebook = _faiss(trained, k, int(generator.integers(1 << 31)))
    else:
        codebook = _lloyd(trained, h, _seeds(trained, h, k, generator), _ROUNDS)
    if len(trained) < len(x):
        codebook = _lloyd(x, weight, codebook, 1)
    return codebook * frame.scale + frame.centre


def assign_vectors(
    vectors: np.ndarray,
    codebook: np.ndarray,
    importance: np.ndarray | None = None,
    *,
    penalty: np.ndarray | None = None,
) -> Assigned:
    """The nearest of codewords (k, d) for each of vectors (n, d); of equally near ones the first.

    Nearest: of the least sum of importance * squared error, plus the penalty (k,) of the codeword, which the error
    that is returned does not contain.
    """
    frame, weights = _Frame.around(codebook, _top(vectors)), _Weights.of(importance)
    unit = frame.scale * frame.scale * weights.unit
    words = (codebook - frame.centre) / frame.scale
    prices = None if penalty is None else penalty / unit
    codes, errors = nearest(frame.moved(vectors), weights.h, words, prices)
    return Assigned(codes, float(errors.sum(dtype=np.float64)) * unit)


def _top(vectors: np.ndarray) -> float:
    return max(float(vectors.max()), -float(vectors.min())) if vectors.size else 0.0


def _drawn(n: int, most: int, generator: np.random.Generator) -> np.ndarray | slice:
    """So many of the numbers below n, rising."""
    return np.sort(generator.choice(n, most, replace=False, shuffle=False)) if n > most else slice(None)


def _seeds(x: np.ndarray, h: np.ndarray | None, k: int, generator: np.random.Generator) -> np.ndarray:
    """(k, d) starting codewords, drawn from a sample by the error that those before leave, half as many at a time.

    One at a time would be k-means++ (Arthur & Vassilvitskii 2007), which after Lloyd's rounds is no better.
    """
    index = _drawn(len(x), _SEEDED * k, generator)
    x, h = x[index], None if h is None else h[index]
    fresh = seeds = x[generator.integers(len(x), size=1)]
    left = np.full(len(x), np.inf)
    while len(seeds) < k:
        left = np.minimum(left, nearest(x, h, fresh, None)[1])
        total = np.cumsum(left)
        if not total[-1]:  # nothing is left to be served: what stays without members is moved later
            return np.concatenate([seeds, seeds[np.zeros(k - len(seeds), np.intp)]]).astype(np.float64)
        draws = generator.random(min(max(1, len(seeds) // 2), k - len(seeds))) * total[-1]
        fresh = x[np.unique(np.minimum(np.searchsorted(total, draws, side="right"), len(x) - 1))]
        seeds = np.concatenate([seeds, fresh])
    return seeds.astype(np.float64)


def _lloyd(x: np.ndarray, h: np.ndarray | None, codebook: np.ndarray, rounds: int) -> np.ndarray:
    """Codewords (k, d) as means of their members, again and again; empty ones move to the worst-served vectors.

    An entry that no member gives importance to stays as it is.
    """
    before = np.inf
    for _ in range(rounds):
        _, errors, members = nearest_and_members(x, h, codebook, None)
        mass = members.counts[:, None] if members.mass is None else members.mass
        codebook = weighted_means(members.first, mass, codebook)
        (empty,) = np.nonzero(members.counts == 0)
        if len(empty):
            codebook[empty] = x[np.argsort(-errors, kind="stable")[: len(empty)]]
        sse = float(np.sum(members.error))
        if not len(empty) and before - sse <= _SETTLED * sse:
            break
        before = sse
    return codebook


def _distinct(vectors: np.ndarray, k: int) -> np.ndarray | None:
    """The distinct vectors, float64, if there are at most k."""
    d = vectors.shape[1]
    directions = np.cos(1.0 + np.arange(d))  # any that tell vectors apart

    def keys(some: np.ndarray) -> np.ndarray:
        return sum((some[:, i] * directions[i] for i in range(d)), np.zeros(len(some)))

    if len(np.unique(keys(vectors[: 4 * k]))) > k:
        return None
    _, first, index = np.unique(keys(vectors), return_index=True, return_inverse=True)
    if len(first) > k or not np.array_equal(vectors[first][index.reshape(-1)], vectors):
        return None
    return vectors[first].astype(np.float64)


def _faiss(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise MissingDependencyError('engine "faiss" needs faiss: pip install "codeword[faiss]"') from error
    trainer = faiss.Kmeans(x.shape[1], k, niter=_ROUNDS, seed=seed, min_points_per_centroid=1)
    trainer.train(np.ascontiguousarray(x))
    return trainer.centroids.astype(np.float64)
