"""Two processes train as one: same bytes in both, and what a single process gets from the same batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import codeword
from codeword.data import load_data
from codeword.finetune import Finetune
from codeword.train.loop import train
from codeword.train.processes import best_device, group
from fake_stage import Halved

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
OPTIONS = Finetune(epochs=2, batch_size=50, learning_rate=0.05, optimizer="sgd", distill=0.5, mixed="off", shift=1)


def net_of(seed):
    """Without norms and dropout, which see the part of a batch and not the whole."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def trained(folder):
    """(weights, history) of this process."""
    digits = load_data("digits", limit=330)
    with group(best_device()) as process:
        stage = Halved()
        net = stage.prepare(net_of(0))
        history = train(net, stage, digits, OPTIONS, teacher=net_of(1), checkpoint=folder)
        return codeword.state_dict(stage.finalize()), history, process


def worker(folder):
    """What one of the two processes does."""
    weights, history, process = trained(folder)
    torch.save(weights, f"{folder}/{process.rank}.pt")
    Path(f"{folder}/{process.rank}.json").write_text(
        json.dumps([[epoch.loss, epoch.held_out_loss, epoch.held_out_top1] for epoch in history.done])
    )


def test_two_processes_are_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_train_distributed as t; t.worker(sys.argv[2])"
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone, history, _ = trained(tmp_path / "alone")
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1]
    for found, epoch in zip(records[0], history.done, strict=True):
        expected = [epoch.loss, epoch.held_out_loss, epoch.held_out_top1]
        assert found == [None if value is None else pytest.approx(value, rel=1e-4) for value in expected]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["halved.safetensors"]
