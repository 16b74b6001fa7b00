"""The factored convolution equals the dense one, counts honestly, and trains."""

import numpy as np
import pytest
import torch
from torch import nn

from codeword.errors import MismatchError
from codeword.expr import Affine, Lookup, Raw, Reshape, decode
from codeword.methods import KernelTemplates, ProductQuantization
from codeword.nn import FactoredConv2d

LAYERS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": "same", "bias": False},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": 2, "padding_mode": "reflect", "stride": 3},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 8, "padding": 1},
    {"kernel_size": 1},
]
METHODS = [KernelTemplates(4, drop_offset=False), KernelTemplates(4, drop_offset=True, mantissa_bits=7)]


def layer_of(out=16, **settings):
    torch.manual_seed(0)
    return nn.Conv2d(8, out, **settings)


def expr_of(layer, method):
    return method.compress(layer.weight.detach().numpy(), None, generator=np.random.default_rng(0))


def assert_equal_to_dense(layer, expr):
    factored = FactoredConv2d(layer, expr)
    dense = nn.Conv2d.__new__(nn.Conv2d)
    dense.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters}}
    dense.weight = nn.Parameter(torch.from_numpy(np.array(decode(expr))))
    x = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(1))
    for some in (x, x[0]):
        found, expected = factored(some), dense(some)
        assert found.shape == expected.shape
        assert (found - expected).norm() < 1e-4 * expected.norm()
    return factored, expected


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("settings", LAYERS, ids=str)
def test_equal_to_the_dense_convolution(settings, method):
    layer = layer_of(**settings)
    factored, expected = assert_equal_to_dense(layer, expr_of(layer, method))
    positions = expected[0].numel()
    per_output = layer.weight[0].numel()
    assert factored.dense_multiplications((8, 9, 10)) == positions * 16 * per_output
    assert factored.multiplications((5, 8, 9, 10)) == 5 * factored.multiplications((8, 9, 10))
    assert factored.pays is (factored.multiplications((8, 9, 10)) < factored.dense_multiplications((8, 9, 10)))


def test_vectors_that_are_kernels_will_do():
    layer = layer_of(kernel_size=3)
    for method in (ProductQuantization(9, 4), ProductQuantization(9, 4, codebook_dtype="float32", granularity="row")):
        assert_equal_to_dense(layer, expr_of(layer, method))
    pointwise = layer_of(kernel_size=1)
    assert_equal_to_dense(pointwise, expr_of(pointwise, ProductQuantization(4, 3)))


def test_multiplications_by_hand():
    layer = nn.Conv2d(2, 3, 3, bias=False)
    codes = np.array([[[0, 1], [0, 1], [0, 0]]], np.uint8)  # pairs: channel 0 with 0, channel 1 with 0 and 1
    lookup = Lookup(codes, np.random.default_rng(0).normal(size=(1, 5, 9)).astype(np.float32))
    each = np.ones((3, 2, 1), np.float32)
    for expr, mixed in ((lookup, 0), (Affine(lookup, each), 6), (Affine(lookup, each, each), 12)):
        factored = FactoredConv2d(layer, Reshape(expr, (3, 2, 3, 3)))
        assert factored.multiplications((2, 4, 5)) == 2 * 3 * (3 * 9 + mixed)
        assert factored.dense_multiplications((7, 2, 4, 5)) == 7 * 2 * 3 * 54
        assert factored.pays


def test_many_outputs_and_few_templates_pay_and_depthwise_does_not():
    wide = layer_of(64, kernel_size=3)
    assert FactoredConv2d(wide, expr_of(wide, KernelTemplates(8))).pays
    depthwise = layer_of(8, kernel_size=3, groups=8)
    assert not FactoredConv2d(depthwise, expr_of(depthwise, KernelTemplates(4))).pays


def test_gains_offsets_and_templates_train():
    layer = layer_of(kernel_size=3)
    factored = FactoredConv2d(layer, expr_of(layer, METHODS[0]))
    names = {name for name, _ in factored.named_parameters()}
    assert names == {"templates", "gains", "offsets", "bias"}
    optimizer = torch.optim.Adam(factored.parameters(), 1e-2)
    x = torch.randn(4, 8, 9, 10)
    target = layer(x).detach()
    losses = []
    for _ in range(10):
        loss = (factored(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for parameter in factored.parameters())
    assert losses[-1] < 0.97 * losses[0]


def test_what_has_no_factored_form_is_refused():
    layer = layer_of(kernel_size=3)
    for expr, says in [
        (Raw(layer.weight.detach().numpy()), "no factored form for Raw"),
        (expr_of(layer, ProductQuantization(9, 4, residual_stages=1)), "no factored form for"),
        (expr_of(layer, ProductQuantization(9, 4, group_size=4)), "no factored form"),
        (expr_of(layer, ProductQuantization(4, 4)), "vectors of 4 over kernels of 9"),
        (expr_of(layer_of(kernel_size=5), KernelTemplates(4)), r"\(16, 8, 3, 3\), the expression \(16, 8, 5, 5\)"),
    ]:
        with pytest.raises(MismatchError, match=says):
            FactoredConv2d(layer, expr)
