"""A stage for tests of the loop: a fixed half of each weight stays zero, and some state of its own has to be kept."""

import torch
from torch import nn

from codeword.execute import run
from codeword.methods import Keep
from codeword.sources import open_source


class Halved:
    """Weights of odd index are zero; each step moves `drift`, which the weights then follow a little."""

    def prepare(self, model):
        self.model = model
        self.steps = 0
        self.drift = torch.zeros(3, dtype=torch.bfloat16)
        self.codes = torch.zeros(2, dtype=torch.int64).to(torch.uint16)
        self.step()
        return model

    @torch.no_grad()
    def step(self):
        self.steps += 1
        self.codes = (self.codes.to(torch.int64) + self.steps).to(torch.uint16)
        for parameter in self.model.parameters():
            parameter.view(-1)[1::2] = 0
            self.drift += parameter.view(-1)[:1].to(torch.bfloat16)
            parameter.view(-1)[0] += 1e-4 * float(self.drift[0]) + 1e-6 * int(self.codes[0])

    def finalize(self):
        source = open_source(self.model)
        return run(source, {info.name: Keep() for info in source.infos if info.tied_to is None})

    def state_dict(self):
        return {"steps": self.steps, "drift": self.drift, "codes": self.codes}

    def load_state_dict(self, state):
        self.steps, self.drift, self.codes = state["steps"], state["drift"].clone(), state["codes"].clone()


def small_net(seed=0):
    """Normed and with dropout: running statistics and randomness both matter."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 10)
    )
