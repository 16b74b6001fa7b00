"""Losses by hand, and what they refuse."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codeword.errors import DataError, PlanError
from codeword.train.losses import Objective, classify, distillation


def test_distillation_by_hand():
    # At T = 2 the teacher's odds are e:1, the student's 1:1.
    p = math.e / (1 + math.e)
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    found = distillation(torch.zeros(3, 2), torch.tensor([[2.0, 0.0]] * 3), 2.0)
    assert float(found) == pytest.approx(4 * kl, rel=1e-6)


def test_distillation_is_zero_for_equal_outputs_and_takes_maps():
    maps = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float(distillation(maps, maps + 3.0, 1.5)) == pytest.approx(0, abs=1e-6)  # softmax knows no constant
    flat = distillation(maps, -maps, 1.5)
    rows = distillation(maps.permute(0, 2, 3, 1).reshape(-1, 5), -maps.permute(0, 2, 3, 1).reshape(-1, 5), 1.5)
    torch.testing.assert_close(flat, rows)


@pytest.mark.parametrize("distill", [0.0, 0.25, 1.0])
def test_the_mix(distill):
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(8, 4)
    y = torch.arange(8) % 3
    found = Objective(teacher=teacher, distill=distill, temperature=2.0)(student(x), x, y if distill < 1 else None)
    teacher.eval()
    expected = (1 - distill) * F.cross_entropy(student(x), y) + distill * distillation(student(x), teacher(x), 2.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_loss_of_ones_own_and_outputs_with_logits():
    class Output:
        logits = torch.zeros(2, 4)

    assert float(classify(Output(), torch.tensor([0, 3]))) == pytest.approx(math.log(4))
    own = Objective(lambda output, target: (output - target).abs().mean(), distill=0.0, temperature=1.0)
    assert float(own(torch.ones(2), None, torch.zeros(2))) == 1.0


def test_where_the_classes_are():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)

    def tokens(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    student, teacher = nn.Linear(4, 7), nn.Linear(4, 7)
    with pytest.raises(DataError, match=r"gives \(2, 5, 7\); say which dimension holds the classes.*now None"):
        Objective(tokens, teacher, distill=0.5, temperature=1.0)(student(x), x, y)
    with pytest.raises(DataError, match="now 3"):
        Objective(tokens, teacher, distill=0.5, temperature=1.0, class_dim=3)(student(x), x, y)
    found = Objective(tokens, teacher, distill=0.5, temperature=1.0, class_dim=-1)(student(x), x, y)
    flat = distillation(student(x).flatten(0, 1), teacher(x).flatten(0, 1), 1.0)
    torch.testing.assert_close(found, 0.5 * tokens(student(x), y) + 0.5 * flat)


def test_what_cannot_be_distilled():
    with pytest.raises(PlanError, match="there is no uncompressed net"):
        Objective(distill=0.5, temperature=1.0)
    for net, says in ((nn.Linear(4, 1), "two classes and more"), (nn.LSTM(4, 4), "not logits")):
        objective = Objective(teacher=net, distill=1.0, temperature=1.0)
        x = torch.randn(2, 3, 4) if isinstance(net, nn.LSTM) else torch.randn(2, 4)
        with pytest.raises(DataError, match=says):
            objective(net(x), x, None)
