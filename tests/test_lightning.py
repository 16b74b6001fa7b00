"""The Lightning callback: it ends as a loop of one's own does, and a checkpoint brings everything back."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import codeword
from codeword import KMeans
from codeword.data import load_data
from codeword.errors import MismatchError
from codeword.train import Pruner, Tuner
from fake_stage import small_net
from test_train_distributed import plain_net

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of its own dependencies, and of small loaders

WITHOUT = """
import sys
sys.modules["lightning"] = sys.modules["lightning.pytorch"] = sys.modules["pytorch_lightning"] = None
from codeword.errors import CodewordError
try:
    import codeword.train.lightning
except CodewordError as error:
    print(type(error).__name__, error)
"""


def test_without_lightning_the_extra_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingDependencyError")
    assert 'pip install "codeword[lightning]"' in done.stdout


@pytest.fixture(scope="module")
def lightning():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning.pytorch")


@pytest.fixture(scope="module")
def module_of(lightning):
    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    return Module


def batches():
    digits = load_data("digits", limit=200)
    examples = torch.utils.data.TensorDataset(torch.from_numpy(digits.x), torch.from_numpy(digits.y))
    return torch.utils.data.DataLoader(examples, 50)


def stage_of(kind):
    if kind == "pruner":
        return Pruner(0.7, steps=6, every=2)
    return Tuner(codeword.compress(plain_net(0), method=KMeans(5)), reassign_every=2)


def fitted(lightning, module_of, kind, epochs, folder, **rest):
    from codeword.train.lightning import Compression

    callback = Compression(stage_of(kind), "net", out=folder / "net.cw")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{key: value for key, value in rest.items() if key != "ckpt_path"},
    )
    trainer.fit(module_of(plain_net(0)), batches(), ckpt_path=rest.get("ckpt_path"))
    return callback, trainer


def by_hand(kind, epochs, steps_of=1):
    stage = stage_of(kind)
    net = stage.prepare(plain_net(0).train())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for at, (x, y) in enumerate([*batches()] * epochs):
        (F.cross_entropy(net(x), y) / steps_of).backward()
        if at % steps_of == steps_of - 1:
            optimizer.step()
            stage.step()
            optimizer.zero_grad()
    return stage.finalize()


def same(found, expected):
    return all(np.array_equal(found.decode(name), expected.decode(name)) for name in expected)


@pytest.mark.parametrize("kind", ["pruner", "tuner"])
def test_it_is_as_a_loop_of_ones_own(lightning, module_of, tmp_path, kind):
    callback, _ = fitted(lightning, module_of, kind, 2, tmp_path)
    assert same(callback.artifact, by_hand(kind, 2))
    with codeword.load(tmp_path / "net.cw") as written:
        assert same(written, callback.artifact)


def test_a_step_is_one_of_the_optimizer(lightning, module_of, tmp_path):
    callback, _ = fitted(lightning, module_of, "pruner", 3, tmp_path, accumulate_grad_batches=2)
    assert same(callback.artifact, by_hand("pruner", 3, steps_of=2))


@pytest.mark.parametrize("kind", ["pruner", "tuner"])
def test_a_checkpoint_brings_the_stage_back(lightning, module_of, tmp_path, kind):
    _, trainer = fitted(lightning, module_of, kind, 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    callback, _ = fitted(lightning, module_of, kind, 2, tmp_path, ckpt_path=tmp_path / "state.ckpt")
    assert same(callback.artifact, by_hand(kind, 2))


def test_norms_that_are_in_eval_mode_stay_so(lightning, module_of):
    from codeword.train.lightning import Compression

    module = module_of(small_net())
    module.net[1].eval()
    Compression(Pruner(0.5, steps=4), "net").setup(None, module, "fit")
    assert [module.net.training, module.net[1].training] == [True, False]


def test_a_stage_that_makes_another_net_needs_an_attribute(lightning, module_of):
    from codeword.train.lightning import Compression

    artifact = codeword.compress(module_of(plain_net(0)), method=KMeans(5))
    with pytest.raises(MismatchError, match=r"makes another net .* Compression\(stage, 'net'\)"):
        Compression(Tuner(artifact)).setup(None, module_of(plain_net(0)), "fit")
