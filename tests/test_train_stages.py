"""Pruning and tuning in the loop, killed at any moment, and both from one call."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

import codeword
from codeword import KMeans
from codeword.data import load_data
from codeword.errors import PlanError, TrainingError
from codeword.finetune import Finetune
from codeword.train import Pruner, Tuner
from codeword.train.loop import train
from codeword.train.pipeline import _within
from codeword.zoo import lenet5_trained
from fake_stage import small_net

OPTIONS = Finetune(epochs=3, batch_size=60, learning_rate=0.01, mixed="off", keep="last")
STAGES = ["pruner", "tuner"]


def prepared(kind, net):
    stage = Tuner(clustered(net), reassign_every=2) if kind == "tuner" else Pruner(0.7, steps=12, every=2)
    return stage, stage.prepare(net.train())


def clustered(net):
    return codeword.compress(net, method=KMeans(5))


def run(kind, folder, make=small_net, **rest):
    """(bytes of the file, artifact, history) of a run."""
    stage, net = prepared(kind, make(0))
    history = train(net, stage, load_data("digits", limit=400), OPTIONS, teacher=make(1), checkpoint=folder, **rest)
    artifact = stage.finalize()
    artifact.save(Path(folder) / "net.cw")
    return (Path(folder) / "net.cw").read_bytes(), artifact, history


def test_masks_of_a_net_that_diverged_end_as_a_loss_that_is_no_number(tmp_path):
    """Masks are made before the loss is looked at: the stage is the first to meet the NaN."""
    digits = load_data("digits", limit=240)
    loader = [*zip(torch.tensor(digits.x).split(60), torch.tensor(digits.y).split(60), strict=True)]
    loader[2][0].fill_(float("nan"))
    stage = Pruner(0.5, steps=8, every=1)
    net = stage.prepare(small_net(0).train())
    before = {name: value.clone() for name, value in (*net.state_dict().items(), *stage.masks.items())}
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 1, batch 2 \(of 4\); net and stage are as"):
        train(net, stage, loader, msgspec.structs.replace(OPTIONS, distill=0), checkpoint=tmp_path)
    after = {**net.state_dict(), **stage.masks}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("kind", STAGES)
def test_resumed_after_any_epoch_the_file_is_the_same(tmp_path, kind):
    expected, artifact, _ = run(kind, tmp_path)
    for epoch in range(3):

        def stop(history, epoch=epoch):
            if history.last.epoch == epoch:
                raise Stop

        folder = tmp_path / str(epoch)
        with pytest.raises(Stop):
            run(kind, folder, on_epoch=stop)
        assert run(kind, folder, resume=True)[0] == expected
    weight = artifact.decode("5.weight")
    if kind == "pruner":
        zeros = [artifact.decode(name) == 0 for name in ("0.weight", "5.weight")]
        assert np.mean(np.concatenate([z.reshape(-1) for z in zeros])) == pytest.approx(0.7, abs=0.001)
    else:
        assert len(np.unique(weight)) <= 5
        assert np.any(weight != clustered(small_net(0)).decode("5.weight"))


SLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from test_train_stages import *
slow = lambda done, total, text: time.sleep(0.2 if text.startswith("epoch 2") else 0)
run(*sys.argv[2:], progress=slow, on_epoch=lambda history: print(history.last.epoch, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("kind", STAGES)
def test_killed_in_the_midst_of_an_epoch_it_loses_no_more_than_that(tmp_path, kind):
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), kind, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(int(line))
        if line == "1\n":
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (lines, process.returncode) == ([0, 1], -signal.SIGKILL)
    found, _, _ = run(kind, folder, resume=True, on_epoch=lambda history: lines.append(history.last.epoch))
    assert lines == [0, 1, 1, 2, 3]
    (tmp_path / "whole").mkdir()
    assert found == run(kind, tmp_path / "whole")[0]


# One call


def test_one_call_prunes_compresses_and_tunes(tmp_path):
    digits, net = load_data("digits", limit=400), small_net(0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options = msgspec.structs.replace(OPTIONS, epochs=2, sparsity=0.5, prune_epochs=1)
    made = codeword.fit(net, method=KMeans(6), data=digits, finetune=options, checkpoint=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert [(history.stage, history.epochs) for history in made.histories] == [("pruner", 1), ("tuner", 2)]
    weights = [made.artifact.decode(name) for name in ("0.weight", "5.weight")]
    assert sum((weight == 0).sum() for weight in weights) / sum(weight.size for weight in weights) >= 0.499
    assert all(len(np.unique(weight)) <= 7 for weight in weights)
    assert codeword.verify(made.artifact, net) == []
    again = codeword.fit(net, method=KMeans(6), data=digits, finetune=options)
    assert all(np.array_equal(again.artifact.decode(name), made.artifact.decode(name)) for name in again.artifact)


@pytest.mark.parametrize("every", [3, None])
@pytest.mark.parametrize("target", ["60x", "5x"])
def test_a_target_is_met_after_training_too(target, every):
    net = lenet5_trained()
    options = Finetune(epochs=1, batch_size=100, held_out=100, reassign_every=every, learning_rate=5e-4)
    made = codeword.fit(net, target, data=load_data("digits", limit=400), finetune=options)
    assert made.missed is None
    assert 0.98 * made.target_nbytes <= made.artifact.nbytes <= made.target_nbytes
    assert made.histories[0].dense.held_out_top1 > 97
    assert codeword.evaluate(made.artifact, "digits", model=net).top1 > 97


@pytest.mark.parametrize(("budget", "expected"), [(100, 90), (120, 120), (None, 120)])
def test_what_grew_past_the_budget_gets_new_codes_once_more(budget, expected):
    class Grown:
        nbytes = 120

        def finalize(self):
            return SimpleNamespace(nbytes=self.nbytes)

        def reassign(self):
            self.nbytes = 90

    assert _within(Grown(), budget).nbytes == expected


def test_a_tuner_keeps_to_the_size_it_is_given():
    net = lenet5_trained()
    artifact = codeword.compress(net, "60x")
    for wanted in (0.6, 0.9):
        most = int(wanted * artifact.nbytes)
        tuner = Tuner(artifact, reassign_every=4, nbytes=most)
        tuner.prepare(net.train())  # new codes at once: there are too many bits
        assert 0.97 * most <= tuner.finalize().nbytes <= 1.002 * most
    for arguments in ({"nbytes": 100}, {"nbytes": 0, "reassign_every": 4}):
        with pytest.raises(PlanError, match="nbytes is the size that new codes keep to"):
            Tuner(artifact, **arguments)


def test_what_contradicts_itself():
    net, digits = small_net(0), load_data("digits", limit=50)
    for arguments, says in (
        ({"finetune": Finetune()}, "finetune needs data to train on"),
        ({"finetune": 10, "data": digits}, r"must be options, Finetune\(epochs=10\) for instance, got 10"),
        ({"data": digits, "resume": True}, "are for training; give finetune"),
        ({"data": digits, "checkpoint": "x"}, "are for training; give finetune"),
    ):
        with pytest.raises(PlanError, match=says):
            codeword.compress(net, "8x", **arguments)
    with pytest.raises(PlanError, match="only weights: pass the torch module"):
        codeword.compress(net.state_dict(), "8x", data=digits, finetune=Finetune())
    endless = type("Endless", (), {"__iter__": lambda self: iter([])})()
    with pytest.raises(PlanError, match="needs data with a length"):
        codeword.compress(net, "8x", data=endless, finetune=Finetune(sparsity=0.5))
