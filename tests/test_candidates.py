"""Other families beside rate-aware scalars: what they are compared by, and that the better one is taken."""

import math

import numpy as np
import pytest

import codeword
from codeword import KernelTemplates, KMeans, ProductQuantization, Prune, RateAware, candidates
from codeword.artifact import code_tensor
from codeword.cache import Cache, Results
from codeword.candidates import Measured, families, measure, rated, scalars
from codeword.curves import Mixed, Point, curves_of
from codeword.errors import PlanError
from codeword.execute import express
from codeword.kernels.compensate import FAR, NEAR
from codeword.math.moments import Moments
from codeword.sources import open_source


def laplacian(*shape):
    return np.random.default_rng(sum(shape)).laplace(size=shape).astype(np.float32)


def pairs(rows, columns):
    """Neighbours that are nearly equal: made for vectors."""
    each = np.repeat(laplacian(rows, columns // 2), 2, axis=1)
    return (each + 0.02 * laplacian(rows, columns)).astype(np.float32)


def scalar(bits, error, *, compensate):
    return Measured(RateAware(0.1, compensate=compensate), bits, error, error)


def test_a_method_is_rated_beside_scalars_of_as_many_bits_by_the_error_that_says_less():
    references = [scalar(bits, error, compensate=True) for bits, error in ((100, 0.4), (200, 0.1))]
    references += [scalar(bits, error, compensate=False) for bits, error in ((100, 0.2), (200, 0.05))]
    # Half way between 100 and 200 bits scalars have errors 0.2 at the outputs and 0.1 in the weights.
    others = [
        Measured(KMeans(4), 150, weights=0.05, outputs=0.05),
        Measured(KMeans(5), 150, weights=0.1, outputs=0.02),
        Measured(KMeans(6), 150, weights=0.01, outputs=0.3),
        Measured(KMeans(7), 99, weights=0.01, outputs=0.01),
        Measured(KMeans(8), 201, weights=0.01, outputs=0.01),
    ]
    found = {item.method.n_clusters: item.factor for item in rated(references, others)}
    assert found == {4: pytest.approx(0.5), 5: pytest.approx(1), 6: pytest.approx(1.5)}
    assert rated(references[:1], others) == []


class Straight:
    """Scalars of 1000 bits and error 1/8 at lambda 1/1000 that halve their error with each 100 bits."""

    def at(self, lam):
        octaves = -math.log2(lam * 1000)
        return Point(RateAware(lam), 1000 + 100 * octaves, 2 ** (-3 - octaves))


N = 10
OCTAVES = {octave: Straight().at(2.0**octave / 1000) for octave in range(-3, 4)}
# In truth scalars take 10 % more bits than their curve says, and err twice as much.
REFERENCES = [
    Measured(RateAware(2.0**octave / 1000 * N, compensate=compensate), 1.1 * at.bits, 2 * at.cost, 2 * at.cost)
    for octave, at in OCTAVES.items()
    for compensate in (True, False)
]
START = KMeans(8)


def mixed(factors):
    """With methods of a start at lambdas of these octaves, whose errors are so many times those of scalars."""
    measured = [
        Measured(
            RateAware(2.0**octave / 1000 * N, start=START), 1.1 * at.bits, factor * 2 * at.cost, factor * 2 * at.cost
        )
        for octave, factor in factors.items()
        for at in [OCTAVES[octave]]
    ]
    return Mixed(Straight(), N, REFERENCES, measured)


def test_the_lower_hull_by_hand():
    curve = mixed({-1: 0.5, 0: 0.25, 1: 3.0})
    # Cost and lambda * bits: 1/32 + 1 for the method, 1/8 + 1 for scalars.
    found = curve.at(1 / 1000)
    assert found.method.start == START
    assert found.method.lam == pytest.approx(0.01, rel=0.03)  # the minimum is flat
    assert found[1:] == (pytest.approx(1000, rel=0.01), pytest.approx(1 / 32, rel=0.1))
    assert curve.at(64 / 1000).method == RateAware(64 / 1000)  # 400 bits of scalars, and errors as large as you like
    assert mixed({-1: 1.5, 0: 1.01}).at(1 / 1000).method == RateAware(1 / 1000)


def test_between_two_lambdas_of_one_kind_lie_all_others():
    curve, kinds = mixed({-1: 0.5, 1: 0.5}), set()
    for lam in (0.25 / 1000, 0.5 / 1000, 0.6 / 1000, 1 / 1000, 2 / 1000):
        found = curve.at(lam)
        kinds.add(found.method)
        assert found.method.start == START
        octave = math.log2(found.method.lam * 1000 / N)
        assert -1.001 <= octave <= 1.001
        assert found[1:] == (pytest.approx(1000 - 100 * octave, rel=1e-3), pytest.approx(2 ** (-4 + octave), rel=1e-2))
    assert len(kinds) > 1


def test_a_settled_curve_keeps_to_its_kind():
    curve = mixed({-1: 0.5, 1: 0.5})
    assert curve.settled(RateAware(0.7)).at(1 / 1000).method == RateAware(1 / 1000)
    assert curve.settled(RateAware(0.7, start=START)).at(1e-9).method == RateAware(1e-8, start=START)


def test_errors_by_hand():
    error = np.ones((2, 18))
    error[:, ::2] = -1
    error[:, 0] = 2
    plain, outputs = candidates._errors(error, 9, None)
    assert plain == 2 * (17 + 4)
    # Kernels of 9: 2 + 4 - 4 = 2 and -1 + ... = 1 (five of one sign, four of the other); rows: 2 + 1.
    kernels = [error[0, :9].sum(), error[0, 9:].sum()]
    assert kernels == [2, 1]
    assert outputs == pytest.approx((plain + NEAR * 2 * (4 + 1) + FAR * 2 * 9) / (1 + NEAR + FAR))
    assert candidates._errors(error, 9, np.full((2, 18), 4.0))[0] == pytest.approx(4 * plain)
    h = Moments(np.eye(18, dtype=np.float32)[None] + 1)
    weights, measured = candidates._errors(error, 9, h)
    assert (weights, measured) == (pytest.approx(2 * plain), pytest.approx(plain + 2 * 9))


@pytest.mark.parametrize("shape", [(32, 24, 3, 3), (64, 100), (40, 30, 1, 1), (30, 7)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_every_method_of_a_family_fits_the_tensor(shape, granularity):
    weight = laplacian(*shape)
    found = families(shape, granularity)
    assert ("templates" in found) == (shape[2:] == (3, 3))
    some = [methods[len(methods) // 2] for methods in found.values()]
    measured = measure(weight, some, granularity, "w", 0, None)
    assert [item.method for item in measured] == some
    assert all(0 < item.weights <= 1.01 and 0 < item.outputs < 8 and item.bits > 0 for item in measured)


def test_bits_are_those_that_are_coded_and_errors_those_that_are_made():
    weight, method = laplacian(64, 128), KMeans(8)
    (found,) = measure(weight, [method], "tensor", "w", 0, None)
    expr = express(weight, method, "w", 0, None)
    assert found.bits == 8 * code_tensor("w", "float32", weight.shape, expr).nbytes
    made = codeword.compress({"w": weight}, method=method).decode("w")
    relative = np.square(made - weight).sum() / np.square(weight).sum()
    assert found.weights == pytest.approx(relative, rel=1e-5)


@pytest.mark.parametrize(
    "method", [RateAware(0.1), KMeans(8), ProductQuantization(4, 64), Prune(0.7, then=KMeans(8)), KernelTemplates(64)]
)
def test_a_sample_of_rows_says_what_the_whole_would(method, monkeypatch):
    weight = laplacian(256, 64, 3, 3)
    (some,) = measure(weight, [method], "tensor", "w", 0, None)
    monkeypatch.setattr(candidates, "SAMPLE", weight.size)
    (whole,) = measure(weight, [method], "tensor", "w", 0, None)
    assert some.bits == pytest.approx(whole.bits, rel=0.03)
    assert some.weights == pytest.approx(whole.weights, rel=0.05)
    assert some.outputs == pytest.approx(whole.outputs, rel=0.05)


def test_a_constant_tensor_has_no_candidates_that_err():
    assert measure(np.zeros((30, 30), np.float32), scalars("tensor"), "tensor", "w", 0, None) == []


def test_vectors_are_taken_where_they_are_better():
    net = {"w": pairs(128, 128), "v": laplacian(40, 50), "b": laplacian(128)}
    fast, every = (codeword.fit(net, "20x", candidates=kind) for kind in ("fast", "all"))
    for made in (fast, every):
        assert made.missed is None
        assert 0.99 * made.target_nbytes <= made.artifact.nbytes <= made.target_nbytes
    start = next(rule.method.start for rule in every.plan.rules if rule.tensors == "w")
    assert isinstance(start, ProductQuantization)
    errors = [np.square(made.artifact.decode("w") - net["w"]).sum() for made in (fast, every)]
    assert errors[1] < 0.7 * errors[0]


def test_what_was_measured_is_kept(monkeypatch):
    net, held = {"w": pairs(32, 32)}, Cache()
    first = codeword.fit(net, "12x", candidates="all", cache=held)

    def again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(candidates, "measure", again)
    assert codeword.fit(net, "12x", candidates="all", cache=held).plan == first.plan
    with pytest.raises(AssertionError, match="measured again"):
        codeword.fit(net, "12x", candidates="all", cache=held, seed=1)


def test_a_kept_measurement_of_another_kind_is_measured_again():
    source = open_source({"w": pairs(32, 32)})
    results = Results(Cache(), source)
    fresh = curves_of(source, {"w"}, candidates="all", results=results)["w"].at(1e-4)
    for key in list(results._cache._memory):
        results._cache.put(key, b"\x93\x01\x02\x03")
    assert curves_of(source, {"w"}, candidates="all", results=results)["w"].at(1e-4) == fresh


def test_other_candidates_are_an_error():
    with pytest.raises(PlanError, match="candidates must be fast or all, got 'some'"):
        codeword.compress({"w": laplacian(9, 9)}, "8x", candidates="some")
