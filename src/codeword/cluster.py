"""Codeword's clustering as scikit-learn estimators: for data of your own, pipelines, and comparisons.

    from codeword.cluster import KMeans1D
    KMeans1D(n_clusters=16).fit(weights.reshape(-1, 1)).cluster_centers_

Input is checked by scikit-learn and errors are its own: ValueError for wrong shapes, NaN and wrong parameters,
NotFittedError before `fit`. Data is moved to mean 0 before it is clustered, so an offset costs no precision. Needs
scikit-learn, so `import codeword` does not import this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from codeword.errors import MissingDependencyError
from codeword.math.bins import Bins, make_bins, weighted_means
from codeword.math.birch import birch, scan, sweep, threshold_of
from codeword.math.kmeans import kmeans, midpoints, sse_curve
from codeword.math.templates import fit_gains, fit_offsets, kernel_templates, match_templates
from codeword.math.vectors import assign_vectors, kmeans_vectors

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.utils import Tags, check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted, validate_data
except ImportError as error:
    raise MissingDependencyError('codeword.cluster needs scikit-learn: pip install "codeword[sklearn]"') from error

__all__ = ["Birch1D", "KMeans1D", "KernelTemplates", "ProductQuantizer"]

_FLOATS = (np.float64, np.float32)
_MARGIN = 1e-6  # for centres in float32


class _OneFeature(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """What clustering on a line shares: X is (n, 1), centres rise, the nearest one is found by bisection."""

    _centres: np.ndarray  # (k,) in the dtype of X

    def predict(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n,) int32 index of the centre nearest to each value of X (n, 1); half way, of the lower one."""
        check_is_fitted(self)
        return self._nearest(self._column(X, reset=False))

    def transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n, k) distances of X (n, 1) to the centres."""
        check_is_fitted(self)
        return np.abs(self._column(X, reset=False)[:, None] - self._centres)

    def _column(self, X: Any, *, reset: bool) -> np.ndarray:  # noqa: ANN401
        """The values of X, (n,)."""
        X = validate_data(self, X, reset=reset, dtype=_FLOATS)
        if X.shape[1] != 1:
            raise ValueError(
                f"{type(self).__name__} clusters numbers, one feature, but X has {X.shape[1]}: fit one estimator to "
                "each column, or all values together as X.reshape(-1, 1)"
            )
        return X[:, 0]

    def _nearest(self, x: np.ndarray) -> np.ndarray:
        return np.searchsorted(midpoints(self._centres), x).astype(np.int32)

    def _keep(self, x: np.ndarray, centres: np.ndarray, pinned: float = np.nan) -> None:
        """Take centres (k,) that are the nearest to some of x (n,), or pinned."""
        self._centres = np.unique(centres.astype(x.dtype))
        members = np.bincount(self._nearest(x), minlength=len(self._centres))
        self._centres = self._centres[(members > 0) | (self._centres == pinned)]
        self._n_features_out = len(self._centres)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # of more than one feature, as for IsotonicRegression
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class KMeans1D(_OneFeature):
    """Optimal k-means of numbers: the best centres there are, by dynamic programming (Wu 1991; Wang & Song 2011).

    n_clusters: centres; fewer come back if there are fewer distinct values. zero: 0 is one of them, and each other one
    the mean of its members. Nothing is drawn at random. Up to 2**18 values each distinct one is looked at; beyond, a
    histogram whose bins are 0.05 % wide.

    Fitted: cluster_centers_ (k, 1) rising; labels_ (n,); inertia_, the sum of sample_weight * squared distance;
    n_features_in_, always 1.
    """

    def __init__(self, n_clusters: int = 8, *, zero: bool = False) -> None:
        self.n_clusters = n_clusters
        self.zero = zero

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KMeans1D:  # noqa: ANN401
        """Cluster X (n, 1), each value weighted by sample_weight (n,) >= 0, None for all alike."""
        del y
        x, weight = self._weighted(X, sample_weight, reset=True)
        moved, middle, unit, bins = _moved(x, weight, centre=not self.zero)
        centres = kmeans(bins, self.n_clusters, zero=self.zero).codebook
        # Means of the members themselves: those of a histogram's bins may be a little off.
        labels = np.searchsorted(midpoints(centres), moved)
        mass, first = (np.bincount(labels, part, len(centres)) for part in (weight, weight * moved))
        fixed = self.zero & (centres == 0)
        means = np.where(fixed, centres, weighted_means(first, mass, centres)) * unit + middle
        self._keep(x[weight > 0], means, 0.0 if self.zero else np.nan)
        self.cluster_centers_ = self._centres[:, None]
        self.labels_ = self._nearest(x)
        self.inertia_ = self._inertia(x, weight)
        return self

    def score(self, X: Any, y: None = None, sample_weight: Any = None) -> float:  # noqa: ANN401
        """Minus the sum of sample_weight * squared distance of X (n, 1) to the nearest centre."""
        del y
        check_is_fitted(self)
        return -self._inertia(*self._weighted(X, sample_weight, reset=False))

    def sse_curve(self, X: Any, sample_weight: Any = None) -> np.ndarray:  # noqa: ANN401
        """(n_clusters,) the least inertia of X (n, 1) with 1, 2, ... centres, to a fraction of a percent: to choose k.

        One run for all, which needs no fit and leaves none. From as many centres as there are distinct values it is 0.
        """
        x, weight = self._weighted(X, sample_weight, reset=True)
        _, _, unit, bins = _moved(x, weight)
        curve = sse_curve(bins, self.n_clusters) * unit * unit
        return np.pad(curve, (0, self.n_clusters - len(curve)))

    def _weighted(self, X: Any, sample_weight: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401
        _check_count(self, "n_clusters", self.n_clusters)
        x = self._column(X, reset=reset)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        if not weight.any():
            raise ValueError("sample_weight is zero for all samples: nothing to cluster by")
        return x, weight

    def _inertia(self, x: np.ndarray, weight: np.ndarray) -> float:
        return float(np.sum(weight * np.square(x.astype(np.float64) - self._centres[self._nearest(x)])))


class Birch1D(_OneFeature):
    """BIRCH of numbers (Zhang, Ramakrishnan & Livny 1996; Jia 2019): the number of clusters follows from the data.

    threshold: the largest radius (root mean square) of a subcluster; taken in their order, values join the nearest one
    or found their own, as with scikit-learn's Birch of n_clusters None in a node that never splits. sqnr_db: instead,
    as few centres as leave an error that many decibels below the energy of X, above 0 and up to 60, by k-means++ on a
    first clustering and Lloyd's algorithm. random_state: for k-means++.

    Fitted: subcluster_centers_ (k, 1) rising; subcluster_labels_ (k,), 0, 1, ...; labels_ (n,); n_features_in_.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        sqnr_db: float | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.threshold = threshold
        self.sqnr_db = sqnr_db
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> Birch1D:  # noqa: ANN401
        """Cluster X (n, 1)."""
        del y
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        if self.sqnr_db is not None and not 0 < self.sqnr_db <= 60:
            raise ValueError(f"sqnr_db must lie above 0 and up to 60, got {self.sqnr_db}")
        x = self._column(X, reset=True)
        moved, middle, unit, bins = _moved(x)
        if self.sqnr_db is None:
            centres = scan(moved, self.threshold / unit).means
        else:
            energy = float(np.sum(np.square(x.astype(np.float64) / unit)))
            target = energy * 10 ** (-self.sqnr_db / 10) * (1 - _MARGIN)
            leaves = sweep(bins, threshold_of(bins, target))
            centres = birch(bins, leaves, target, _generator(self.random_state)).codebook
        self._keep(x, centres * unit + middle)
        self.subcluster_centers_ = self._centres[:, None]
        self.labels_ = self._nearest(x)
        self.subcluster_labels_ = np.arange(len(self._centres))
        return self


class ProductQuantizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Product quantization (Jegou, Douze & Schmid 2011): each part of a vector is replaced by a codeword.

    n_subvectors: parts of equal length, divides the number of features. n_clusters: codewords of each part, up to
    65536. shared: one codebook serves all parts, as in `codeword.ProductQuantization`. random_state: for the start of
    k-means and, beyond 256 * n_clusters vectors, the sample it is trained on.

    Fitted: codebooks_ (n_subvectors or 1 if shared, k, d / n_subvectors), k the most that a part has distinct, shorter
    ones with their last codeword again; n_features_in_.
    """

    def __init__(
        self,
        n_subvectors: int = 1,
        n_clusters: int = 256,
        *,
        shared: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_subvectors = n_subvectors
        self.n_clusters = n_clusters
        self.shared = shared
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> ProductQuantizer:  # noqa: ANN401
        """Train codebooks on X (n, d)."""
        del y
        _check_count(self, "n_subvectors", self.n_subvectors)
        _check_count(self, "n_clusters", self.n_clusters)
        X = validate_data(self, X, dtype=_FLOATS)
        if X.shape[1] % self.n_subvectors:
            raise ValueError(f"n_subvectors {self.n_subvectors} does not divide the {X.shape[1]} features of X")
        generator = _generator(self.random_state)
        books = [kmeans_vectors(part, self.n_clusters, generator=generator) for part in self._parts(X)]
        most = max(map(len, books))
        self.codebooks_ = np.stack([np.pad(book, ((0, most - len(book)), (0, 0)), mode="edge") for book in books])
        self._n_features_out = self.n_subvectors
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n, n_subvectors) codes of X (n, d), the smallest unsigned dtype that holds them."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_FLOATS)
        parts = zip(self._parts(X), self.codebooks_, strict=True)
        codes = [assign_vectors(part, book).codes.reshape(len(X), -1) for part, book in parts]
        return np.concatenate(codes, axis=1)

    def inverse_transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n, d) float64 vectors that codes X (n, n_subvectors) stand for."""
        check_is_fitted(self)
        codes = _array(X, dtype=np.int64)
        books, k, _ = self.codebooks_.shape
        if codes.shape[1] != self.n_subvectors:
            raise ValueError(f"X has {codes.shape[1]} codes a vector, but there are {self.n_subvectors} subvectors")
        if codes.min() < 0 or codes.max() >= k:
            raise ValueError(f"codes must lie in 0..{k - 1}, got {codes.min()}..{codes.max()}")
        return self.codebooks_[np.arange(self.n_subvectors) % books, codes].reshape(len(codes), -1)

    def score(self, X: Any, y: None = None) -> float:  # noqa: ANN401
        """Minus the mean squared error of X (n, d)."""
        del y
        return _score(self, X)

    def _parts(self, X: np.ndarray) -> np.ndarray:
        """Subvectors by codebook, (codebooks, vectors, d / n_subvectors)."""
        parts = X.reshape(len(X), self.n_subvectors, -1)
        return parts.reshape(1, -1, parts.shape[2]) if self.shared else np.ascontiguousarray(parts.swapaxes(0, 1))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags


class KernelTemplates(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Kernel templates (Chen, Chen & Su 2019): each vector is a * template + b, matched whatever its sign.

    n_templates: up to 65536; fewer come back if there are fewer vectors. offset: whether there is a b. random_state:
    for the start and, beyond 256 * n_templates vectors, the sample that templates are trained on.

    Fitted: templates_ (k, d) of norm 1, and of mean 0 with an offset; labels_ (n,); n_features_in_.
    """

    def __init__(
        self, n_templates: int = 8, *, offset: bool = True, random_state: int | np.random.RandomState | None = None
    ) -> None:
        self.n_templates = n_templates
        self.offset = offset
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> KernelTemplates:  # noqa: ANN401
        """Find templates for X (n, d): a flattened kernel in each row, or any vectors."""
        del y
        _check_count(self, "n_templates", self.n_templates)
        X = validate_data(self, X, dtype=_FLOATS)
        shaped = self._shaped(X)
        self.templates_ = kernel_templates(shaped, self.n_templates, generator=_generator(self.random_state))
        self.labels_ = match_templates(shaped, self.templates_).astype(np.int32)
        self._n_features_out = 3 if self.offset else 2
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n,) int32 index of the template that explains most of each of X (n, d)."""
        check_is_fitted(self)
        return match_templates(self._shaped(self._checked(X)), self.templates_).astype(np.int32)

    def transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n, 3) index of the template, a and b of the least squared error for X (n, d); (n, 2) without an offset."""
        check_is_fitted(self)
        X = self._checked(X)
        labels = match_templates(self._shaped(X), self.templates_)
        matched, alike = self.templates_[labels], np.ones_like(X)
        gains = fit_gains(X, matched, alike, offset=self.offset)
        offsets = [fit_offsets(X, matched, alike, gains)] if self.offset else []
        return np.stack([labels, gains, *offsets], axis=1).astype(X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """(n, d) vectors a * template + b that X, rows as of `transform`, stands for."""
        check_is_fitted(self)
        X = _array(X, dtype=_FLOATS)
        if X.shape[1] != self._n_features_out:
            raise ValueError(f"X has {X.shape[1]} columns, but {self._n_features_out} describe a vector")
        labels = X[:, 0].astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(self.templates_):
            raise ValueError(f"templates must lie in 0..{len(self.templates_) - 1}, got {labels.min()}..{labels.max()}")
        return X[:, 1:2] * self.templates_[labels] + (X[:, 2:] if self.offset else 0)

    def score(self, X: Any, y: None = None) -> float:  # noqa: ANN401
        """Minus the mean squared error of X (n, d)."""
        del y
        return _score(self, X)

    def _checked(self, X: Any) -> np.ndarray:  # noqa: ANN401
        return np.asarray(validate_data(self, X, reset=False, dtype=_FLOATS))

    def _shaped(self, X: np.ndarray) -> np.ndarray:
        return X - X.mean(axis=1, keepdims=True, dtype=np.float64) if self.offset else X

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _moved(
    x: np.ndarray, weight: np.ndarray | None = None, *, centre: bool = True
) -> tuple[np.ndarray, float, float, Bins]:
    """(moved, middle, unit, bins): x = moved * unit + middle, moved (n,) float64 in -1..1; bins of what has a weight.

    Bins are fine and precise around 0, and of float32 where there are many.
    """
    wide = x.astype(np.float64)
    top = float(np.abs(wide).max()) or 1.0
    middle = float(np.average(wide / top, weights=weight)) if centre else 0.0
    moved = wide / top - middle
    spread = float(np.abs(moved).max()) or 1.0
    moved /= spread
    some = slice(None) if weight is None else weight > 0
    bins = make_bins(moved[some][None], importance=None if weight is None else weight[some][None])
    return moved, middle * top, spread * top, bins


def _check_count(estimator: BaseEstimator, name: str, value: Any) -> None:  # noqa: ANN401
    if not isinstance(value, int | np.integer) or not 1 <= value <= 1 << 16:
        raise ValueError(f"{name} of {type(estimator).__name__} must be a whole number in 1..65536, got {value!r}")


def _generator(random_state: int | np.random.RandomState | None) -> np.random.Generator:
    return np.random.default_rng(check_random_state(random_state).randint(1 << 31, dtype=np.int64))


def _array(X: Any, **options: Any) -> np.ndarray:  # noqa: ANN401
    """`check_array`, which has no types of its own."""
    return np.asarray(check_array(X, **options))


def _score(estimator: ProductQuantizer | KernelTemplates, X: Any) -> float:  # noqa: ANN401
    back = estimator.inverse_transform(estimator.transform(X))
    return -float(np.mean(np.square(_array(X, dtype=np.float64) - back)))
