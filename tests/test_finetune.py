"""The loop on the digits of the package: what it keeps, what it records, how it ends, what it refuses."""

import copy
import hashlib
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import codeword
from codeword.data import Dataset, load_data
from codeword.errors import CodewordError, DataError, MismatchError, PlanError, TrainingError
from codeword.finetune import Finetune, History
from codeword.train.batches import blended, hold_out, moved, open_batches
from codeword.train.loop import train
from codeword.train.optimizer import make_optimizer, set_rate
from codeword.train.processes import Process
from fake_stage import Halved, small_net

DIGITS = load_data("digits", limit=400)
QUICK = Finetune(epochs=2, batch_size=64, learning_rate=0.02, distill=0.0, mixed="off")


def loader(n=4, size=32):
    return [
        (torch.from_numpy(DIGITS.x[at : at + size]), torch.from_numpy(DIGITS.y[at : at + size]))
        for at in range(0, n * size, size)
    ]


def run(options=QUICK, data=DIGITS, net=None, **rest):
    """(net, stage, history) of a run."""
    stage = Halved()
    net = stage.prepare(small_net() if net is None else net)
    return net, stage, train(net, stage, data, options, **rest)


def digest(net, stage):
    found = hashlib.sha256()
    for value in net.state_dict().values():
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    artifact = stage.finalize()
    for name in artifact:
        found.update(artifact.decode(name).tobytes())
    return found.hexdigest()


def test_it_learns_and_records(tmp_path):
    told, lines = [], []
    options = msgspec.structs.replace(QUICK, epochs=6, learning_rate=0.01, distill=0.5, keep="last")
    teacher = small_net(1)
    net, stage, history = run(
        options, teacher=teacher, progress=lambda *args: told.append(args), on_epoch=lambda h: lines.append(len(h.done))
    )
    assert [epoch.epoch for epoch in history.done] == list(range(7))
    assert lines == list(range(1, 8))
    losses = [epoch.loss for epoch in history.done]
    assert losses[0] is None
    assert losses[6] < 0.9 * losses[1]
    assert history.held_out == 40
    assert history.done[6].held_out_top1 > history.done[0].held_out_top1 + 10
    assert history.dense.held_out_top1 is not None
    assert history.done[-1].learning_rate < 0.001 < history.done[1].learning_rate
    assert told[-1][:2] == (6 * 5, 6 * 5)
    assert "epoch 6 of 6, loss " in told[-1][2]
    assert history.kept == 6
    assert history.stage == "halved"
    assert msgspec.json.decode(msgspec.json.encode(history), type=History) == history
    assert not any(module.training for module in (*net.modules(), *teacher.modules()))
    weight = codeword.state_dict(stage.finalize())["5.weight"]
    assert (weight.view(-1)[1::2] == 0).all()
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_callers_generators_alone():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = [copy.deepcopy(state) for state in (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])]
    first = digest(*run(net=small_net())[:2])
    second = digest(*run(net=small_net())[:2])
    other = digest(*run(msgspec.structs.replace(QUICK, seed=1), net=small_net())[:2])
    assert first == second != other
    torch.manual_seed(5)  # small_net seeds too
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    np.testing.assert_array_equal(states[2], np.random.get_state()[1])


def test_the_best_epoch_is_kept_or_the_last():
    # At this rate the net gets worse, if not at once.
    wild = msgspec.structs.replace(QUICK, epochs=4, learning_rate=3.0, optimizer="sgd")
    net, _, history = run(wild)
    scores = [epoch.held_out_top1 for epoch in history.done]
    assert scores[history.kept] == max(scores)
    _, held_out = hold_out(DIGITS, wild)
    assert codeword.evaluate(net, held_out).top1 == scores[history.kept]
    assert codeword.evaluate(net, held_out).n == history.held_out
    net, _, history = run(msgspec.structs.replace(wild, keep="last"))
    assert history.kept == 4
    assert codeword.evaluate(net, held_out).top1 == history.done[4].held_out_top1


def test_what_is_held_out_is_not_trained_on():
    kept, held = hold_out(DIGITS, QUICK)
    assert (len(kept), len(held)) == (360, 40)
    rows = {row.tobytes() for row in DIGITS.x}
    assert {row.tobytes() for row in kept.x} | {row.tobytes() for row in held.x} == rows
    assert hold_out(DIGITS, msgspec.structs.replace(QUICK, held_out=0)) == (DIGITS, None)
    big = Dataset("big", np.zeros((60_000, 1), np.float32), np.zeros(60_000, np.int64))
    assert len(hold_out(big, QUICK)[1]) == 5_000


def test_a_loader_of_ones_own():
    _, _, history = run(data=loader())
    assert history.held_out == 0
    assert [epoch.held_out_top1 for epoch in history.done] == [None] * 3
    assert history.kept == 2
    _, _, history = run(data=loader(), validation=DIGITS)
    assert history.held_out == 400
    _, _, history = run(data=loader(), validation=loader(2))
    assert history.done[0].held_out_top1 is not None

    class Endless:  # no length: the first epoch tells
        def __iter__(self):
            return iter(loader(3))

    told = []
    _, _, history = run(data=Endless(), progress=lambda *args: told.append(args[:2]))
    assert told[-1] == (6, 6)


def test_the_rate_rises_over_a_twentieth_and_falls_along_half_a_cosine():
    options = Finetune(epochs=2, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), options)
    found = [set_rate(optimizer, options, epoch, at, 50) for epoch in (1, 2) for at in range(50)]
    assert found[0] == pytest.approx(0.1 * 0.99994, rel=1e-4)  # 0.005 of the way: a tenth of the rise
    assert found[4] == pytest.approx(0.9 * 0.5 * (1 + math.cos(0.045 * math.pi)))
    assert found[49] == pytest.approx(0.5, abs=0.01)
    assert max(found) == found[5] < 1
    assert found[5:] == sorted(found[5:], reverse=True)
    assert found[99] < 1e-4
    assert optimizer.param_groups[0]["lr"] == found[99]


class Unsized(torch.utils.data.IterableDataset):
    """A loader over this has a __len__ that raises TypeError."""

    def __iter__(self):
        return iter(loader(4))


def test_an_epoch_of_unknown_length_goes_at_the_rate_of_its_middle():
    once = msgspec.structs.replace(QUICK, epochs=1)
    for data in (
        torch.utils.data.DataLoader(Unsized(), batch_size=None),
        type("E", (), {"__iter__": Unsized.__iter__})(),
    ):
        _, _, history = run(once, data=data)
        assert history.done[1].learning_rate == pytest.approx(0.5 * once.learning_rate)


def test_labels_are_not_needed_to_distill():
    outputs_only = msgspec.structs.replace(QUICK, distill=1.0, keep="last", epochs=3)
    singles = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(DIGITS.x[:128])), 32)
    assert isinstance(next(iter(singles)), list)
    for data in ([x for x, _ in loader()], singles):
        _, _, history = run(outputs_only, data=data, teacher=small_net(1))
        assert history.done[3].loss < history.done[1].loss
        assert history.done[3].held_out_loss is None
    with pytest.raises(DataError, match=r"epoch 1, batch 0 has no labels; .* distill=1"):
        run(data=[x for x, _ in loader()])


def test_modules_in_eval_mode_stay_so():
    net = small_net()
    net.train()
    net[1].eval()
    before = net[1].running_mean.clone()
    run(net=net)
    assert torch.equal(net[1].running_mean, before)
    other = small_net().eval()  # wholly in eval mode: the loop sees to it
    run(net=other)
    assert not torch.equal(other[1].running_mean, before)


def test_norms_are_measured_anew_if_it_does_no_harm():
    options = msgspec.structs.replace(QUICK, reestimate_norms=True, keep="last")
    net, _, history = run(options)
    _, held_out = hold_out(DIGITS, options)
    assert codeword.evaluate(net, held_out).top1 >= history.done[-1].held_out_top1
    plain, _, _ = run(msgspec.structs.replace(options, reestimate_norms=False))
    assert net[1].momentum == plain[1].momentum == 0.1


def test_images_are_moved_and_turned_each_on_its_own():
    images = torch.arange(1.0, 2 * 3 * 4 * 5 + 1).reshape(2, 3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(moved(images, generator), images)
    seen = set()
    for _ in range(60):
        found = moved(images, generator, shift=1, mirror=True)
        assert found.shape == images.shape
        for image, whole in zip(found, images, strict=True):
            places = [
                (down, right, turn)
                for down in range(3)
                for right in range(3)
                for turn in (False, True)
                if torch.equal(
                    image,
                    nn.functional.pad(whole, (1, 1, 1, 1))[:, down : down + 4, right : right + 5].flip([2] * turn),
                )
            ]
            assert len(places) == 1
            seen.update(places)
    assert len(seen) == 18


def test_blended_inputs_lie_between_two_of_them():
    x = torch.arange(0.0, 64).reshape(64, 1).expand(64, 5).contiguous() ** 2
    found = blended(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert torch.equal(found, blended(x, torch.Generator().manual_seed(0)))
    assert torch.all(found == found[:, :1])  # one share for all of an example
    assert not torch.isin(found[:, 0], x[:, 0]).all()
    assert 0 <= found.min() < found.max() <= 63**2
    # each holds at least a part of its own: (found - x) / (other - x) is the share of another, 0..1, evenly
    other = x[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    moved_by = ((found - x) / (other - x))[:, 0].nan_to_num(0.5)
    assert (moved_by.min() >= 0, moved_by.max() <= 1, 0.3 < moved_by.mean() < 0.7) == (True, True, True)


def test_blending_is_learned_from_outputs_alone():
    with pytest.raises(PlanError, match=r"blend mixes inputs.*distill is 0.5, not 1"):
        Finetune(blend=True)
    options = msgspec.structs.replace(QUICK, blend=True, distill=1.0)
    net, stage, history = run(options, teacher=small_net(1))
    assert history.done[-1].loss is not None
    assert digest(net, stage) == digest(*run(options, teacher=small_net(1))[:2])
    with pytest.raises(DataError, match="a loader changes its images itself"):
        run(options, data=loader(), teacher=small_net(1))
    with pytest.raises(DataError, match="for inputs that are floats, found int64"):
        run(options, data=Dataset("words", np.zeros((40, 3), np.int64), np.zeros(40, np.int64)), teacher=small_net(1))


def test_what_has_no_label_is_not_judged():
    batch = loader(1, 100)[0]
    half = [(batch[0], torch.where(torch.arange(100) < 50, batch[1], -100))]
    scored = [epoch.held_out_top1 for epoch in run(data=loader(), validation=half)[2].done]
    first = [epoch.held_out_top1 for epoch in run(data=loader(), validation=[(batch[0][:50], batch[1][:50])])[2].done]
    assert scored == first


def test_one_output_is_no_classification():
    """The largest of one logit is always the first."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    odd = [(x, y % 2) for x, y in loader()]

    def binary(output, target):
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], target.float())

    _, _, history = run(data=odd, net=net, loss=binary, validation=odd)
    assert [epoch.held_out_top1 for epoch in history.done] == [None] * 3
    losses = [epoch.held_out_loss for epoch in history.done]
    assert losses[history.kept] == min(losses)


@pytest.mark.parametrize("empty", [[], Dataset("none", DIGITS.x[:0], DIGITS.y[:0])])
def test_there_must_be_something_to_score(empty):
    with pytest.raises(DataError, match=r"held out: the data gave no batch|none: no examples"):
        run(data=loader(), validation=empty)


def test_a_process_whose_part_is_empty_scores_nothing():
    one = Dataset("one", DIGITS.x[:1], DIGITS.y[:1])
    parts = [list(open_batches(one, QUICK, torch.device("cpu"), Process(rank, 2)).in_order()) for rank in range(2)]
    assert [[len(batch.x) for batch in part] for part in parts] == [[1], []]


def test_a_net_does_not_learn_from_itself():
    stage = Halved()
    net = stage.prepare(small_net())
    with pytest.raises(PlanError, match=r"teacher shares '0\.weight' with the net that trains; .*copy\.deepcopy"):
        train(net, stage, DIGITS, QUICK, teacher=net)


# Checkpoints


class Stop(Exception):  # noqa: N818
    pass


def stop_after(epoch):
    def on_epoch(history):
        if history.last.epoch == epoch:
            raise Stop

    return on_epoch


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        msgspec.structs.replace(QUICK, epochs=4, learning_rate=3.0, optimizer="sgd"),  # the best is long past
        msgspec.structs.replace(QUICK, epochs=3, shift=1, mirror=True, distill=0.5, reestimate_norms=True),
    ],
    ids=["plain", "best", "moved"],
)
def test_resumed_after_any_epoch_it_ends_with_the_same_bytes(tmp_path, options):
    expected = run(options, teacher=small_net(1))
    for epoch in range(options.epochs + 1):
        folder = tmp_path / str(epoch)
        with pytest.raises(Stop):
            run(options, teacher=small_net(1), checkpoint=folder, on_epoch=stop_after(epoch))
        assert [path.name for path in folder.iterdir()] == ["halved.safetensors"]
        found = run(options, teacher=small_net(1), checkpoint=folder, resume=True)
        assert digest(*found[:2]) == digest(*expected[:2])
        assert [epoch.loss for epoch in found[2].done] == [epoch.loss for epoch in expected[2].done]
        assert found[2].kept == expected[2].kept


@pytest.mark.parametrize("made", ["generator", "sampler"])
def test_a_loader_with_a_generator_of_its_own_goes_on_alike(tmp_path, made):
    examples = torch.utils.data.TensorDataset(*(torch.from_numpy(part[:128]) for part in (DIGITS.x, DIGITS.y)))

    def own():
        generator = torch.Generator().manual_seed(5)
        if made == "generator":
            return torch.utils.data.DataLoader(examples, 32, shuffle=True, generator=generator)
        sampler = torch.utils.data.RandomSampler(examples, generator=generator)
        return torch.utils.data.DataLoader(examples, 32, sampler=sampler)

    expected = run(data=own())
    with pytest.raises(Stop):
        run(data=own(), checkpoint=tmp_path, on_epoch=stop_after(1))
    found = run(data=own(), checkpoint=tmp_path, resume=True)
    assert digest(*found[:2]) == digest(*expected[:2])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_net_with_channels_last_goes_on_alike(tmp_path, kind):
    def net():
        return small_net().to(memory_format=torch.channels_last)

    options = msgspec.structs.replace(QUICK, optimizer=kind)
    expected = run(options, net=net())
    with pytest.raises(Stop):
        run(options, net=net(), checkpoint=tmp_path, on_epoch=stop_after(1))
    found = run(options, net=net(), checkpoint=tmp_path, resume=True)
    assert digest(*found[:2]) == digest(*expected[:2])


def test_there_must_be_something_to_go_on_from():
    with pytest.raises(PlanError, match="resume needs a checkpoint folder"):
        run(resume=True)
    with pytest.raises(PlanError, match="resume needs a checkpoint folder"):
        codeword.compress(small_net(), "8x", data=DIGITS, finetune=QUICK, resume=True)


class Late(Halved):
    """Final in its second epoch of five steps; `prepare` made one."""

    settled = property(lambda self: self.steps > 7)


def test_no_epoch_is_kept_before_the_stage_is_settled(tmp_path):
    net = Late().prepare(small_net()).eval()
    with torch.no_grad():
        own = Dataset("own", DIGITS.x, net(torch.from_numpy(DIGITS.x)).argmax(1).numpy())
    data = hold_out(DIGITS, QUICK)[0]

    def late(**rest):
        stage = Late()
        return train(stage.prepare(small_net()), stage, data, QUICK, validation=own, **rest)

    with pytest.raises(Stop):
        late(checkpoint=tmp_path, on_epoch=stop_after(1))
    for history in (late(), late(checkpoint=tmp_path, resume=True)):
        assert history.done[0].held_out_top1 == 100
        assert history.kept == 2


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(checkpoint=tmp_path)
    with pytest.raises(PlanError, match=r"the state of a run already: .*halved\.safetensors; .*--resume"):
        run(checkpoint=tmp_path)
    again = run(checkpoint=tmp_path, resume=True)  # nothing left to do
    assert len(again[2].done) == 3
    with pytest.raises(MismatchError, match=r"epochs is 2 there and 3 here; learning_rate is 0\.02 there and 0\.01"):
        run(msgspec.structs.replace(QUICK, epochs=3, learning_rate=0.01), checkpoint=tmp_path, resume=True)
    with pytest.raises(MismatchError, match=r"the net's digest is '\w{16}' there"):
        run(net=small_net(3), checkpoint=tmp_path, resume=True)
    with pytest.raises(MismatchError, match=r"examples is 360 there and 270 here"):
        run(data=load_data("digits", limit=300), checkpoint=tmp_path, resume=True)


SLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from test_finetune import *
slow = lambda done, total, text: time.sleep(0.2 if text.startswith("epoch 2") else 0)
run(QUICK, checkpoint=sys.argv[2], progress=slow, on_epoch=lambda history: print(history.last.epoch, flush=True))
"""


def ended_by(number, folder):
    """What a run in another process says that gets a signal in the midst of epoch 2."""
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line == "1\n":
            time.sleep(0.3)
            process.send_signal(number)
    said = process.communicate()[1]
    assert lines == ["0", "1"]
    return said, process.returncode


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_it_says_how_to_go_on(tmp_path):
    said, _ = ended_by(signal.SIGINT, tmp_path)
    assert f"interrupted in epoch 2 of 2; the state after the last whole epoch is in {tmp_path}" in said
    assert "--resume" in said
    found = run(checkpoint=tmp_path, resume=True)
    assert digest(*found[:2]) == digest(*run()[:2])


# Data and nets that do not fit


def broken_at(batch, what):
    data = loader()
    x, y = data[batch]
    data[batch] = what(x.clone(), y.clone())
    return data


def filled(x, y, value):
    x[3, 0, 5, 5] = value
    return x, y


def test_a_loss_that_is_no_number_puts_the_last_good_state_back(tmp_path):
    data = broken_at(2, lambda x, y: filled(x, y, float("nan")))
    stage = Halved()
    net = stage.prepare(small_net())
    before = copy.deepcopy(net.state_dict())
    says = r"the loss is nan in epoch 1, batch 2 \(of 4\); .* were after epoch 0\. .*lower learning rate than 0\.02"
    with pytest.raises(TrainingError, match=says) as caught:
        train(net, stage, data, QUICK, checkpoint=tmp_path)
    assert caught.value.exit_code == 12
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert stage.steps == 1
    assert codeword.verify(stage.finalize(), net) == []
    assert (tmp_path / "halved.safetensors").is_file()


def test_a_rate_that_is_too_high_is_found_out():
    options = msgspec.structs.replace(QUICK, learning_rate=1e38, optimizer="sgd")
    with pytest.raises(TrainingError, match="in epoch 1, batch"):
        run(options)


def test_a_last_step_that_spoils_the_weights(monkeypatch):
    stage = Halved()
    net = stage.prepare(small_net())
    plain = stage.step

    def spoil():
        plain()
        if stage.steps == 6:  # the last of five batches; one step was made by prepare
            with torch.no_grad():
                net[0].weight[0] = float("inf")

    monkeypatch.setattr(stage, "step", spoil)
    with pytest.raises(TrainingError, match=r"'0\.weight' holds NaN or infinity after epoch 1, batch 4"):
        train(net, stage, DIGITS, QUICK)
    assert torch.isfinite(net[0].weight).all()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "epoch 1: the data gave no batch"),
        (iter(loader()), "gives its batches once"),
        (3, "must be a Dataset or give batches"),
        ([(torch.zeros(4, 1, 28, 28), torch.zeros(3, dtype=torch.int64))], r"x of shape \(4, 1, 28, 28\) and y \(3,\)"),
        ([(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))], r"x of shape \(0, 1, 28, 28\)"),
        ([("words", torch.zeros(3))], r"batch 0 must be x or \(x, y\), tensors or arrays; got a tuple of str, Tensor"),
        ([(torch.zeros(3),) * 3], r"got a tuple of Tensor, Tensor, Tensor"),
        ([{"x": torch.zeros(3)}], r"got a dict"),
        (broken_at(1, lambda x, y: (x, y + 5)), r"epoch 1, batch 1: label 1\d but the net has 10 classes \(0 to 9\)"),
        (broken_at(1, lambda x, y: (x, -y - 1)), r"batch 1: label -\d+ but"),
        (broken_at(3, lambda x, y: (x[:, :, :3], y)), r"epoch 1, batch 3: Sequential does not take x \(32, 1, 3, 28\)"),
        (broken_at(1, lambda x, y: (x, y[:, None, None])), r"no loss of an output \(32, 10\) and a target \(32, 1"),
        (Dataset("none", DIGITS.x[:0], DIGITS.y[:0]), "none: no examples"),
        (Dataset("odd", DIGITS.x, DIGITS.y + 1), r"label 10 but the net has 10 classes"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(data, says):
    with pytest.raises(DataError, match=says):
        run(data=data)


def test_a_loss_that_is_no_single_number():
    with pytest.raises(PlanError, match=r"a single number, got \(40,\)"):
        run(loss=nn.CrossEntropyLoss(reduction="none"))


def test_moves_are_for_datasets_of_images():
    options = msgspec.structs.replace(QUICK, shift=2)
    with pytest.raises(DataError, match="for a Dataset"):
        run(options, data=loader())
    with pytest.raises(DataError, match=r"for images \(n, c, h, w\)"):
        run(options, data=Dataset("flat", np.zeros((40, 3), np.float32), np.zeros(40, np.int64)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("learning_rate", "0.1"),
        ("class_dim", 1.5), ("epochs", 1.5), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("weight_decay", -1.0), ("distill", 1.5), ("temperature", 0.0), ("reassign_every", 0), ("held_out", -1),
        ("shift", -1), ("sparsity", 1.0), ("prune_epochs", 0), ("seed", -1), ("optimizer", "sdg"), ("mixed", "fp8"),
        ("keep", "first"),
    ],
)  # fmt: skip
def test_options_are_checked(field, value):
    with pytest.raises(PlanError, match=f"finetune: {field} must"):
        Finetune(**{field: value})
    assert PlanError.exit_code == 5
    assert issubclass(TrainingError, CodewordError)


def test_epochs_of_pruning_need_a_sparsity():
    with pytest.raises(PlanError, match="prune_epochs is 3, but there is no sparsity to prune to"):
        Finetune(prune_epochs=3)


def test_holding_out_everything():
    with pytest.raises(PlanError, match="held_out is 400 of 400 examples"):
        run(msgspec.structs.replace(QUICK, held_out=400))


def test_mixed_precision_keeps_weights_in_float32():
    net, _, history = run(msgspec.structs.replace(QUICK, mixed="bf16"))
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert history.done[2].loss < history.done[1].loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator():
    stage = Halved()
    net = stage.prepare(small_net().cuda())
    history = train(net, stage, DIGITS, msgspec.structs.replace(QUICK, mixed="auto", distill=0.5), teacher=small_net(1))
    assert history.done[2].loss < history.done[1].loss
