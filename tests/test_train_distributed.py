"""Two processes train as one: the same file in both, and what a single process makes of the same batches."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import codeword
from codeword.data import load_data
from codeword.train.loop import train
from codeword.train.processes import Process, average, best_device, group
from fake_stage import small_net
from test_train_stages import OPTIONS, STAGES, prepared


def plain_net(seed):
    """Without norms and dropout, which see the part of a batch that is a process's and not the whole."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


# "normed": what each process has seen differs, so its running statistics do, and dropout.
NETS = dict.fromkeys(STAGES, plain_net) | {"normed": small_net}
ODD = msgspec.structs.replace(OPTIONS, batch_size=55)  # parts of 28 and 27


@dataclass(frozen=True, slots=True)
class Alike(Process):
    """One of several that all hold the same."""

    def total(self, values):
        return values.mul_(self.count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [2, 3])
def test_buffers_that_are_alike_everywhere_stay_as_they_are(dtype, count):
    """Masks are filled with the lowest number there is: the sum of two is -infinity."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(1000, generator=generator).to(dtype)
    buffer[0], buffer[1] = torch.finfo(dtype).min, torch.finfo(dtype).max
    before = buffer.clone()
    average([buffer], Alike(count=count))
    assert torch.equal(buffer, before)


def worker(folder):
    """What one of two processes does."""
    with group(best_device()) as process:
        for kind, make in NETS.items():
            place = Path(folder) / kind / str(process.rank) if process.rank else Path(folder) / kind
            place.mkdir(parents=True, exist_ok=True)
            stage, net = prepared(kind, make(0))
            data = load_data("digits", limit=330)
            history = train(net, stage, data, ODD, teacher=make(1), checkpoint=Path(folder) / kind)
            stage.finalize().save(place / "net.cw")
            losses = [[epoch.loss, epoch.held_out_loss, epoch.held_out_top1] for epoch in history.done]
            (place / "history.json").write_text(json.dumps(losses))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_as_one(tmp_path):
    """Both end with the same file; it is that of one process but for the order in which gradients are added."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_train_distributed as t; t.worker(sys.argv[2])"
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "two")],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    worker(tmp_path / "one")
    for kind in NETS:
        first, second, one = tmp_path / "two" / kind, tmp_path / "two" / kind / "1", tmp_path / "one" / kind
        assert (first / "net.cw").read_bytes() == (second / "net.cw").read_bytes()
        records = [json.loads((place / "history.json").read_text()) for place in (first, second, one)]
        assert records[0] == records[1]
        if kind == "normed":
            continue
        for found, expected in zip(records[0], records[2], strict=True):
            assert found == [None if value is None else pytest.approx(value, rel=1e-3) for value in expected]
        with codeword.load(first / "net.cw") as both, codeword.load(one / "net.cw") as alone:
            for name in alone:
                np.testing.assert_allclose(both.decode(name), alone.decode(name), rtol=1e-2, atol=1e-4)
                np.testing.assert_array_equal(both.decode(name) == 0, alone.decode(name) == 0)
