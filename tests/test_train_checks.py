"""What no stage trains: each refused by name, with the call that helps, and that call does help."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from codeword.errors import MismatchError, PlanError
from codeword.train.checks import check_mode, check_model
from codeword.zoo import lenet5, resnet20


def body(layer):
    """A net whose second layer, model.1, is the given one."""
    return nn.Sequential(nn.Flatten(), layer)


def refusal(model):
    with pytest.raises(MismatchError) as caught:
        check_model(model)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (weight_norm, "weight norm"),
        (spectral_norm, "spectral norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune"),
        (parametrizations.weight_norm, "parametrized"),
        (parametrizations.orthogonal, "parametrized"),
    ],
)
def test_a_weight_made_from_others_is_refused_and_the_message_says_how_to_fold_it_in(wrap, says):
    model = body(wrap(nn.Linear(4, 3)))
    said = refusal(model)
    assert says in said
    assert "'weight' of 1 (" in said
    call = re.search(r"torch\.nn\.utils\.\S+\(model\.1, 'weight'\)", said)
    eval(call[0].replace("model.1", "model[1]"), {"torch": torch, "model": model})  # the advice, taken
    check_model(model)


def test_parametrizations_of_the_root_module_are_named_too():
    assert "remove_parametrizations(model, 'weight')" in refusal(parametrizations.weight_norm(nn.Linear(4, 3)))


def test_names_that_only_look_wrapped_pass():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_g, self.weight_v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    check_model(Gated())


def test_what_has_no_values_or_no_training_weight_is_refused():
    assert "'1.weight' has no shape yet" in refusal(body(nn.LazyLinear(3)))
    assert "'1.weight' is on the meta device" in refusal(body(nn.Linear(4, 3, device="meta")))
    assert "none of the 2 parameters" in refusal(body(nn.Linear(4, 3)).requires_grad_(False))
    assert "none of the 0 parameters" in refusal(nn.Flatten())
    assert "got a dict" in refusal({"weight": torch.ones(2)})


def test_plain_frozen_and_shared_layers_pass():
    check_model(lenet5())
    net = resnet20()
    net.conv1.requires_grad_(False)
    check_model(net)
    layer = nn.Linear(4, 4)
    check_model(nn.Sequential(layer, layer))


def test_a_step_in_eval_mode_is_refused_and_norms_alone_may_be_in_it():
    net = resnet20()
    with pytest.raises(PlanError, match=r"ResNet is in eval mode.*model\.train\(\)"):
        check_mode(net)
    net.train()
    net.bn1.eval()
    check_mode(net)
