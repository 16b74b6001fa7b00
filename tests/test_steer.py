"""Tensors made one after another for a size: what came of the first decides how coarse the next are."""

import numpy as np
import pytest

import codeword
from codeword.curves import curves_of, lam_of
from codeword.methods import Keep, RateAware
from codeword.sources import open_source
from codeword.steer import Steering

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def net():
    """Four weights of Laplacian values and a bias."""
    generator = np.random.default_rng(0)
    weights = {name: generator.laplace(size=(64, 128)).astype(np.float32) for name in NAMES}
    return weights | {"bias": generator.normal(size=64).astype(np.float32)}


@pytest.fixture(scope="module")
def first(net):
    return codeword.fit(net, "12x")


def walk(steering, planned, factors):
    """Makes each tensor so much larger than the curve says for the lambda that was chosen; (bytes, octaves moved)."""
    sizes, moved = {}, []
    for name, factor in zip(NAMES, factors, strict=True):
        before = lam_of(steering.methods[name])
        moved.append(np.log2(lam_of(steering.choose(name)) / before))
        # Half a bit a weight an octave, at these rates a little less.
        sizes[name] = round(factor * planned[name] * (1 - 0.2 * moved[-1]))
        steering.made(name, sizes[name])
    return sizes, moved


def plan(net, first, **options):
    methods = {name: method for name, method in first.plan.resolve(open_source(net).infos).items() if name in NAMES}
    assert all(isinstance(method, RateAware) for method in methods.values())
    planned = {name: first.artifact.entries[name].nbytes for name in NAMES}
    offered = curves_of(open_source(net), set(net))
    return Steering(offered, first.artifact, methods, **{"goal": first.artifact.nbytes} | options), planned


def test_where_all_come_as_planned_nothing_moves(net, first):
    steering, planned = plan(net, first)
    sizes, moved = walk(steering, planned, [1, 1, 1, 1])
    assert np.abs(moved).max() < 0.02
    assert abs(sum(sizes.values()) - sum(planned.values())) < 0.003 * sum(planned.values())
    assert steering.factor == pytest.approx(1, abs=0.01)
    assert first.plan.resolve(open_source(net).infos)["bias"] != Keep(8)


def test_the_others_make_up_for_the_first(net, first):
    steering, planned = plan(net, first)
    sizes, moved = walk(steering, planned, [1.2, 1, 1, 1])
    assert moved[0] == pytest.approx(0, abs=0.01)
    assert moved[1] > 0.1  # all three, as far as is known then
    assert sum(moved) > 0.1
    # What is left of the error is what the last one's own bytes were guessed wrong by.
    assert abs(sum(sizes.values()) - sum(planned.values())) < 0.02 * sum(planned.values())


def test_a_factor_that_is_the_same_for_all_is_learned_and_told(net, first):
    steering, planned = plan(net, first)
    walk(steering, planned, [1.1] * 4)
    assert steering.factor == pytest.approx(1.09, abs=0.02)
    again, _ = plan(net, first, factor=steering.factor)
    sizes, moved = walk(again, planned, [1.1] * 4)
    assert moved[0] > 0.2
    assert np.ptp(moved) < 0.15
    assert abs(sum(sizes.values()) - sum(planned.values())) < 0.01 * sum(planned.values())


def test_another_goal_moves_all(net, first):
    total = first.artifact.nbytes
    moved = [walk(*plan(net, first, goal=share * total), [1] * 4)[1] for share in (0.9, 1.1)]
    assert min(moved[0]) > 0.1
    assert max(moved[1]) < -0.1


def test_what_cannot_be_reached_ends_at_the_ends(net, first):
    for goal, end in ((0, 3), (10 * first.artifact.nbytes, -3)):
        _, moved = walk(*plan(net, first, goal=goal), [1] * 4)
        assert moved == pytest.approx([end] * 4, abs=0.01)


def test_methods_without_a_lambda_stay(net, first):
    methods = {"a": RateAware(0.1), "b": Keep(4)}
    steering = Steering(curves_of(open_source(net), set(net)), first.artifact, methods, 0.5 * first.artifact.nbytes)
    assert steering.choose("b") == Keep(4)
    steering.made("b", 4000)
    assert lam_of(steering.choose("a")) > 0.1
    assert steering.methods["b"] == Keep(4)
