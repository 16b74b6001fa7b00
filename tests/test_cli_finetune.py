"""`codeword compress --finetune`: what is shown and written, how it ends early and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import codeword
from codeword import api, zoo
from codeword.cli import app
from codeword.data import load_data
from codeword.errors import TrainingError
from codeword.safetensors_file import write_safetensors

LENET = zoo.lenet5_path()
TRAIN = ["--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", "200", "--held-out", "50"]
TRAIN += ["--batch-size", "50", "--learning-rate", "0.0005"]
runner = CliRunner()


def invoke(*args, code=0):
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_lines_and_summary(tmp_path):
    out = tmp_path / "net.cw"
    report = ["--report", tmp_path / "report"]
    result = invoke("compress", LENET, "-o", out, "--target", "60x", *TRAIN, "--finetune", 2, *report)
    lines = result.stderr.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["before", "epoch 1/2", "epoch 2/2"]
    assert all(" % (uncompressed 100.00 %)  " in line for line in lines)
    assert "loss 0." in lines[1]
    assert "trained   2 epochs, kept that of epoch " in result.stdout
    assert "of 50 held out, uncompressed 100.00 %" in result.stdout
    assert "the written file was read back and compared" in result.stdout
    size = out.stat().st_size
    assert 0.98 * 431_080 * 4 / 60 <= size <= 431_080 * 4 / 60
    assert codeword.verify(out, LENET) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.cw", "report"]
    page = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(page["training"][0]["done"]) == 3
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "## Training" in markdown
    assert "| uncompressed |" in markdown


def test_json_and_pruning(tmp_path):
    out = tmp_path / "net.cw"
    args = ["compress", LENET, "-o", out, "--target", "60x", *TRAIN, "--finetune", 1, "--sparsity", 0.8, "--json"]
    args += ["--checkpoint", tmp_path / "states", "--shift", 1]
    result = invoke(*args)
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert [history["stage"] for history in facts["training"]] == ["pruner", "tuner"]
    assert facts["training"][0]["dense"]["held_out_top1"] == 100
    assert facts["verified"] is True
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["pruner.safetensors", "tuner.safetensors"]
    with api.load(out) as artifact:
        weights = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
        zeros = sum(np.count_nonzero(artifact.decode(name) == 0) for name in weights)
        assert zeros / sum(artifact.decode(name).size for name in weights) >= 0.7999
    # All is done already: the same again, from the states alone.
    again = tmp_path / "again.cw"
    invoke(*(again if arg == out else arg for arg in args), "--resume")
    assert again.read_bytes() == out.read_bytes()
    result = invoke(*args, code=5)
    assert "go on from it with resume=True (--resume)" in json.loads(result.stdout)["error"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_and_resumed_it_ends_as_if_nothing_had_been(tmp_path):
    args = ["compress", LENET, "--target", "60x", *TRAIN, "--finetune", "2"]
    out, other = tmp_path / "net.cw", tmp_path / "other.cw"
    command = [sys.executable, "-m", "codeword", *map(str, args), "-o", out, "--finetune", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("epoch 1/2"):
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted in epoch 2 of 2; the state after the last whole epoch is in" in said
    assert "--resume" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.cw.training"]
    result = invoke(*args, "-o", out, "--resume")
    assert [line.split("  ")[0] for line in result.stderr.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.cw"]
    invoke(*args, "-o", other)
    assert other.read_bytes() == out.read_bytes()


def test_a_loss_that_is_no_number(tmp_path):
    out = tmp_path / "net.cw"
    args = ["compress", LENET, "-o", out, "--target", "60x", *TRAIN, "--finetune", 2, "--learning-rate", 1e37]
    result = invoke(*args, code=12)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "lower learning rate" in last
    assert not out.exists()
    assert TrainingError.exit_code == 12


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--finetune", 2], "give --model and --data"),
        (["--mirror"], "--mirror is about training; give --finetune EPOCHS too"),
        (["--blend"], "--blend is about training"),
        (["--learning-rate", 0.5], "--learning-rate is about training"),
        (["--resume"], "--resume is about training"),
        (["--finetune", 2, "--model", "codeword.zoo:lenet5"], "give both or neither"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, args, says):
    result = invoke("compress", LENET, "-o", tmp_path / "a.cw", *args, "--json", code=2)
    assert says in json.loads(result.stdout)["error"]
    assert list(tmp_path.iterdir()) == []


def test_blending_is_for_training_without_labels(tmp_path):
    args = ["compress", LENET, "-o", tmp_path / "a.cw", "--target", "60x", *TRAIN, "--finetune", 1, "--blend"]
    assert "blend mixes inputs, which have no label then; distill is 0.5" in invoke(*args, code=5).stderr
    invoke(*args, "--distill", 1)
    assert codeword.load(tmp_path / "a.cw").ratio >= 60


def test_data_of_another_task(tmp_path):
    digits = load_data("digits", limit=50)
    np.savez(tmp_path / "odd.npz", x=digits.x, y=digits.y + 1)
    args = ["--model", "codeword.zoo:lenet5", "--data", f"npz:{tmp_path / 'odd.npz'}", "--finetune", 1]
    result = invoke("compress", LENET, "-o", tmp_path / "a.cw", "--target", "60x", *args, "--json", code=7)
    assert "but the net has 10 classes" in json.loads(result.stdout)["error"]


def test_the_file_is_of_the_net_that_was_trained(tmp_path):
    """A checkpoint in half precision: the factory's net is float32, and so is the file."""
    tensors = {name: value.numpy().astype(np.float16) for name, value in zoo.lenet5_trained().state_dict().items()}
    half = tmp_path / "half.safetensors"
    write_safetensors(half, [(n, "float16", t.shape) for n, t in tensors.items()], tensors.__getitem__)
    invoke("compress", half, "-o", tmp_path / "a.cw", "--target", "60x", *TRAIN, "--finetune", 1)
    with api.load(tmp_path / "a.cw") as artifact:
        assert {entry.dtype for entry in artifact.entries.values()} == {"float32"}
    assert os.path.getsize(tmp_path / "a.cw") < os.path.getsize(half) / 25  # noqa: PTH202
