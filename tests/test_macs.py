"""Weights and multiply-accumulates: by hand, by shapes that differ, by what a table must say."""

import pytest
import torch
from torch import nn

from codeword.errors import DataError
from codeword.train.macs import count
from codeword.zoo import lenet5_trained, resnet20


def by_name(counts):
    return {it.name: it for it in counts.tensors}


def test_lenet5_by_hand():
    counts = count(lenet5_trained(), torch.rand(3, 1, 28, 28))
    assert {it.name: (it.weights, it.uses) for it in counts.tensors} == {
        "conv1.weight": (500, 24 * 24),
        "conv2.weight": (25_000, 8 * 8),
        "fc1.weight": (400_000, 1),
        "fc2.weight": (5_000, 1),
    }
    assert (counts.weights, counts.others) == (430_500, 580)
    assert (counts.macs, counts.kept_macs) == (2_293_000, 2_293_000)
    assert (counts.sparsity, counts.macs_saved) == (0, 0)


def test_resnet20_has_the_40_million_that_its_paper_counts():
    assert count(resnet20(), torch.rand(1, 3, 32, 32)).macs == 40_551_040


def test_zeros_are_pruned_and_save_what_they_were_used_for():
    net = lenet5_trained()
    with torch.no_grad():
        net.conv1.weight[:5] = 0  # 125 weights, 576 places each
        net.fc2.weight[:, 250:] = 0
    counts = count(net, torch.rand(1, 1, 28, 28))
    assert by_name(counts)["conv1.weight"].kept == 375
    assert counts.macs - counts.kept_macs == 125 * 576 + 2_500
    assert counts.weights - counts.kept == 125 + 2_500


@pytest.mark.parametrize(
    ("layer", "shape", "uses"),
    [
        (nn.Linear(4, 3), (2, 7, 4), 7),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 8),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9), 16),
        (nn.Conv3d(1, 2, 3), (2, 1, 4, 5, 6), 2 * 3 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 25),
    ],
)
def test_each_layer_by_the_positions_its_weights_are_used_at(layer, shape, uses):
    assert count(layer, torch.rand(shape)).tensors[0].uses == uses


def test_layers_that_are_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up = nn.Linear(4, 3), nn.ConvTranspose1d(2, 2, 3)

        def forward(self, x):
            return self.up(input=self.fc(input=x))

    assert [it.uses for it in count(Net(), torch.rand(2, 2, 4)).tensors] == [2, 3]


def test_layers_that_run_twice_or_share_a_weight_count_twice_and_are_kept_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    counts = count(nn.Sequential(first, first, second), torch.rand(5, 4))
    assert [(it.name, it.weights, it.uses) for it in counts.tensors] == [("0.weight", 16, 3)]
    assert counts.others == 8


def test_an_embedding_multiplies_nothing_and_what_has_not_run_is_not_known():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head, self.unused = nn.Embedding(9, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.words(x))

    counts = count(Net(), torch.zeros(2, 6, dtype=torch.int64))
    assert [it.uses for it in counts.tensors] == [0, 6, None]
    assert counts.macs == 8 * 6
    assert all(it.uses is None for it in count(Net()).tensors)
    assert "unused.weight        8     8  100.0 %\n" in str(counts)


def test_the_table_says_every_tensor_and_the_sums():
    lines = str(count(lenet5_trained(), torch.rand(1, 1, 28, 28))).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [
        "conv1.weight",
        "conv2.weight",
        "fc1.weight",
        "fc2.weight",
        "total",
    ]
    assert lines[5].split()[1:] == ["430,500", "430,500", "100.0", "%", "2,293,000", "2,293,000", "100.0", "%"]
    assert lines[6] == "other parameters, never pruned: 580"


def test_counting_leaves_modes_hooks_and_statistics_as_they_were():
    net = resnet20().train()
    net.bn1.eval()
    before = net.layer1[0].bn1.running_mean.clone()
    count(net, torch.rand(2, 3, 32, 32))
    assert net.training
    assert not net.bn1.training
    assert torch.equal(net.layer1[0].bn1.running_mean, before)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_compiled_net_is_counted_by_the_net_within():
    assert count(torch.compile(lenet5_trained()), torch.rand(1, 1, 28, 28)).macs == 2_293_000


@pytest.mark.parametrize("example", [torch.rand(0, 1, 28, 28), torch.tensor(1.0), (), "x"])
def test_an_example_must_hold_an_example(example):
    with pytest.raises(DataError, match="a batch of inputs"):
        count(lenet5_trained(), example)


def test_an_example_of_another_shape_is_named():
    with pytest.raises(DataError, match=r"LeNet5 does not take the example of shape \(1, 3, 32, 32\)"):
        count(lenet5_trained(), torch.rand(1, 3, 32, 32))
