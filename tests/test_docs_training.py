"""docs/training.md, and what README says of it: every block runs, its tables name every option with its default."""

import functools
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import codeword
from codeword import Finetune, zoo
from codeword.cli import app
from codeword.data import Dataset, load_data
from codeword.train import Pruner, Tuner

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Train it small")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE + SECTION, re.DOTALL)
SHORT = ["--limit", "120", "--batch-size", "50"]
COMMANDS = [shlex.split(line) for language, block in BLOCKS if language == "sh" for line in block.splitlines()]

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of its own dependencies, and of small loaders


def shortened(words):
    """The same on digits that ship with the package, for one epoch."""
    words = [{"mnist:train": "digits", "HOST": "127.0.0.1"}.get(word, word) for word in words]
    words[words.index("--finetune") + 1] = "1"
    return [*words, *SHORT]


def test_every_block_is_run_here():
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert {words[0] for words in COMMANDS} == {"codeword", "torchrun"}


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(zoo.lenet5_path(), "model.safetensors")
    for words in COMMANDS:
        if words[0] == "codeword":
            result = CliRunner().invoke(app, shortened(words[1:]))
            assert result.exit_code == 0, (words, result.output)
            assert codeword.verify(words[words.index("-o") + 1], "model.safetensors") == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "torchrun"], ids=["one", "two"])
def test_the_commands_of_several_processes(tmp_path, words):
    shutil.copy(zoo.lenet5_path(), tmp_path / "model.safetensors")
    words = shortened(words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [port if word == "29500" else word for word in words]
    machines = [words]
    if "--node-rank" in words:
        other = list(words)
        other[words.index("--node-rank") + 1] = "1"
        machines.append(other)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *machine[1:]],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in machines
    ]
    for process in started:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
    assert codeword.verify(tmp_path / "shared.cw", tmp_path / "model.safetensors") == []


def lightning_module(net):
    """A LightningModule around a net; None without Lightning."""
    try:
        from lightning.pytorch import LightningModule
    except ImportError:
        return None

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 5e-4)

    return Module()


@contextmanager
def alone(folder):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_the_lines_of_python(tmp_path, monkeypatch):
    """One block after the other, as a reader would; what the reader brings is made here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    digits = load_data("digits", limit=250)
    model = zoo.lenet5_trained()
    names = {
        "torch": torch,
        "loader": DataLoader(TensorDataset(*(torch.from_numpy(it[:200]) for it in (digits.x, digits.y))), 50),
        "held_out": Dataset("held out", digits.x[200:], digits.y[200:]),
        "loss_function": F.cross_entropy,
        "optimizer": torch.optim.Adam(model.parameters(), 5e-4),
        "module": lightning_module(zoo.lenet5_trained()),
    }
    for language, block in BLOCKS:
        if language == "python" and ("lightning" not in block or names["module"] is not None):
            if "model = " not in block:
                names["model"] = model = zoo.lenet5_trained()  # as it was: some blocks prune it
                names.setdefault("optimizer", torch.optim.Adam(model.parameters(), 5e-4))
            block = re.sub(r"epochs=10\b", "epochs=1", block).replace("mnist:train", "digits")
            with alone(tmp_path) if "DistributedDataParallel" in block else nullcontext():
                exec(compile(block, "training.md", "exec"), names)
    with codeword.load("tuned.cw") as tuned:
        assert all(len(np.unique(tuned.decode(name))) <= 17 for name in ("conv2.weight", "fc1.weight"))
        assert np.mean(tuned.decode("fc1.weight") == 0) > 0.85
    assert names["pruner"].sparsity == 0.9


@pytest.mark.parametrize("made", [Finetune, Pruner, Tuner], ids=lambda made: made.__name__)
def test_tables_name_every_option_with_its_default(made):
    table = re.search(rf"\| `{made.__name__}` \| default \| \|\n.*\n((?:\|.*\n)+)", PAGE)[1]
    found = [re.match(r"\| `(\w+)` \| (?:`(.*?)`)? ?\|", line).groups() for line in table.splitlines()]
    parameters = inspect.signature(made).parameters.values()
    empty = inspect.Parameter.empty
    expected = [(it.name, None if it.default is empty else repr(it.default).replace("'", '"')) for it in parameters]
    assert found == expected


@pytest.fixture
def pages(monkeypatch):
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import generate_training

    return generate_training


def claim(claim, row, seed, ratio, top1, **rest):
    facts = {"nbytes": 1_700_000 / ratio, "ratio": ratio, "conv_ratio": None, "sparsity": 0.9, "epochs": 10}
    facts |= {
        "test_top1": top1,
        "drop": 99.47 - top1,
        "dense_top1": 99.47,
        "how": "ours: so" if "ours" in row else "so",
        "net": row.split("-")[0],
    }
    return {"claim": claim, "row": row, "seed": seed} | facts | rest


def test_results_say_what_fell_short_and_what_was_not_measured(pages, tmp_path):
    empty = pages.page(tmp_path)
    goals = pages.section_claims.GOALS
    assert empty.lower().count("not measured yet") == len(goals) + 4
    rows = [
        claim("deep-compression", "lenet5-han", 0, 40.0, 99.40, before_tuning={"nbytes": 9}),
        claim("jia", "lenet5-birch", 0, 39.0, 99.20),
    ]
    rows += [
        claim("fang", "lenet5-pq", seed, 45.0, 99.37 + seed / 100, before_tuning={"test_top1": 99.0})
        for seed in (0, 1, 2)
    ]
    rows += [
        claim("deep-compression", f"lenet5-ours-{target}", 0, *it)
        for target, it in {"80x": (80.0, 99.5), "90x": (90.0, 99.3)}.items()
    ]
    starts = {"linear": (98.0, 99.1), "density": (98.5, 99.0)}
    rows += [
        claim("wang", f"lenet5-k8-{name}", 0, 9.0, after, before_tuning={"test_top1": before})
        for name, (before, after) in starts.items()
    ]
    (tmp_path / "recipes").mkdir()
    dense = {"lenet5": {"test_top1": 99.47}}
    (tmp_path / "recipes" / "claims.json").write_text(json.dumps({"notes": ["a", "b"], "dense": dense, "rows": rows}))
    page = pages.page(tmp_path)
    assert page.lower().count("not measured yet") == len(goals) + 4 - 4
    assert "target 40x at 0.1 points or less: fell short by 0.17 points and 1.0 times: *lenet5-birch* has" in page
    assert "target 38x at 0.5 points or less: reached by *lenet5-pq*, 45.0x, 99.38 %, drop +0.09." in page
    assert "| lenet5-pq | 37,778 | 45.0x ± 0.0 |" in page
    assert (
        "target smaller than *lenet5-han* at no lower top-1: reached by *lenet5-ours-80x*, 2.00 times smaller" in page
    )
    assert "is behind the best other at: LeNet-5, MNIST, k = 8, after training (by 0.10)." in page
    rows = [row for row in rows if row["row"] != "lenet5-ours-80x"]
    said = list(pages.section_claims.beaten(list(pages.section_claims.grouped(rows))))
    assert said[0].endswith("fell short by 0.10 points: *lenet5-ours-90x*, 2.25 times smaller (1 of 3 seeds).")
    rows = pages.readme_rows(tmp_path)
    assert rows[0] == "| LeNet-5, MNIST, trained | 21.2 KB | 80.0x | 99.50 | 99.47 |"


def test_results_say_where_magnitude_is_the_better(pages, tmp_path):
    tops = {"saliency": (99.5, 99.3, 99.38), "magnitude": (99.4, 99.4, 99.3), "magnitude-layer": (99.35, 99.2, 99.0)}
    rows = [
        {"method": method, "sparsity": sparsity, "epochs": 2, "rate": 0.03, "seed": seed, "test_top1": top + seed / 100}
        for method, three in tops.items()
        for sparsity, top in zip((50, 90, 98), three, strict=True)
        for seed in (0, 1, 2)
    ]
    rows.append({"method": "saliency", "sparsity": 98, "epochs": 15, "rate": 0.1, "seed": 0, "test_top1": 99.35})
    (tmp_path / "recipes").mkdir()
    record = {"lenet5": {"dense": {"test_top1": 99.47}, "trials": [], "rows": rows}}
    (tmp_path / "recipes" / "prune_sweep.json").write_text(json.dumps(record))
    page = pages.page(tmp_path)
    assert "| saliency, one ranking (C1) | 99.51 ± 0.01 |  |  | 99.31 ± 0.01 |  | 99.39 ± 0.01 |  |" in page
    assert "98 % zeros at 0.1 points or less: reached (drop +0.08 in 2 epochs, saliency, one ranking (C1)" in page
    assert "below magnitude, one ranking (C3) at 1 of 3 sparsities: 90 % (by 0.10)" in page
    assert "below magnitude, each layer alone (C3) at none of 3." in page
    assert "saliency at 98 % zeros, 15 epochs, 99.35 (1 of 3 seeds)" in page


def test_results_say_where_a_step_costs_more_than_it_may(pages, tmp_path):
    ratios = {"masks": 1.2, "codewords": 1.1}
    row = {"net": "LeNet-5", "precision": "float32", "milliseconds": {"dense": 100.4}, "over dense": ratios}
    targets = {"masks": 1.15, "codewords": 1.3}
    record = {
        "machine": "x86_64",
        "load average before": [0.3],
        "torch": "2",
        "batch": 128,
        "rounds": 30,
        "targets over dense": targets,
        "rows": [row],
    }
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "training_step.json").write_text(json.dumps(record))
    page = pages.page(tmp_path)
    assert "| LeNet-5, float32 | 100 ms | 1.20x | 1.10x |" in page
    assert "Above its target in 1 of 2 cells: masks, LeNet-5 in float32: 1.20x for 1.15x." in page
