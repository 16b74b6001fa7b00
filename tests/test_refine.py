"""Layers compressed anew in order: what that is worth, and that two nets side by side never wait for each other."""

import numpy as np
import pytest
import torch
from torch import nn

import codeword
from codeword.calibrate import importance_from_data
from codeword.data import load_data
from codeword.errors import DataError, MismatchError, PlanError
from codeword.job import Job
from codeword.methods import Keep, KMeans, RateAware
from codeword.nets import load_net
from codeword.refine import refined
from codeword.sources import open_source
from codeword.zoo import lenet5_path

COARSE = RateAware(0.1)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).eval()


def images(count=64, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).cumsum(3)


def methods_for(model, method=COARSE):
    return {info.name: method if len(info.shape) > 1 else Keep() for info in open_source(model).infos}


def compressed(model, method=COARSE):
    return codeword.compress(model, plan=plan_of(method))


def plan_of(method):
    return codeword.Plan((codeword.Rule("*.weight", method), codeword.Rule("*", Keep())))


def output_error(model, artifact, x):
    with torch.no_grad():
        return float((codeword.swap(model, artifact)(x) - model(x)).square().mean())


def test_outputs_come_nearer_at_the_same_size():
    model, digits = load_net("codeword.zoo:lenet5", lenet5_path()), load_data("digits")
    seen, fresh = digits.x[:512], torch.from_numpy(digits.x[512:])
    joint = codeword.compress(model, plan=plan_of(RateAware(0.2)), importance=importance_from_data(model, [seen]))
    again = refined(joint, methods_for(model, RateAware(0.2)), model=model, data=[torch.from_numpy(seen)])
    assert again.nbytes < joint.nbytes
    assert output_error(model, again, fresh) < 0.8 * output_error(model, joint, fresh)


def test_a_fine_layer_makes_up_for_a_coarse_one_before_it():
    """Were x' the coarse layer's output, the next, in full precision, would be the least-squares map from it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3)).eval()
    x = torch.randn(500, 12)
    methods = {"0.weight": RateAware(0.3), "1.weight": RateAware(1e-9), "0.bias": Keep(), "1.bias": Keep()}
    rules = tuple(codeword.Rule(name, method) for name, method in methods.items())
    joint = codeword.compress(model, plan=codeword.Plan(rules))
    again = refined(joint, methods, model=model, data=[x])
    with torch.no_grad():
        theirs = model[0](x).double()
        own = (x @ torch.from_numpy(again.decode("0.weight")).T + model[0].bias).double()
        h = own.T @ own / 500
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(12)
        change = (theirs - own).T @ own / 500
        wanted = model[1].weight.double() @ (torch.eye(12) + torch.linalg.solve(damped, change, left=False))
    np.testing.assert_allclose(again.decode("1.weight"), wanted.numpy(), atol=2e-3)
    assert output_error(model, again, x) < 0.5 * output_error(model, joint, x)


def test_the_same_again_gives_the_same_bytes(tmp_path):
    model, x = net(), images()
    joint = compressed(model)
    files = [tmp_path / "one.cw", tmp_path / "two.cw"]
    for path in files:
        refined(joint, methods_for(model), model=model, data=[x]).save(path)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_model_stays_as_it_is():
    model, x = net().train(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refined(compressed(model), methods_for(model), model=model, data=[x])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_methods_without_use_for_moments_keep_their_codes():
    model, x = net(), images()
    artifact = compressed(model, KMeans(4))
    again = refined(artifact, methods_for(model, KMeans(4)), model=model, data=[x])
    for name in artifact.entries:
        np.testing.assert_array_equal(again.decode(name), artifact.decode(name))


class Shared(nn.Module):
    """One layer twice, and one that no example reaches."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.layer.weight

    def forward(self, x):
        return self.twin(torch.relu(self.layer(self.layer(x))))


def test_shared_layers_and_unused_ones():
    model = Shared().eval()
    joint = compressed(model)
    again = refined(joint, methods_for(model), model=model, data=[torch.randn(50, 6)])
    np.testing.assert_array_equal(again.decode("unused.weight"), joint.decode("unused.weight"))
    np.testing.assert_array_equal(again.decode("twin.weight"), again.decode("layer.weight"))


class Turns(nn.Module):
    """Goes another way once its weight has changed."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.own = self.first.weight.detach().clone()

    def forward(self, x):
        same = torch.equal(self.first.weight, self.own)
        x = self.first(x)
        return self.left(self.right(x)) if same else self.right(self.left(x))


def test_nets_that_part_stay_as_they_are_from_there():
    model = Turns().eval()
    joint = compressed(model)
    again = refined(joint, methods_for(model), model=model, data=[torch.randn(50, 4)])
    for name in ("left.weight", "right.weight"):
        np.testing.assert_array_equal(again.decode(name), joint.decode(name))


class Fails(nn.Module):
    def __init__(self, when):
        super().__init__()
        self.layer, self.when, self.calls = nn.Linear(4, 4), when, 0
        self.own = self.layer.weight.detach().clone()

    def forward(self, x):
        x = self.layer(x)
        if len(x) > 1 and torch.equal(self.layer.weight, self.own) == (self.when == "first"):
            raise RuntimeError("broken on purpose")
        return x


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_net_that_fails_leaves_nobody_waiting(when):
    model = Fails(when).eval()
    with pytest.raises(DataError, match=r"does not take 50 examples.*on purpose"):
        refined(compressed(model), methods_for(model), model=model, data=[torch.randn(50, 4)])


def test_what_does_not_fit():
    model = net()
    artifact = compressed(model)
    with pytest.raises(DataError, match="no example"):
        refined(artifact, methods_for(model), model=model, data=[])
    with pytest.raises(DataError, match=r"does not take 1 examples of shape \(1, 5\)"):
        refined(artifact, methods_for(model), model=model, data=[torch.randn(3, 5)])
    with pytest.raises(MismatchError):
        refined(artifact, methods_for(model), model=Shared(), data=[images()])


def test_batches_of_another_shape_are_left_out():
    model, methods = net(), methods_for(net())
    x = images()
    joint = compressed(model)
    one = refined(joint, methods, model=model, data=[x[:40], x[:, :, :5], x[40:]])
    two = refined(joint, methods, model=model, data=[x])
    for name in joint.entries:
        np.testing.assert_array_equal(one.decode(name), two.decode(name))


@pytest.mark.parametrize("target", ["20x", "40x"])
def test_a_target_is_met_whatever_that_does_to_sizes(target):
    """With fifty digits the layers' sizes jump: at 40x that of the largest would be missed by a fifth either way."""
    path, digits = lenet5_path(), load_data("digits", limit=50)
    made = codeword.fit(path, target, data=digits, net=load_net("codeword.zoo:lenet5", path))
    assert made.missed is None
    assert 0.99 * made.target_nbytes <= made.artifact.nbytes <= made.target_nbytes


def test_targets_beyond_what_there_is():
    path, digits = lenet5_path(), load_data("digits", limit=50)
    model = load_net("codeword.zoo:lenet5", path)
    lossless = codeword.fit(path, "0.5x", data=digits, net=model)
    assert all(method == Keep() for method in lossless.plan.resolve(open_source(path).infos).values())
    smallest = codeword.fit(path, "1e5x", data=digits, net=model)
    assert "the smallest file there is" in smallest.missed


def test_what_is_made_anew_has_the_seed_of_its_plan():
    model, method = net(), RateAware(0.05, start=KMeans(4, granularity="row"))
    plan = codeword.Plan((codeword.Rule("*.weight", method), codeword.Rule("*", Keep())), seed=7)
    seeds = []

    def anew(artifact, methods, seed, steering):
        assert steering is None
        seeds.append(seed)
        return artifact

    options = dict.fromkeys(("target", "method", "importance", "metadata", "progress"))
    job = Job(plan=plan, anew=anew, include=(), exclude=(), seed=0, workers=1, keep_nonfinite=False, **options)
    job.run(open_source(model))
    assert seeds == [7]


def test_a_file_of_weights_and_the_module_apart():
    path, digits = lenet5_path(), load_data("digits", limit=200)
    model = load_net("codeword.zoo:lenet5", path)
    apart = codeword.compress(path, plan=plan_of(COARSE), data=digits, net=model)
    together = codeword.compress(model, plan=plan_of(COARSE), data=digits)
    for name in together.entries:
        np.testing.assert_array_equal(apart.decode(name), together.decode(name))
    with pytest.raises(PlanError, match="net is what data runs through: give data too"):
        codeword.compress(path, "8x", net=model)
    with pytest.raises(PlanError, match="pass the torch module as net"):
        codeword.compress(path, "8x", data=digits)
