"""Batch norms folded to two vectors: what the net computes in eval mode stays, and the file says what was done."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import codeword
from codeword.errors import PlanError
from codeword.fold import METADATA, Folded, as_stored, eps_of, foldable, norms_of
from codeword.plan import Plan, Rule
from codeword.sources import open_source
from codeword.train import Tuner


def net(eps: float = 1e-5) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32, eps),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (made[1], made[4]):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
    return made.eval()


def arrays(**changes: object) -> dict[str, np.ndarray]:
    """A norm of two channels by hand, and the weight it stands behind."""
    given = {"weight": [2, -1], "bias": [1, 0.5], "running_mean": [3, -2], "running_var": [4, 0.25]} | changes
    norm = {f"bn.{name}": np.array(values, np.float32) for name, values in given.items()}
    return {"fc.weight": np.linspace(-1, 1, 8192, dtype=np.float32).reshape(2, 4096)} | norm


def names(source) -> set[str]:
    return {info.name for info in source.infos}


def test_a_norm_by_hand():
    source = open_source(arrays())
    folded = Folded(source, {"bn": 0.0})
    found = {name: folded.load(f"bn.{name}").tolist() for name in ("weight", "bias", "running_mean", "running_var")}
    # 2 (x - 3) / 2 + 1 = x - 2; -(x + 2) / 0.5 + 0.5 = -2 x - 3.5
    assert found == {"weight": [1, -2], "bias": [-2, -3.5], "running_mean": [0, 0], "running_var": [1, 1]}
    assert np.array_equal(folded.load("fc.weight"), source.load("fc.weight"))
    assert (folded.infos, folded.location) == (source.infos, source.location)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_the_folded_net_computes_the_same(eps):
    model = net(eps)
    source = open_source(model)
    found = foldable(source, names(source), eps_of(model))
    assert found == {"1": eps, "4": eps}
    folded = Folded(source, found)
    again = net(eps)
    again.load_state_dict({info.name: torch.from_numpy(folded.load(info.name).copy()) for info in source.infos})
    assert not torch.equal(again[1].weight, model[1].weight)
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_is_no_norm_of_four_vectors_is_left_alone():
    whole = arrays()
    assert list(norms_of(open_source(whole).infos)) == ["bn"]
    for name in list(whole)[1:]:
        assert not norms_of(open_source({key: it for key, it in whole.items() if key != name}).infos)
    assert not norms_of(open_source(whole | {"bn.bias": np.zeros(3, np.float32)}).infos)
    assert not norms_of(open_source(whole | {"bn.bias": np.zeros(2, np.float16)}).infos)
    tied = torch.nn.Parameter(torch.ones(2))
    assert not norms_of(open_source({**whole, "bn.weight": tied, "other": tied}).infos)
    assert list(norms_of(open_source({name[3:]: it for name, it in whole.items() if name != "fc.weight"}).infos)) == [
        ""
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"running_var": [4, -0.25]},
        {"running_var": [4, np.nan]},
        {"bias": [np.inf, 0]},
        {"weight": [3e38, 1], "running_var": [1e-3, 1]},
        {"running_var": [4, 1e-3]},  # an eps of 1e-3 instead of 1e-5 would change this channel by 29 %
        {"running_mean": [3, 99]},  # and here what the mean takes off
    ],
)  # fmt: skip
def test_norms_that_would_not_stay_the_same_are_left_alone(changes):
    source = open_source(arrays(**changes))
    assert foldable(source, names(source), None) == {}


def test_a_channel_that_hardly_counts_may_have_any_variance():
    source = open_source(arrays(weight=[2, 1e-4], running_mean=[3, 0], running_var=[4, 1e-5]))
    assert foldable(source, names(source), None) == {"bn": 1e-5}
    # Where a module tells eps nothing is assumed; where it knows of no such norm nothing is folded.
    source = open_source(arrays(running_var=[4, 1e-3]))
    assert foldable(source, names(source), {"bn": 1e-3}) == {"bn": 1e-3}
    assert foldable(source, names(source), {"other": 1e-3}) == {}
    assert foldable(source, names(source) - {"bn.running_mean"}, {"bn": 1e-3}) == {}


def test_a_target_folds_and_the_file_says_so(tmp_path):
    model, x = net(1e-3), torch.randn(4, 3, 12, 12)
    made = codeword.fit(model, "4x")
    made.artifact.save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        assert artifact.metadata == {METADATA: "0.001"}
        assert not artifact.decode("1.running_mean").any()
        assert (artifact.decode("4.running_var") == 1).all()
        assert codeword.verify(artifact, model) == []
        report = {it.name: it for it in codeword.inspect(artifact, model).tensors}
        # Compared with what was stored, so that errors are those of rounding.
        assert report["1.running_mean"].exact
        assert report["4.weight"].sqnr_db > 20
        assert report["4.bias"].sqnr_db > 20
        with torch.no_grad():
            error = codeword.swap(model, artifact)(x) - model(x)
        assert error.pow(2).mean() < 0.02 * model(x).var()
        with pytest.raises(PlanError, match="batch norms of this file are folded"):
            Tuner(artifact)
    assert made.kept["1.running_var"] == "folded into their norms' weight and bias"
    plain = codeword.compress(model, "4x", fold_norms=False)
    assert plain.metadata == {}
    assert plain.decode("1.running_mean").any()
    Tuner(plain)


def test_folded_norms_take_about_half():
    model, plan = net(), Plan((Rule("*running*", codeword.methods.Keep()), Rule("*", codeword.methods.Keep(4))))
    whole = Plan((Rule("*", codeword.methods.Keep(4)),))
    folded = codeword.compress(model, plan=Plan(plan.rules, fold_norms=True))
    plain = codeword.compress(model, plan=whole)
    taken = [sum(it.nbytes for it in artifact.entries.values() if it.name[0] in "14") for artifact in (folded, plain)]
    assert taken[0] < 0.6 * taken[1]


def test_lossless_means_the_statistics_too():
    model = net()
    with pytest.warns(codeword.TargetMissed):
        artifact = codeword.compress(model, "0.5x")
    assert artifact.metadata == {}
    for name, values in model.state_dict().items():
        assert artifact.decode(name).tobytes() == values.numpy().tobytes()


def test_the_plan_of_a_target_folds_again(tmp_path):
    model = net()
    made = codeword.fit(model, "6x")
    assert made.plan.fold_norms
    made.plan.save(tmp_path / "plan.toml")
    again = codeword.fit(model, plan=tmp_path / "plan.toml")
    assert again.plan == made.plan
    paths = tmp_path / "a.cw", tmp_path / "b.cw"
    for path, artifact in zip(paths, (made.artifact, again.artifact), strict=True):
        artifact.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_plan_folds_where_it_says_so_and_keeps_the_statistics():
    keep, coarse = codeword.methods.Keep(), codeword.methods.Keep(4)
    rules = (Rule("1.running*", keep), Rule("4.bias", keep), Rule("4.running*", keep), Rule("*", coarse))
    model = net()
    for fold, expected in ((True, '{"1e-05":["1"]}'), (False, None)):
        artifact = codeword.compress(model, plan=Plan(rules, fold_norms=fold))
        assert artifact.metadata.get(METADATA) == expected
        assert artifact.decode("1.running_mean").any() != fold
        assert artifact.decode("4.running_mean").tobytes() == model[4].running_mean.numpy().tobytes()
        assert codeword.inspect(artifact, model).tensors[2].sqnr_db > 20
    with pytest.raises(PlanError, match="fold_norms must be true or false, got 1"):
        Plan.from_dict({"fold_norms": 1, "rule": [{"tensors": "*", "method": "keep"}]})


@pytest.mark.parametrize("text", ["", "x", "[1]", '{"x": ["bn"]}', '{"1": 3}', "null", '["1e-05"]'])
def test_metadata_of_others_under_this_name_do_no_harm(text):
    source = open_source(arrays())
    assert as_stored(source, {METADATA: text}) is source


def test_places_that_are_not_there_are_no_matter():
    source = open_source(arrays())
    stored = as_stored(source, {METADATA: json.dumps({"0.5": ["bn", "gone"]})})
    assert isinstance(stored, Folded)
    assert stored.eps == {"bn": 0.5}
