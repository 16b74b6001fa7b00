"""The smallest file within a drop: the search against known curves, the interval, what is refused, the command line."""

import json
import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import codeword
from codeword import zoo
from codeword.cli import app
from codeword.curves import Point
from codeword.data import Dataset, load_data
from codeword.drop import Labelled, Limit, Loss, paired, smallest
from codeword.errors import CodewordError, DataError, PlanError, TargetError
from codeword.evaluate import hits
from codeword.methods import Keep, RateAware

LENET = str(zoo.lenet5_path())
ALL = 1_000_000  # values of the net of the fakes below
TENSORS = 20


@dataclass
class Fake:
    """One of twenty equal tensors: log2 of bytes falls by half an octave for each of lambda, from 4 bytes a value."""

    asked: set = field(default_factory=set)

    def at(self, lam):
        self.asked.add(lam)
        if lam <= 2.0**-50:
            return Point(Keep(), 32.0 * ALL / TENSORS, 0.0)
        return Point(RateAware(lam), 32.0 * ALL / TENSORS * size(math.log2(lam)), lam)


def size(at):
    """Of a file for that log2 of lambda, over the lossless one's."""
    return min(1.0, 2.0 ** (-(at + 30) / 2))


@dataclass
class File:
    at: float  # the mean
    nbytes: int


def make(methods):
    steps = [-60.0 if method == Keep() else math.log2(method.lam) for method in methods.values()]
    return File(sum(steps) / TENSORS, round(sum(4 * ALL / TENSORS * size(at) for at in steps)))


class Known:
    """Drops by a function of log2 lambda, and others on all examples."""

    dense = 90.0

    def __init__(self, drop, whole=None):
        self.drop, self.whole = drop, whole
        self.examples, self.search_examples = (5_000 if whole is None else 50_000), 5_000
        self.seen = []

    def glance(self, artifact):
        self.seen.append(artifact.at)
        return Loss(self.drop(artifact.at), 0.0, 0.0)

    def check(self, artifact):
        self.seen.append(artifact.at)
        return Loss(self.whole(artifact.at), 0.0, 0.0)


def power(slope, half):
    """A drop that doubles every 1 / slope octaves and is half a point at `half`."""
    return lambda at: min(0.5 * 2.0 ** (slope * (at - half)), 90.0)


def found(judge, most=0.5):
    curve = Fake()
    made = smallest({f"w{i}": curve for i in range(TENSORS)}, Limit(most, judge), make)
    assert all(float(8 * math.log2(lam)).is_integer() for lam in curve.asked)
    return made


def lossless(made):
    return set(made.methods.values()) == {Keep()}


@pytest.mark.parametrize("slope", [0.6, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("half", [-29.0, -24.3, -20.0, -14.1, -8.0])
def test_largest_lambda_within_the_drop(slope, half):
    """The best file has 4 MB * size(half); ours is none that loses more, and at most 2 % larger."""
    judge = Known(power(slope, half))
    made = found(judge)
    assert made.measured.drop <= 0.5
    assert 0.999 < made.artifact.nbytes / (4 * ALL * size(half)) <= 1.021
    assert len(judge.seen) == len(made.measured.trials) <= 8


def test_drops_below_nothing_and_cliffs_are_bracketed_all_the_same():
    for cliff in (-24.7, -18.2, -11.0):
        made = found(Known(lambda at, cliff=cliff: -0.1 if at < cliff else 80.0))
        assert cliff - 1 < made.artifact.at < cliff
        assert made.measured.drop == -0.1


def test_no_file_is_returned_that_the_check_on_all_examples_refuses():
    """On all examples twice as much is lost: found half an octave of lambda further down, in at most 4 checks."""
    judge = Known(power(1, -20), power(1, -21))
    made = found(judge)
    assert made.measured.drop <= 0.5
    assert -21.4 < made.artifact.at <= -21
    checks = [trial for trial in made.measured.trials if trial.check]
    assert len(checks) == 2
    assert {trial.examples for trial in checks} == {50_000}
    assert made.measured.examples == 50_000
    assert (checks[-1].nbytes, checks[-1].drop) == (made.artifact.nbytes, made.measured.drop)


def test_a_check_that_nothing_passes_ends_with_the_lossless_file():
    judge = Known(power(1, -20), lambda at: 3.0)
    made = found(judge)
    assert lossless(made)
    assert made.measured.drop == made.measured.high == 0
    assert sum(trial.check for trial in made.measured.trials) == 4
    assert "lossless" in made.measured.note


@pytest.mark.parametrize("drop", [0.01, math.inf])
def test_if_every_change_is_too_much_the_lossless_file_is_the_answer(drop):
    judge = Known(lambda at: drop)
    made = found(judge, 0)
    assert lossless(made)
    assert len(judge.seen) <= 8
    assert "lossless" in made.measured.note


def test_if_nothing_is_lost_the_smallest_file_is_the_answer():
    judge = Known(lambda at: -0.2)
    made = found(judge)
    assert made.artifact.at == 14
    assert len(judge.seen) <= 8
    assert "smallest" in made.measured.note


@pytest.mark.parametrize("seed", range(8))
def test_noise_of_the_search_never_reaches_the_answer(seed):
    rng = np.random.default_rng(seed)
    whole = power(1.2, -19)
    judge = Known(lambda at: whole(at) + 0.3 * rng.standard_normal(), whole)
    made = found(judge)
    assert whole(made.artifact.at) == made.measured.drop <= 0.5
    assert len(judge.seen) <= 12


def test_interval_by_hand():
    """30 lost and 10 won of 1,000: (30 - 10) / 1002 -+ 1.96 sqrt((31 + 11) / 1002 - (20 / 1002)**2) / sqrt(1002)."""
    before, after = np.ones(1000, bool), np.ones(1000, bool)
    after[:30] = False
    before[30:40] = False
    loss = paired(before, after)
    assert loss.drop == pytest.approx(2.0)
    assert (loss.low, loss.high) == pytest.approx((0.7344, 3.2576), abs=2e-4)
    same = paired(before, before)
    assert same.drop == 0
    assert same.high == -same.low == pytest.approx(100 * 1.959964 * math.sqrt(2) / 1002)


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.005), (0.03, 0.03), (0.2, 0.1), (0.002, 0.0)])
def test_interval_holds_the_truth_as_often_as_it_says(lost, won):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        draw = rng.random(1000)
        loss = paired(draw > won, (draw < won) | (draw > won + lost))
        held += loss.low <= 100 * (lost - won) <= loss.high
    assert held / 2000 > 0.93


def digits(n=600):
    data = load_data("digits")
    return Dataset("digits", data.x[:n], data.y[:n])


@pytest.fixture(scope="module")
def net():
    return zoo.lenet5_trained()


def test_labelled_leaves_out_what_was_calibrated_on():
    x = np.eye(3, dtype=np.float32)[np.arange(3000) % 3]
    data = Dataset("d", x, (np.arange(3000) % 3).astype(np.int64))
    judge = Labelled(nn.Identity(), data, calibrated=True)
    assert (judge.examples, judge.search_examples, judge.dense) == (3000 - 1024, 1976, 100.0)
    judge = Labelled(nn.Identity(), data, calibrated=False)
    assert (judge.examples, judge.search_examples) == (3000, 3000)
    few = Dataset("d", x[:1500], data.y[:1500])
    assert Labelled(nn.Identity(), few, calibrated=True).examples == 1500  # of 476 others too little would be seen


def test_a_net_of_labelled_data(net):
    trials, some = [], ["conv1*", "fc2*"]
    made = codeword.fit(net, max_drop=1.0, data=digits(200), include=some, on_trial=trials.append)
    score = codeword.evaluate(codeword.swap(zoo.lenet5(), made.artifact), digits(200)).top1
    measured = made.measured
    assert measured.trials == trials
    assert measured.dense - score == pytest.approx(measured.drop)
    assert measured.low < measured.drop <= 1.0
    assert made.artifact.entries["fc2.weight"].nbytes < 5_000  # of 20,000
    assert json.loads(msgspec.json.encode(measured))["most"] == 1.0
    assert made.missed is None
    assert made.plan.target is None
    again = codeword.compress(net, plan=made.plan, data=digits(200))
    assert again.nbytes == made.artifact.nbytes


def test_the_same_twice_is_the_same_file(net, tmp_path):
    options = {"max_drop": 2, "validation": digits(200), "net": net, "exclude": ["fc1*"]}
    for name in ("a.cw", "b.cw"):
        codeword.compress(LENET, **options).save(tmp_path / name)
    assert (tmp_path / "a.cw").read_bytes() == (tmp_path / "b.cw").read_bytes()


class Changed:
    """A score of one's own: 100 less the relative error of a weight in percent, of which at most 5 is allowed."""

    def __init__(self, net):
        self.weight = net.fc1.weight.detach().clone()
        self.nets = []

    def __call__(self, net):
        assert not net.training
        self.nets.append(net)
        return 100 - 100 * float((net.fc1.weight - self.weight).norm() / self.weight.norm())


def test_a_score_of_ones_own(net):
    score = Changed(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = codeword.fit(net, max_drop=5, score=score)
    weight = torch.from_numpy(made.artifact.decode("fc1.weight"))
    error = 100 * float((weight - score.weight).norm() / score.weight.norm())
    assert error == pytest.approx(made.measured.drop, abs=1e-4)
    assert 4.5 < error <= 5
    assert made.measured.low is made.measured.examples is None
    assert len(score.nets) == len({id(it) for it in score.nets}) == len(made.measured.trials) + 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_score_that_is_no_number_for_compressed_nets_keeps_the_net_lossless(net):
    values = iter([99.0] + [math.nan] * 50)
    made = codeword.fit(net, max_drop=50, score=lambda _: next(values))
    assert all(method == Keep() for method in made.plan.resolve(codeword.sources.open_source(net).infos).values())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_drop": -0.1}, TargetError, "0 to below 100, 0.5 for instance, got -0.1"),
        ({"max_drop": math.nan}, TargetError, "got nan"),
        ({"max_drop": 100}, TargetError, "got 100"),
        ({"max_drop": True}, TargetError, "got True"),
        ({"max_drop": "0.5"}, TargetError, "got '0.5'"),
        ({"target": "8x"}, PlanError, "give max_drop alone"),
        ({"method": "keep"}, PlanError, "give max_drop alone"),
        ({"plan": codeword.Plan((codeword.Rule("*", Keep()),))}, PlanError, "give max_drop alone"),
        ({"finetune": codeword.Finetune(1)}, PlanError, "train to a target instead"),
        ({"data": None}, PlanError, "give data= or validation=, a labelled Dataset, or score="),
        ({"data": [np.zeros((2, 1, 28, 28), np.float32)]}, DataError, "needs labels, which a list of batches may lack"),
        ({"validation": [1]}, DataError, "needs labels"),
        ({"validation": digits(), "score": lambda _: 1.0}, PlanError, "give score or validation, not both"),
        ({"score": lambda _: math.nan}, DataError, "score gives nan for the uncompressed net"),
        ({"score": lambda _: "good"}, DataError, "score must return a number, higher for better, got 'good'"),
        ({"max_drop": None, "score": lambda _: 1.0}, PlanError, "give max_drop=0.5"),
        ({"max_drop": None, "data": None, "validation": digits()}, PlanError, "for training"),
    ],
)
def test_what_is_refused(net, options, error, says):
    with pytest.raises(error, match=says):
        codeword.compress(net, **({"max_drop": 0.5, "data": digits(50)} | options))


@pytest.mark.parametrize("options", [{"data": digits(50)}, {"validation": digits(50)}, {"score": lambda _: 1.0}])
def test_weights_alone_cannot_be_measured(options):
    with pytest.raises(PlanError, match="needs a model to run"):
        codeword.compress(LENET, max_drop=0.5, **options)


def test_nan_logits_are_wrong_where_that_is_asked_for():
    data = Dataset("d", np.array([[1.0, 0.0], [np.nan, 0.0], [0.0, 1.0]], np.float32), np.array([0, 0, 0]))
    assert hits(nn.Identity(), data, nan_is_wrong=True).tolist() == [True, False, False]
    with pytest.raises(DataError, match="NaN logits"):
        hits(nn.Identity(), data)


def test_command_line(tmp_path):
    out = tmp_path / "model.cw"
    args = ["compress", LENET, "-o", str(out), "--max-drop", "1", "--model", "codeword.zoo:lenet5", "--data", "digits"]
    args += ["--limit", "200", "--include", "fc2*"]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    assert " points of " in said.stdout
    assert "95 % confidence" in said.stdout
    assert "nets on 200 examples; the uncompressed net once" in said.stdout
    assert "bytes  drop " in said.stderr.splitlines()[0]
    size = out.stat().st_size
    facts = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert facts["nbytes"] == size == out.stat().st_size
    assert facts["measured"]["drop"] <= 1
    assert facts["target"] is None


def test_command_line_needs_data():
    said = CliRunner().invoke(app, ["compress", LENET, "-o", "never.cw", "--max-drop", "1"])
    assert said.exit_code == 2
    assert "give --model and --data" in said.output
    with pytest.raises(CodewordError):
        codeword.compress(LENET, max_drop=1)
