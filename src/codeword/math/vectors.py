"""k-means on vectors, weighted by the importance of each entry: what product quantization clusters with.

Lloyd's rounds with one matrix product a block: the cost of vector x under codeword c,
sum_i h_i (x_i - c_i)**2 - sum_i h_i x_i**2, is the product of (h x, h) and (-2 c, c**2). Memory beyond the data is one
block of costs, whatever the number of vectors. A result is a function of the generator; nothing else is drawn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from codeword.errors import MissingDependencyError

Engine: TypeAlias = Literal["numpy", "faiss"]

# Multiplications done at a time: results stay in the cache, and OpenBLAS keeps to one thread, which makes them the same
# with any number and is no slower for products this thin (with two, on a busy machine, up to ten times as slow).
_BLOCK = 1 << 18
_TRAINED = 256  # vectors a codeword is trained on, as faiss has it; more change the third digit of the error
_SEEDED = 32  # vectors a codeword is seeded from
_PLUS_PLUS = 1024  # codebooks up to this size start from k-means++, whose cost grows with their square
_ROUNDS = 25
_FULL_ROUNDS = 2  # on all vectors, after the sample
_SETTLED = 3e-4  # relative gain of a round that is not worth another


class Assigned(NamedTuple):
    """Vectors under a codebook."""

    codes: np.ndarray  # (n,) smallest unsigned dtype
    sse: float  # sum of importance * squared error


class _Problem(NamedTuple):
    """Vectors moved to mean 0 and scaled to mean square 1, in float32: no square over- or underflows."""

    x: np.ndarray  # (n, d)
    h: np.ndarray | None  # (n, d) importance over its mean
    features: np.ndarray  # (n, d+1) of x and 1, or (n, 2d) of h x and h
    energy: np.ndarray  # (n,) cost under a codeword of zeros
    centre: np.ndarray  # (d,) float64
    scale: float
    unit: float  # what a cost of 1 stands for

    def table(self, codebook: np.ndarray) -> np.ndarray:
        """What features are multiplied with for the costs under codewords (k, d)."""
        c = codebook.astype(np.float32)
        squares = c * c
        return np.concatenate([-2 * c, squares if self.h is not None else squares.sum(axis=1, keepdims=True)], axis=1).T

    def only(self, index: np.ndarray) -> _Problem:
        """The problem of some of its vectors."""
        h = None if self.h is None else self.h[index]
        return self._replace(x=self.x[index], h=h, features=self.features[index], energy=self.energy[index])


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
    distinct vectors come back exactly. engine "faiss" (needs faiss-cpu) serves vectors without importance.
    """
    distinct = _distinct(vectors, k)
    if distinct is not None:
        return distinct
    k = min(k, len(vectors))  # distinct ones may pass for equal
    problem = _problem(vectors, importance)
    trained = problem
    if len(vectors) > _TRAINED * k:
        trained = problem.only(np.sort(generator.choice(len(vectors), _TRAINED * k, replace=False)))
    if engine == "faiss" and problem.h is None:
        codebook = _faiss(trained.x, k, int(generator.integers(1 << 31)))
    else:
        codebook = _lloyd(trained, _seeds(trained, k, generator), _ROUNDS)
    if trained is not problem:
        codebook = _lloyd(problem, codebook, _FULL_ROUNDS)
    return codebook * problem.scale + problem.centre


def assign_vectors(vectors: np.ndarray, codebook: np.ndarray, importance: np.ndarray | None = None) -> Assigned:
    """The nearest of codewords (k, d) for each of vectors (n, d); of equally near ones the first."""
    problem = _problem(vectors, importance)
    moved = (codebook.astype(np.float64) - problem.centre) / problem.scale
    codes, _ = nearest(problem.features, problem.table(moved))
    error = np.square(problem.x - moved.astype(np.float32)[codes])
    if problem.h is not None:
        error *= problem.h
    return Assigned(codes, float(error.sum(dtype=np.float64)) * problem.unit)


def nearest(features: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, costs), each (n,): the column of features (n, f) @ table (f, k) that is least in each row."""
    n, k = len(features), table.shape[1]
    codes = np.empty(n, np.min_scalar_type(k - 1))
    costs = np.empty(n, np.float32)
    step = max(1, _BLOCK // table.size)
    table = np.ascontiguousarray(table)
    room = np.empty((min(step, n), k), np.float32)
    for at in range(0, n, step):
        some = features[at : at + step]
        block = np.matmul(some, table, out=room[: len(some)])
        best = block.argmin(axis=1)
        codes[at : at + step] = best
        costs[at : at + step] = block[np.arange(len(best)), best]
    return codes, costs


def _problem(vectors: np.ndarray, importance: np.ndarray | None) -> _Problem:
    h = None
    weight = 1.0
    if importance is not None and importance.any():  # without any, all entries matter alike
        weight = float(np.mean(importance, dtype=np.float64))
        h = (importance / weight).astype(np.float32)
    centre = np.asarray(np.mean(vectors, axis=0, dtype=np.float64))
    x = vectors - centre
    top = float(max(x.max(), -x.min())) or 1.0
    x /= top
    # Codewords may be rounded off a tight cluster: its scale is not all that counts.
    spread = max(float(np.sqrt(np.vdot(x, x) / x.size)), 2.0**-40 * float(np.abs(centre).max()) / top) or 1.0
    x, scale = (x / spread).astype(np.float32), top * spread
    if h is None:
        features = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
        energy = np.einsum("nd,nd->n", x, x)
    else:
        features = np.concatenate([h * x, h], axis=1)
        energy = np.einsum("nd,nd->n", features[:, : x.shape[1]], x)
    return _Problem(x, h, features, energy, centre, scale, scale * scale * weight)


def _seeds(problem: _Problem, k: int, generator: np.random.Generator) -> np.ndarray:
    """(k, d) starting codewords: k-means++ (Arthur & Vassilvitskii 2007) on a sample, or just a sample."""
    n = len(problem.x)
    if k > _PLUS_PLUS:
        return problem.x[generator.choice(n, k, replace=False)].astype(np.float64)
    part = problem.only(generator.choice(n, min(n, _SEEDED * k), replace=False))
    seeds = [part.x[generator.choice(len(part.x))]]
    left = np.full(len(part.x), np.inf)
    for _ in range(1, k):
        cost = part.features @ part.table(seeds[-1][None])[:, 0] + part.energy
        left = np.minimum(left, np.maximum(cost, 0))
        total = np.cumsum(left, dtype=np.float64)
        draw = generator.random() * (total[-1] or 1)
        seeds.append(part.x[min(int(np.searchsorted(total, draw, side="right")), len(total) - 1)])
    return np.array(seeds, np.float64)


def _lloyd(problem: _Problem, codebook: np.ndarray, rounds: int) -> np.ndarray:
    """Codewords (k, d) as means of their members, again and again; empty ones move to the worst-served vectors."""
    before = np.inf
    for _ in range(rounds):
        codes, costs = nearest(problem.features, problem.table(codebook))
        error = problem.energy + costs
        codebook = _means(problem, codes, codebook)
        (empty,) = np.nonzero(np.bincount(codes, minlength=len(codebook)) == 0)
        if len(empty):
            codebook[empty] = problem.x[np.argsort(-error, kind="stable")[: len(empty)]]
        sse = float(np.sum(error, dtype=np.float64))
        if not len(empty) and before - sse <= _SETTLED * sse:
            break
        before = sse
    return codebook


def _means(problem: _Problem, codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """(k, d) weighted means of members; an entry that no member gives importance to stays as it is."""
    k, d = codebook.shape
    index = codes.astype(np.intp)
    means = np.empty((k, d))
    mass = np.bincount(index, minlength=k).astype(np.float64)
    for i in range(d):
        if problem.h is not None:
            mass = np.bincount(index, problem.h[:, i], k)
        first = np.bincount(index, problem.features[:, i], k)  # of x or of h x
        means[:, i] = np.where(mass > 0, first / np.where(mass > 0, mass, 1), codebook[:, i])
    return means


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
        raise MissingDependencyError('engine "faiss" needs faiss: pip install faiss-cpu') from error
    trainer = faiss.Kmeans(x.shape[1], k, niter=_ROUNDS, seed=seed, min_points_per_centroid=1)
    trainer.train(np.ascontiguousarray(x))
    return trainer.centroids.astype(np.float64)
