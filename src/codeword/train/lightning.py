"""Pruning and tuning in Lightning: a callback does what one's own loop would.

    trainer = Trainer(callbacks=[Compression(Tuner(artifact, reassign_every=100), "net", out="model.cw")])
    trainer.fit(module, loader)         # module.net is what was compressed

Needs Lightning 2 (`lightning` or `pytorch_lightning`); importing this without either raises MissingDependencyError.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from codeword.artifact import Artifact
from codeword.errors import MismatchError, MissingDependencyError
from codeword.train.loop import Stage
from codeword.train.processes import keep_codes_here


def _callback() -> Any:  # noqa: ANN401 - a class of a package that may not be there
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise MissingDependencyError('codeword.train.lightning needs Lightning: pip install "codeword[lightning]"')


class Compression(_callback()):
    """Runs a `Pruner` or `Tuner` on one net of a LightningModule while it is fitted.

    attribute: which of the module's attributes is the net; "" the module itself, for stages that prepare in place.
    The net is prepared before optimizers are made, the stage's state is in Lightning's checkpoints, and `artifact`
    holds what came of it when the fit has ended; out: where the first process also saves that.
    """

    def __init__(self, stage: Stage, attribute: str = "", *, out: Path | str | None = None) -> None:
        super().__init__()
        self.stage = stage
        self.artifact: Artifact | None = None
        self._attribute, self._out = attribute, out
        self._prepared = False
        self._steps = 0

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:  # noqa: ANN401
        """Prepares the net, once."""
        del trainer
        if stage != "fit" or self._prepared:
            return
        net = pl_module.get_submodule(self._attribute)
        if not net.training:  # else some modules of it may be in eval mode on purpose
            net.train()
        found = self.stage.prepare(net)
        if not self._attribute and found is not net:
            raise MismatchError(
                f"a {type(self.stage).__name__} makes another net of the one it is given; keep that in an attribute of "
                f"the {type(pl_module).__name__} and name it: Compression(stage, 'net')"
            )
        if self._attribute:
            owner, _, name = self._attribute.rpartition(".")
            setattr(pl_module.get_submodule(owner), name, found)
        keep_codes_here(pl_module)
        self._prepared = True

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ANN401
        """Steps are counted from here."""
        del pl_module
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:  # noqa: ANN401
        """A step of the stage after each of the optimizer: of the batches of which gradients add up, the last."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.stage.step()

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ANN401
        """The artifact of the net as it is now, written if `out` was given."""
        del pl_module
        self.artifact = self.stage.finalize()
        if self._out is not None and trainer.is_global_zero:
            self.artifact.save(self._out)

    def state_dict(self) -> dict[str, Any]:
        """The stage's own, for Lightning's checkpoints."""
        return self.stage.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Back from a checkpoint, the net's own state having been loaded."""
        self.stage.load_state_dict(state_dict)
