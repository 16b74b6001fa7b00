"""The dry run: what it predicts beside files really made, the plan it writes, and what it never does."""

import json

import msgspec
import numpy as np
import pytest

import codeword
from codeword import FixedPoint, Keep, KMeans, Plan, ProductQuantization, Prune, RateAware, zoo
from codeword.curves import Point
from codeword.errors import NonFiniteError, PlanError, TargetError
from codeword.forecast import Added, header_nbytes, stored
from codeword.plan import method_line, parse_method
from codeword.sources import TensorInfo
from test_allocate import laplacian, normed
from test_cli import invoke, invoke_json, runner

LENET = zoo.lenet5_path()
BYTES = 0.03  # of those of the file really made
ERROR = 0.1


def made_by(found, net, **options):
    return codeword.compress(net, plan=Plan.from_dict(found.plan), **options)


@pytest.mark.parametrize("target", ["8x", "20x", "40x", "1.5bpw", "120KB"])
def test_lenet5_comes_out_as_predicted(target):
    found = codeword.dry_run(LENET, target)
    artifact = made_by(found, LENET)
    assert found.nbytes == pytest.approx(artifact.nbytes, rel=BYTES)
    assert 0.99 * found.target_nbytes <= found.nbytes <= found.target_nbytes
    assert found.dense_nbytes == artifact.dense_nbytes
    assert found.ratio == found.dense_nbytes / found.nbytes
    assert found.missed is None
    report = codeword.inspect(artifact, LENET)
    for tensor, measured in zip(found.tensors, report.tensors, strict=True):
        assert (tensor.name, tensor.shape) == (measured.name, measured.shape)
        if measured.n_clusters is not None and tensor.bits_per_weight > 1:
            assert 10 ** (-measured.sqnr_db / 10) == pytest.approx(tensor.error, rel=ERROR)
            assert measured.nbytes == pytest.approx(tensor.nbytes, rel=0.1)


@pytest.mark.parametrize("target", ["3x", "6x", "12x"])
def test_a_net_with_norms_comes_out_as_predicted(target):
    net = normed()
    found = codeword.dry_run(net, target)
    assert found.nbytes == pytest.approx(made_by(found, net).nbytes, rel=BYTES)


def test_the_totals_are_those_of_the_tensors():
    found = codeword.dry_run(LENET, "20x")
    assert found.nbytes == pytest.approx(found.header_nbytes + sum(tensor.nbytes for tensor in found.tensors), abs=1)
    errors = [tensor.error for tensor in found.tensors if tensor.error > 0]
    assert found.error == pytest.approx(np.mean(errors))
    for tensor in found.tensors:
        assert tensor.bits_per_weight == pytest.approx(8 * tensor.nbytes / np.prod(tensor.shape))
        assert tensor.sqnr_db == pytest.approx(-10 * np.log10(tensor.error))


def test_the_same_forecast_each_time_but_for_what_was_timed():
    first, second = (msgspec.to_builtins(codeword.dry_run(LENET, "20x", seed=3)) for _ in range(2))
    assert first["plan"]["seed"] == 3
    assert first["seconds"] > 0
    assert first["peak_nbytes"] > 1 << 24
    for facts in (first, second):
        del facts["seconds"], facts["peak_nbytes"]
    assert first == second


def test_a_forecast_survives_json():
    found = codeword.dry_run(LENET, "20x")
    assert msgspec.json.decode(msgspec.json.encode(found), type=codeword.Forecast) == found


def test_nothing_is_compressed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run made a file")

    monkeypatch.setattr("codeword.job.run", refuse)
    monkeypatch.setattr("codeword.job.allocate.fit", refuse)
    assert codeword.dry_run(LENET, "20x").nbytes < 90_000


def test_what_may_not_change_is_predicted_exactly():
    net = {"w.weight": laplacian(64, 96), "kept.weight": laplacian(32, 32), "steps": np.arange(5)}
    found = {t.name: t for t in codeword.dry_run(net, "3x", exclude=["kept.*"]).tensors}
    assert (found["kept.weight"].nbytes, found["kept.weight"].method) == (4096, "keep")
    assert (found["steps"].nbytes, found["steps"].error, found["steps"].sqnr_db) == (40, 0, None)
    assert found["w.weight"].method.startswith("rate-aware:lam=")


def test_tied_tensors_count_once():
    import torch

    net = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64)})
    net["b"].weight = net["a"].weight
    found = codeword.dry_run(net, "8x")
    assert [t.tied_to for t in found.tensors if t.name == "b.weight"] == ["a.weight"]
    assert found.dense_nbytes == 4 * (64 * 64 + 128)
    assert found.nbytes == pytest.approx(made_by(found, net).nbytes, rel=0.1)


def test_a_target_out_of_reach_is_told():
    found = codeword.dry_run(LENET, "100B")
    assert found.missed == f"target 100B is 100 bytes; the smallest file would have about {found.nbytes}"


def test_calibration_data_are_looked_at():
    plain = codeword.dry_run(LENET, "40x")
    found = codeword.dry_run(LENET, "40x", data="digits", net=zoo.lenet5_trained())
    assert found.nbytes == pytest.approx(plain.nbytes, rel=0.01)
    assert found.seconds > 0


def test_wrong_arguments_are_those_of_compress():
    with pytest.raises(TargetError, match="target 'small'"):
        codeword.dry_run(LENET, "small")
    with pytest.raises(PlanError, match="is only weights"):
        codeword.dry_run(LENET, "20x", data="digits")
    with pytest.raises(PlanError, match="matches none"):
        codeword.dry_run(LENET, "20x", include=["nothing.*"])
    with pytest.raises(NonFiniteError, match="keep-nonfinite"):
        codeword.dry_run({"w": np.full((64, 64), np.nan, np.float32)}, "4x")
    found = codeword.dry_run({"w": np.full((64, 64), np.nan, np.float32)}, "4x", keep_nonfinite=True)
    assert found.tensors[0].method == "keep"
    assert found.missed is not None


def test_a_point_as_it_is_stored():
    info = TensorInfo("w", (100, 100), "float32", "linear")
    assert stored(Point(Keep(), 20_000.0, 0.1), info) == Point(Keep(), 20_000.0, 0.1)
    for method in (Keep(7), FixedPoint(5)):
        assert stored(Point(method, 700.0, 0.1), TensorInfo("b", (50,), "float32", "bias")).bits == 700
    more = stored(Point(RateAware(0.1), 20_000.0, 0.1), info, Added(0.05, 1.2))
    assert more.bits == pytest.approx(20_000 + 500 + 4 * 2**2)
    assert more.cost == pytest.approx(0.12)


def test_a_header_grows_with_its_names():
    assert header_nbytes(["a"]) < header_nbytes(["a", "b"]) < header_nbytes([f"layer{i}.weight" for i in range(100)])


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (Keep(), "keep"),
        (Keep(7), "keep:mantissa_bits=7"),
        (KMeans(16), "kmeans:n_clusters=16"),
        (RateAware(0.38, granularity="tensor", compensate=False), None),
        (RateAware(0.5, start=ProductQuantization(2, 32)), None),
        (Prune(then=RateAware(0.5)), None),
    ],
)
def test_a_method_line_is_what_parse_method_reads(method, line):
    assert parse_method(method_line(method)) == method
    assert line in (None, method_line(method))


def test_plan_on_the_command_line(tmp_path):
    plan = tmp_path / "plan.toml"
    facts = invoke_json("plan", LENET, "--target", "30x", "-o", plan)
    text = invoke("plan", LENET, "--target", "30x")
    assert f"{facts['nbytes']:,} bytes, {facts['ratio']:.2f}x smaller" in text
    for tensor in facts["tensors"]:
        line = next(line for line in text.splitlines() if line.startswith(tensor["name"] + " "))
        assert tensor["method"] in line
        assert f"{tensor['nbytes']:,.0f}" in line
    made = invoke_json("compress", LENET, "-o", tmp_path / "a.cw", "--plan", plan)
    assert made["nbytes"] == pytest.approx(facts["nbytes"], rel=BYTES)
    assert Plan.load(plan) == Plan.from_dict(facts["plan"])
    assert f"{plan}: run it with codeword compress --plan" in invoke("plan", LENET, "--target", "30x", "-o", plan)


def test_the_command_line_takes_data_and_tells_what_is_wrong(tmp_path):
    args = ("--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", 50)
    assert invoke_json("plan", LENET, "--target", "30x", *args)["target"] == "30x"
    assert "--model and --data go together" in invoke_json("plan", LENET, "--data", "digits", code=2)["error"]
    assert "--limit is about --data" in invoke_json("plan", LENET, "--limit", 5, code=2)["error"]
    assert "it is the input" in invoke_json("plan", LENET, "-o", LENET, code=8)["error"]
    result = runner.invoke(codeword.cli.app, ["plan", str(LENET), "--target", "100B", "--json"])
    assert result.exit_code == 6
    assert json.loads(result.stdout)["missed"].startswith("target 100B is 100 bytes")
    assert (
        "the smallest file would have" in runner.invoke(codeword.cli.app, ["plan", str(LENET), "--target", "9B"]).stderr
    )
