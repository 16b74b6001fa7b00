"""Codeword's clustering behind scikit-learn's interface: its own checks of an estimator, and facts by hand."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn import cluster as peers
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

from codeword.cluster import Birch1D, KernelTemplates, KMeans1D, ProductQuantizer


class FirstFeature:
    """Takes the first of many features: nearly all checks of scikit-learn feed more than the one that there may be."""

    def _column(self, X, *, reset):
        return validate_data(self, X, reset=reset, dtype=(np.float64, np.float32))[:, 0]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


class KMeansOfFirst(FirstFeature, KMeans1D):
    pass


class BirchOfFirst(FirstFeature, Birch1D):
    pass


@parametrize_with_checks(
    [
        KMeansOfFirst(),
        KMeansOfFirst(zero=True),
        BirchOfFirst(),
        BirchOfFirst(sqnr_db=8.0),
        ProductQuantizer(n_clusters=16),
        ProductQuantizer(n_clusters=16, shared=True),
        KernelTemplates(),
        KernelTemplates(offset=False),
    ]
)
def test_scikit_learn_takes_them_for_its_own(estimator, check):
    check(estimator)


# KMeans1D


def test_kmeans_by_hand():
    x = np.array([[0.0], [1.0], [10.0], [11.0], [12.0], [-5.0]])
    found = KMeans1D(3).fit(x)
    assert found.cluster_centers_.tolist() == [[-5.0], [0.5], [11.0]]
    assert found.labels_.tolist() == [1, 1, 2, 2, 2, 0]
    assert found.inertia_ == 2.5
    assert found.predict([[5.75], [5.76]]).tolist() == [1, 2]  # half way goes down
    assert found.transform([[1.0]]).tolist() == [[6.0, 0.5, 10.0]]
    assert found.score([[0.0], [11.5]]) == -0.5
    assert found.get_feature_names_out().tolist() == ["kmeans1d0", "kmeans1d1", "kmeans1d2"]


def test_weights_by_hand_as_repetition():
    x = np.array([[0.0], [1.0], [5.0], [9.0]])
    weighted = KMeans1D(2).fit(x, sample_weight=[3, 1, 0, 2])
    assert weighted.cluster_centers_[:, 0].tolist() == pytest.approx([0.25, 9.0])
    assert weighted.inertia_ == pytest.approx(0.75)
    assert weighted.labels_.tolist() == [0, 0, 1, 1]  # what weighs nothing has a label, too


def test_zero_is_a_centre_and_has_what_is_near():
    x = np.array([[-8.0], [-8.2], [0.5], [1.0], [9.0]])
    found = KMeans1D(3, zero=True).fit(x)
    np.testing.assert_allclose(found.cluster_centers_[:, 0], [-8.1, 0.0, 9.0], rtol=1e-15)
    assert found.inertia_ == pytest.approx(0.02 + 0.25 + 1.0)


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform", "exponential"])
@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_run_of_scikit_learn_is_better(draw, k, dtype):
    x = getattr(np.random.default_rng(k), draw)(size=(3000, 1)).astype(dtype)
    peer = peers.KMeans(k, n_init=3, random_state=0).fit(x)
    found = KMeans1D(k).fit(x)
    assert found.inertia_ <= peer.inertia_ * (1 + 1e-6)
    assert found.cluster_centers_.dtype == found.transform(x).dtype == dtype
    np.testing.assert_array_equal(found.labels_, np.argmin(found.transform(x.astype(np.float64)), axis=1))


@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1e-3), (-40.0, 1e-9), (0.0, 1e-200), (0.0, 1e150), (1.7e9, 1.0)])
def test_neither_offset_nor_scale_costs_precision(offset, scale):
    x = np.random.default_rng(0).integers(0, 50, size=(1000, 1)) / 64
    plain = KMeans1D(5).fit(x)
    moved = KMeans1D(5).fit(x * scale + offset)
    np.testing.assert_array_equal(moved.labels_, plain.labels_)


def test_many_values_with_an_offset_are_clustered_as_well_as_without():
    x = np.random.default_rng(0).normal(size=(300_000, 1))
    plain, moved = KMeans1D(16).fit(x), KMeans1D(16).fit(x + 1e6)
    np.testing.assert_allclose(moved.cluster_centers_ - 1e6, plain.cluster_centers_, atol=1e-3)
    assert moved.inertia_ == pytest.approx(plain.inertia_, rel=1e-5)


def test_fewer_distinct_values_than_clusters():
    found = KMeans1D(8).fit([[2.0], [1.0], [2.0]])
    assert found.cluster_centers_.tolist() == [[1.0], [2.0]]
    assert found.inertia_ == 0
    assert KMeans1D(8).sse_curve([[2.0], [1.0], [2.0]]).tolist() == pytest.approx([2 / 3, 0, 0, 0, 0, 0, 0, 0])


def test_the_curve_tells_the_inertia_of_every_k():
    x = np.random.default_rng(1).normal(size=(2000, 1))
    curve = KMeans1D(12).sse_curve(x)
    np.testing.assert_allclose(curve, [KMeans1D(k).fit(x).inertia_ for k in range(1, 13)], rtol=1e-2)
    assert not hasattr(KMeans1D(12), "cluster_centers_")


@pytest.mark.parametrize("estimator", [KMeans1D(), Birch1D()], ids=str)
def test_more_than_one_feature_is_told_with_the_way_out(estimator):
    with pytest.raises(ValueError, match=r"one feature, but X has 3: .*reshape\(-1, 1\)"):
        estimator.fit(np.zeros((4, 3)))


# Birch1D


@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.02])
def test_birch_finds_the_subclusters_of_scikit_learn(threshold):
    x = np.random.default_rng(3).normal(size=(2000, 1))
    peer = peers.Birch(threshold=threshold, n_clusters=None, branching_factor=10_000).fit(x)
    found = Birch1D(threshold).fit(x)
    np.testing.assert_allclose(found.subcluster_centers_, np.sort(peer.subcluster_centers_, axis=0), rtol=1e-7)


def test_birch_by_hand():
    found = Birch1D(threshold=1.5).fit([[0.0], [10.0], [2.0], [5.0]])
    assert found.subcluster_centers_[:, 0].tolist() == pytest.approx([1.0, 5.0, 10.0])
    assert found.labels_.tolist() == [0, 2, 0, 1]
    assert found.subcluster_labels_.tolist() == [0, 1, 2]


@pytest.mark.parametrize("sqnr_db", [5.0, 20.0, 35.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_birch_meets_the_error_that_is_allowed(sqnr_db, dtype):
    x = np.random.default_rng(4).normal(size=(5000, 1)).astype(dtype)
    found = Birch1D(sqnr_db=sqnr_db, random_state=0).fit(x)
    error = np.square(x.astype(np.float64) - found.subcluster_centers_[found.labels_])
    assert 10 * np.log10(np.sum(np.square(x.astype(np.float64))) / error.sum()) >= sqnr_db
    assert len(found.subcluster_centers_) < 200


# ProductQuantizer


def test_products_by_hand():
    x = np.array([[0.0, 0, 5, 5], [9, 9, 5, 5], [0, 0, 7, 7]])
    found = ProductQuantizer(2, 2, random_state=0).fit(x)
    assert found.codebooks_.shape == (2, 2, 2)
    codes = found.transform(x)
    assert codes.shape == (3, 2)
    assert codes.dtype == np.uint8
    assert found.inverse_transform(codes).tolist() == x.tolist()
    assert found.score(x) == 0
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2"):
        found.inverse_transform([[0, 2]])
    with pytest.raises(ValueError, match="3 codes a vector, but there are 2 subvectors"):
        found.inverse_transform([[0, 1, 0]])


def test_parts_with_fewer_distinct_vectors_than_others():
    x = np.column_stack([np.zeros(9), np.arange(9.0)])
    found = ProductQuantizer(2, 16).fit(x)
    assert found.codebooks_.shape == (2, 9, 1)
    np.testing.assert_array_equal(found.inverse_transform(found.transform(x)), x)


def test_one_codebook_for_all_parts():
    x = np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 2.0]])
    found = ProductQuantizer(2, 4, shared=True).fit(x)
    assert found.codebooks_.shape == (1, 2, 2)
    np.testing.assert_array_equal(found.inverse_transform(found.transform(x)), x)


def test_products_are_no_worse_than_scikit_learn_by_part():
    x = np.random.default_rng(1).normal(size=(2000, 12))
    found = ProductQuantizer(3, 32, random_state=0).fit(x)
    peer = sum(peers.KMeans(32, n_init=1, random_state=0).fit(x[:, at : at + 4]).inertia_ for at in (0, 4, 8))
    assert -found.score(x) <= 1.03 * peer / x.size
    again = clone(found).fit(x)
    np.testing.assert_array_equal(again.codebooks_, found.codebooks_)


def test_parts_that_do_not_divide_the_features():
    with pytest.raises(ValueError, match="n_subvectors 3 does not divide the 4 features"):
        ProductQuantizer(3).fit(np.zeros((5, 4)))


def test_many_codewords_need_wider_codes():
    x = np.random.default_rng(6).normal(size=(400, 2))
    codes = ProductQuantizer(1, 300, random_state=0).fit_transform(x)
    assert codes.dtype == np.uint16


# KernelTemplates


@pytest.mark.parametrize("offset", [True, False])
def test_multiples_of_one_direction_come_back(offset):
    shape = np.array([1.0, -2.0, 1.0, 0.0])
    gains = np.array([3.0, -0.5, 1.0, 7.0])
    x = gains[:, None] * shape + (np.arange(4.0)[:, None] if offset else 0)
    found = KernelTemplates(1, offset=offset, random_state=0).fit(x)
    assert abs(found.templates_ @ shape / np.sqrt(6)) == pytest.approx(1)
    rows = found.transform(x)
    assert rows.shape == (4, 3 if offset else 2)
    np.testing.assert_allclose(np.abs(rows[:, 1]), np.abs(gains) * np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(found.inverse_transform(rows), x, atol=1e-6)
    assert found.score(x) == pytest.approx(0, abs=1e-12)
    assert found.labels_.tolist() == [0, 0, 0, 0]


def test_templates_know_no_sign_and_more_of_them_leave_less():
    x = np.random.default_rng(7).normal(size=(500, 9)).astype(np.float32)
    scores = [KernelTemplates(k, random_state=0).fit(x).score(x) for k in (1, 8, 64)]
    assert scores == sorted(scores)
    found = KernelTemplates(8, random_state=0).fit(x)
    np.testing.assert_array_equal(found.predict(-x), found.predict(x))
    assert found.transform(x).dtype == np.float32
    with pytest.raises(ValueError, match=r"0\.\.7, got 8\.\.8"):
        found.inverse_transform([[8.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="X has 2 columns, but 3 describe a vector"):
        found.inverse_transform([[0.0, 1.0]])


# Wrong parameters, and none to import


@pytest.mark.parametrize(
    ("estimator", "says"),
    [
        (KMeans1D(0), "n_clusters of KMeans1D must be a whole number in 1..65536, got 0"),
        (KMeans1D(2.0), "got 2.0"),
        (Birch1D(-1.0), "threshold must be at least 0, got -1.0"),
        (Birch1D(float("nan")), "threshold must be at least 0, got nan"),
        (Birch1D(sqnr_db=61), "up to 60, got 61"),
        (ProductQuantizer(0), "n_subvectors of ProductQuantizer"),
        (ProductQuantizer(1, 1 << 17), "got 131072"),
        (KernelTemplates(0), "n_templates of KernelTemplates"),
    ],
)
def test_wrong_parameters(estimator, says):
    with pytest.raises(ValueError, match=says):
        estimator.fit(np.zeros((4, 1)))


def test_without_scikit_learn_the_extra_is_named():
    code = """
import sys
sys.modules["sklearn"] = None
import codeword
from codeword.errors import MissingDependencyError
try:
    import codeword.cluster
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == 'codeword.cluster needs scikit-learn: pip install "codeword[sklearn]"', done.stderr


def test_importing_codeword_imports_no_scikit_learn():
    code = "import sys, codeword; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
