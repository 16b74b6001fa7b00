"""k-means on vectors and product quantization: by hand, by brute force, and what must hold on any data."""

import itertools

import msgspec
import numpy as np
import pytest
import torch

import codeword
from codeword import Keep, Plan, Rule
from codeword.artifact import code_tensor
from codeword.errors import MissingDependencyError, PlanError
from codeword.expr import DTYPES, Affine, Lookup, Raw, Reshape, Sum, decode, leaves, lookups
from codeword.math import vectors as module
from codeword.math.vectors import assign_vectors, kmeans_vectors
from codeword.methods import BuiltIn, Method, ProductQuantization
from round_trip import error, restored

METHODS = [
    ProductQuantization(3, 8),
    ProductQuantization(3, 8, granularity="row"),
    ProductQuantization(3, 8, group_size=10),
    ProductQuantization(3, 8, codebook_dtype="float32"),
    ProductQuantization(3, 8, codebook_dtype="float16"),
    ProductQuantization(3, 8, codebook_dtype="bfloat16", residual_stages=1),
    ProductQuantization(3, 8, skip_zeros=True, residual_stages=2, group_size=5),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def laplacian(*dims, seed=0):
    return generator(seed).laplace(size=dims).astype(np.float32)


def compress(method, weight, importance=None, seed=0):
    return method.compress(weight, importance, generator=generator(seed))


def brute_force(vectors, k, h):
    """(least weighted SSE of all clusterings, its codebook)."""
    best = np.inf, np.zeros(0)
    for codes in itertools.product(range(k), repeat=len(vectors)):
        member = np.eye(k)[list(codes)].T
        mass = np.maximum(member @ h, 1e-30)
        book = member @ (h * vectors) / mass
        best = min(best, (float((h * (vectors - book[list(codes)]) ** 2).sum()), book), key=lambda found: found[0])
    return best


# -- k-means on vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_lloyd_stays_at_the_optimum_of_small_problems_and_finds_it_or_nearly(weighted, seed):
    vectors = generator(seed).normal(size=(7, 2))
    h = generator(seed + 9).uniform(0.1, 4, size=(7, 2)) if weighted else None
    least, optimum = brute_force(vectors, 3, np.ones((7, 2)) if h is None else h)
    assert assign_vectors(vectors, optimum, h).sse == pytest.approx(least, rel=1e-5)
    frame = module._Frame.around(vectors, 10)
    moved = (optimum - frame.centre) / frame.scale
    np.testing.assert_allclose(module._lloyd(frame.moved(vectors), h, moved, 5), moved, atol=1e-5)
    books = [kmeans_vectors(vectors, 3, generator=generator(start), importance=h) for start in range(20)]
    assert least * 0.9999 <= min(assign_vectors(vectors, book, h).sse for book in books) <= 1.05 * least


def test_by_hand():
    vectors = np.array([[0, 0], [0, 1], [10, 0], [10, 2], [10, 4]], np.float32)
    book = kmeans_vectors(vectors, 2, generator=generator())
    np.testing.assert_allclose(book[np.argsort(book[:, 0])], [[0, 0.5], [10, 2]], atol=1e-5)
    found = assign_vectors(vectors, np.array([[0, 0.5], [10, 2]]))
    assert found.codes.tolist() == [0, 0, 1, 1, 1]
    assert found.sse == pytest.approx(0.5 + 8)


def test_entries_without_importance_have_no_say():
    vectors = np.array([[1, 50], [1.1, -70], [5, 3], [5.1, 2]])
    h = np.array([[1, 0], [1, 0], [1, 1], [1, 1]])
    book = kmeans_vectors(vectors, 2, generator=generator(), importance=h)
    found = assign_vectors(vectors, book, h)
    assert found.codes[0] == found.codes[1] != found.codes[2] == found.codes[3]
    np.testing.assert_allclose(book[found.codes[2]], [5.05, 2.5], rtol=1e-5)
    assert book[found.codes[0], 0] == pytest.approx(1.05)
    assert found.sse == pytest.approx(0.005 + 0.005 + 0.5, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("offset", [0, 100])
def test_assignment_is_the_nearest_at_any_scale_and_place(scale, offset):
    vectors, book = (laplacian(n, 5, seed=n) + np.float32(offset) for n in (300, 17))
    h = generator(2).uniform(size=(300, 5)).astype(np.float32)
    costs = (h[:, None] * (vectors[:, None] - book[None]) ** 2).sum(axis=2)
    found = assign_vectors(vectors.astype(np.float64) * scale, book.astype(np.float64) * scale, h / scale)
    np.testing.assert_array_equal(found.codes, costs.argmin(axis=1))
    assert found.sse == pytest.approx(scale * costs.min(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_penalty_sends_vectors_to_codewords_that_cost_less(weighted):
    vectors, book = laplacian(300, 3), laplacian(9, 3, seed=1)
    h = generator(2).uniform(size=(300, 3)) if weighted else np.ones((300, 3))
    penalty = generator(3).uniform(0, 3, size=9)
    errors = (h[:, None] * (vectors[:, None] - book[None]) ** 2).sum(axis=2)
    found = assign_vectors(vectors, book, h if weighted else None, penalty=penalty)
    np.testing.assert_array_equal(found.codes, (errors + penalty).argmin(axis=1))
    assert found.sse == pytest.approx(errors[np.arange(300), found.codes].sum(), rel=1e-5)
    by_hand = assign_vectors(np.array([[0.0], [0.9]]), np.array([[0.0], [1.0]]), penalty=np.array([0.0, 1.0]))
    assert by_hand.codes.tolist() == [0, 0]
    assert by_hand.sse == pytest.approx(0.81)


@pytest.mark.parametrize("k", [5, 6, 100])
def test_few_distinct_vectors_come_back_exactly(k):
    distinct = np.array([[1, 2], [1, np.nextafter(2, 3)], [-1e30, 0], [0, 0], [3, 3]])
    vectors = distinct[generator().integers(0, 5, 200)]
    book = kmeans_vectors(vectors, k, generator=generator())
    np.testing.assert_array_equal(np.unique(book, axis=0), np.unique(distinct, axis=0))


def test_empty_clusters_move_to_where_the_error_is():
    vectors = np.concatenate([np.zeros((500, 2)), generator().normal(50, 1, (40, 2)), [[900, 900]]])
    x = module._Frame.around(vectors, 900).moved(vectors)
    book = module._lloyd(x, None, np.tile(x[:1], (6, 1)).astype(np.float64), 25)
    codes, _ = module.nearest(x, None, book, None)
    assert len(np.unique(codes)) == 6
    assert np.sum(codes == codes[-1]) == 1


def test_more_codewords_less_error_and_a_sample_is_nearly_as_good(monkeypatch):
    vectors = laplacian(6000, 4)
    errors = [assign_vectors(vectors, kmeans_vectors(vectors, k, generator=generator())).sse for k in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sum((vectors - vectors.mean(axis=0, dtype=np.float64)) ** 2), rel=1e-6)
    monkeypatch.setattr(module, "_TRAINED", 32)
    assert assign_vectors(vectors, kmeans_vectors(vectors, 16, generator=generator())).sse < 1.05 * errors[2]


def test_the_generator_decides_all():
    vectors = laplacian(900, 3)
    first, second, other = (kmeans_vectors(vectors, 9, generator=generator(seed)) for seed in (0, 0, 1))
    assert first.tobytes() == second.tobytes() != other.tobytes()


def test_faiss_is_as_good_where_it_is_installed():
    pytest.importorskip("faiss")
    vectors = laplacian(5000, 4)
    ours, theirs = (
        assign_vectors(vectors, kmeans_vectors(vectors, 32, generator=generator(), engine=engine)).sse
        for engine in ("numpy", "faiss")
    )
    assert ours == pytest.approx(theirs, rel=0.03)


def test_faiss_asked_for_and_missing_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r'pip install "codeword\[faiss\]"'):
        compress(ProductQuantization(2, 4, engine="faiss"), laplacian(10, 10))


# -- product quantization -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dims", [(10, 6), (20, 3, 3, 3), (10, 1, 9)])
def test_shape_and_expression(method, dims):
    weight = laplacian(*dims)
    expr = compress(method, weight)
    assert isinstance(method, Method)
    found = restored(expr, weight)
    assert (found.shape, found.dtype) == (dims, np.float32)
    assert error(found, weight) < 0.6
    groups = 1 if method.group_size is None else dims[0] // method.group_size
    for lookup in lookups(expr):
        assert lookup.codes.shape == (groups, dims[0] // groups, weight[0].size // 3)
        assert lookup.codebook.shape[::2] == (groups, 3)
    assert len(list(lookups(expr))) == 1 + method.residual_stages


def test_the_expressions_by_pattern():
    weight = laplacian(6, 8)
    match compress(ProductQuantization(4, 5, codebook_dtype="float16"), weight):
        case Reshape(Lookup(codes, codebook), (6, 8)):
            assert (codes.shape, codes.dtype, codebook.dtype) == ((1, 6, 2), np.uint8, np.float16)
        case other:
            pytest.fail(f"another expression: {other}")
    match compress(ProductQuantization(4, 300, granularity="row", residual_stages=1), laplacian(60, 80)):
        case Reshape(Affine(Sum((Affine(Lookup(codes), step, None), Affine(Lookup(), _, None))), scales, None)):
            assert (codes.dtype, step.shape, scales.shape) == (np.uint16, (1, 1, 1), (60, 1, 1))
        case other:
            pytest.fail(f"another expression: {other}")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-140, 2.0**100])
def test_the_scale_of_the_weights_does_not_matter(method, scale):
    weight = laplacian(20, 30)
    scaled = (weight.astype(np.float64) * scale).astype(np.float32)
    expected = error(decode(compress(method, weight)), weight)
    found = decode(compress(method, scaled))
    assert error(found, scaled) == pytest.approx(expected, rel=0.05, abs=0.2 if scale < 2.0**-126 else 0)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, DTYPES["bfloat16"], np.float64], ids=str)
def test_every_floating_dtype(method, dtype):
    weight = laplacian(20, 30).astype(dtype)
    found = restored(compress(method, weight), weight)
    assert found.dtype == weight.dtype
    assert error(found, weight) < 0.6


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, 3.4e38])
def test_constants_come_back(method, value):
    weight = np.full((10, 6), value, np.float32)
    tolerance = {"bfloat16": 2.0**-8, "float16": 2.0**-10}.get(method.codebook_dtype, 1e-6)
    np.testing.assert_allclose(decode(compress(method, weight)), weight, rtol=tolerance)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_huge_outlier_stays_finite(method):
    weight = laplacian(20, 30)
    weight[7, 9] = 1e30
    found = decode(compress(method, weight))
    assert np.isfinite(found).all()
    assert found[7, 9] == pytest.approx(1e30, rel=0.1)


@pytest.mark.parametrize("dims", [(0,), (0, 4), (4, 0), (2, 0, 3, 3)])
def test_empty_tensors(dims):
    assert isinstance(compress(ProductQuantization(2), np.zeros(dims, np.float32)), Raw)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_is_a_pure_function(method):
    weight = laplacian(10, 12)
    before = weight.copy()
    first, second = (list(leaves(compress(method, weight))) for _ in range(2))
    assert [(path, array.tobytes()) for path, array in first] == [(path, array.tobytes()) for path, array in second]
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_importance_moves_error_to_where_it_costs_less(method):
    weight, importance = laplacian(40, 60), np.ones((40, 60), np.float32)
    importance[:, :6] = 100
    plain, weighted = (decode(compress(method, weight, h)) for h in (None, importance))
    assert error(weighted[:, :6], weight[:, :6]) < 0.9 * error(plain[:, :6], weight[:, :6])
    assert np.isfinite(decode(compress(method, weight, np.zeros_like(weight)))).all()


def test_stages_and_codewords_lower_the_error():
    weight = laplacian(60, 80)
    stages = [error(decode(compress(ProductQuantization(4, 16, residual_stages=n), weight)), weight) for n in range(4)]
    clusters = [error(decode(compress(ProductQuantization(4, k), weight)), weight) for k in (4, 16, 64, 256)]
    for errors in (stages, clusters):
        assert all(after < 0.9 * before for before, after in itertools.pairwise(errors))


def test_pruned_weights_stay_zero_and_the_others_gain():
    weight = np.where(generator(3).uniform(size=(60, 80)) < 0.7, 0, laplacian(60, 80))
    plain = compress(ProductQuantization(4, 16), weight)
    masked = compress(ProductQuantization(4, 16, skip_zeros=True), weight)
    assert np.all(decode(masked)[weight == 0] == 0)
    assert error(decode(masked), weight) < 0.6 * error(decode(plain), weight)
    dense = compress(ProductQuantization(4, 16, skip_zeros=True), laplacian(6, 8))
    assert len(list(leaves(dense))) == len(list(leaves(plain)))  # nothing is pruned: no mask


def test_codewords_of_eight_bits_cost_little_and_save_much():
    weight = laplacian(100, 160)
    exprs = [compress(ProductQuantization(8, 256, codebook_dtype=dtype), weight) for dtype in ("float32", "int8")]
    sizes = [code_tensor("w", "float32", weight.shape, expr).nbytes for expr in exprs]
    errors = [error(decode(expr), weight) for expr in exprs]
    assert sizes[1] < 0.55 * sizes[0]
    assert errors[1] < 1.01 * errors[0]


def test_a_codebook_for_each_group_of_rows():
    weight = np.concatenate([laplacian(30, 40), 5 + laplacian(30, 40, seed=1)])
    one, two = (decode(compress(ProductQuantization(4, 8, group_size=n), weight)) for n in (None, 30))
    assert error(two, weight) < error(one, weight)


def test_rows_that_no_vector_fits_are_taken_as_one():
    weight = laplacian(20, 1, 5, 5)
    expr = compress(ProductQuantization(4, 8), weight)
    assert next(lookups(expr)).codes.shape == (1, 1, 125)
    assert decode(expr).shape == weight.shape


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ProductQuantization(1), r"cluster_dim must lie in 2\.\.16, got 1"),
        (lambda: ProductQuantization(17), "17"),
        (lambda: ProductQuantization(2, 0), r"n_clusters must lie in 1\.\.65536, got 0"),
        (lambda: ProductQuantization(2, group_size=0), "group_size must be at least 1, got 0"),
        (lambda: ProductQuantization(2, residual_stages=-1), r"residual_stages must lie in 0\.\.8, got -1"),
        (lambda: compress(ProductQuantization(4), laplacian(3, 10)), r"the 10 weights .*\(3, 10\); valid are 2, 5, 10"),
        (lambda: compress(ProductQuantization(4), laplacian(17)), "no other does either"),
        (lambda: compress(ProductQuantization(4, granularity="row"), laplacian(4, 10)), "does not divide"),
        (lambda: compress(ProductQuantization(2, group_size=3), laplacian(4, 10)), "group_size 3 does not divide 4"),
    ],
)
def test_wrong_options_are_plan_errors(build, says):
    with pytest.raises(PlanError, match=says):
        build()


def test_from_a_plan_to_a_file_to_a_net(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 6))
    plan = Plan(
        (
            Rule("0.weight", ProductQuantization(9, 4)),
            Rule("3.weight", ProductQuantization(4, 8, residual_stages=1, group_size=3)),
            Rule("*", Keep()),
        )
    )
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    for method in METHODS:
        assert msgspec.convert(msgspec.to_builtins(method), BuiltIn) == method
    codeword.compress(net, plan=plan).save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        swapped = codeword.swap(net, artifact)
        dense = {name: torch.from_numpy(np.array(artifact.decode(name))) for name in artifact}
    x = torch.randn(3, 2, 4, 4)
    net.load_state_dict(dense)
    torch.testing.assert_close(swapped(x), net(x))
