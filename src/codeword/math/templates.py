"""Kernel templates: vectors as multiples of a few directions, whatever their sign (Chen, Chen & Su 2019).

Clusters lines through the origin, not points: the distance of kernel x from template t of norm 1 is the energy that no
multiple of t explains, |x|**2 - <x, t>**2, or 1 - r**2 of it with r their correlation. So a kernel and its negative
share a template, and the best template of a cluster is the leading eigenvector of its sum of x x^T, in which strong
kernels count for more.
"""

from __future__ import annotations

import numpy as np

from codeword.kernels.vectors import least_products

_TRAINED = 256  # kernels a template is trained on
_ROUNDS = 25
_SETTLED = 3e-4


def kernel_templates(kernels: np.ndarray, k: int, *, generator: np.random.Generator) -> np.ndarray:
    """(k', d) float64 templates of norm 1 for kernels (n, d), n > 0; k' = min(k, n).

    Centre kernels first if they are to have an offset; multiply them by the root of an importance each, if they have
    one.
    """
    top = float(np.abs(kernels).max())
    x = (kernels / (top or 1)).astype(np.float32)
    if len(x) > _TRAINED * k:
        x = x[np.sort(generator.choice(len(x), _TRAINED * k, replace=False))]
    energy = np.einsum("nd,nd->n", x, x)
    templates = _seeds(x, energy, min(k, len(x)), generator)
    before = np.inf
    for _ in range(_ROUNDS):
        codes, costs = _match(x, templates)
        error = energy - np.square(costs)
        templates = _directions(x, codes, templates)
        (empty,) = np.nonzero(np.bincount(codes, minlength=len(templates)) == 0)
        if len(empty):
            templates[empty] = _unit(x[np.argsort(-error, kind="stable")[: len(empty)]])
        sse = float(np.sum(error, dtype=np.float64))
        # Empty ones may stay so for ever, where fewer directions than templates are to be had.
        if before - sse <= _SETTLED * sse:
            break
        before = sse
    return templates


def match_templates(kernels: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """(n,) the template that explains most of each of kernels (n, d); templates (k, d) of any norm."""
    top = float(np.abs(kernels).max())
    return _match((kernels / (top or 1)).astype(np.float32), _unit(templates))[0]


def fit_gains(kernels: np.ndarray, matched: np.ndarray, h: np.ndarray, *, offset: bool) -> np.ndarray:
    """(n,) a of the least sum of h (kernel - a * template - b)**2, b free or 0; all arguments (n, d)."""
    t, w = (matched - _mean(matched, h), kernels - _mean(kernels, h)) if offset else (matched, kernels)
    square = np.einsum("nd,nd,nd->n", h, t, t)
    return np.where(square > 0, np.einsum("nd,nd,nd->n", h, t, w) / np.where(square > 0, square, 1), 0)


def fit_offsets(kernels: np.ndarray, matched: np.ndarray, h: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """(n,) b of the least sum of h (kernel - a * template - b)**2 for gains a (n,) as they are stored."""
    return _mean(kernels - gains[:, None] * matched, h)[:, 0]


def _mean(values: np.ndarray, h: np.ndarray) -> np.ndarray:
    mass = h.sum(axis=1, keepdims=True)
    return np.einsum("nd,nd->n", h, values)[:, None] / np.where(mass > 0, mass, 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.where(norms > 0, wide / np.where(norms > 0, norms, 1), 1 / np.sqrt(wide.shape[1]))


def _match(x: np.ndarray, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, costs): -cost is the projection of each x (n, d) on the template, or its negative, that is closest."""
    both = np.concatenate([-templates, templates]).astype(np.float32)
    codes, costs = least_products(x, both)
    return (codes % len(templates)).astype(np.min_scalar_type(len(templates) - 1)), costs


def _seeds(x: np.ndarray, energy: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """(k, d) kernels drawn by the energy that those before leave unexplained, as k-means++ draws points."""
    left = energy.astype(np.float64)
    chosen = []
    for _ in range(k):
        total = np.cumsum(left)
        at = min(int(np.searchsorted(total, generator.random() * (total[-1] or 1), side="right")), len(x) - 1)
        chosen.append(_unit(x[at : at + 1])[0])
        left = np.minimum(left, np.maximum(energy - np.square(x @ chosen[-1].astype(np.float32)), 0))
    return np.array(chosen)


def _directions(x: np.ndarray, codes: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """(k, d) leading eigenvectors of the sums of x x^T over members; of no members, the template as it was."""
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(templates)))
    members = np.split(x[order].astype(np.float64), ends[:-1])
    spread = np.array([part.T @ part for part in members])
    found = np.linalg.eigh(spread)[1][:, :, -1]
    # Of an eigenvector's two signs the one that the members have, so that most gains are positive.
    sign = np.array([np.sign(np.sum(part @ vector)) or 1.0 for part, vector in zip(members, found, strict=True)])
    return np.where(np.diff(ends, prepend=0)[:, None] > 0, found * sign[:, None], templates)
