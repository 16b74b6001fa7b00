"""Pruning in training: masks by hand, weights that return, zeros that stay, resumed bits, and what is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from codeword.data import Dataset
from codeword.errors import MismatchError, NonFiniteError, PlanError
from codeword.finetune import Finetune
from codeword.math.ranking import Pattern, Ranked, macs_range, rank
from codeword.methods import KMeans, Prune, RateAware
from codeword.nn import load_into
from codeword.plan import Plan, Rule
from codeword.train.loop import train
from codeword.train.prune import Pruner
from codeword.zoo import lenet5_trained

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).train()


def conv_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).train()


def optimizer_of(model, kind=torch.optim.SGD, **options):
    return kind(model.parameters(), **({"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {}) | options)


def loop(model, pruner, steps, optimizer=None):
    """A user's loop on the toy task; the optimizer that it used."""
    optimizer = optimizer or optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
    return optimizer


def zeros(model):
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}


# --- ranking, without torch -------------------------------------------------------------------------------------------


def ranks(*tensors, groups=None, sparsity, **options):
    masks = rank(
        [Ranked(np.array(it, np.float32)) for it in tensors], groups or [range(len(tensors))], sparsity, **options
    )
    return [mask.astype(int).tolist() for mask in masks]


def test_one_ranking_or_one_for_each_group_by_hand():
    first, second = [[9, 8, 7, 6]], [[5, 4, 3, 2]]
    assert ranks(first, second, sparsity=0.5) == [[[1, 1, 1, 1]], [[0, 0, 0, 0]]]
    assert ranks(first, second, sparsity=0.5, groups=[[0], [1]]) == [[[1, 1, 0, 0]], [[1, 1, 0, 0]]]
    assert ranks(first, second, sparsity=0.5, least=0.25) == [[[1, 1, 1, 0]], [[1, 0, 0, 0]]]


def test_what_one_tensor_gets_outright_may_leave_the_next_too_little():
    dear, cheap, cheapest = [[9] * 4], [[5] * 4], [[1] * 4]
    masks = ranks(dear, cheap, cheapest, sparsity=0.5, least=0.5)
    assert [sum(mask[0]) for mask in masks] == [2, 2, 2]
    masks = ranks(dear, cheap, cheapest, sparsity=0.5, least=0.25)
    assert [sum(mask[0]) for mask in masks] == [4, 1, 1]


def test_runs_go_the_least_first_and_never_more_than_the_pattern_says():
    scores = [[1, 2, 3, 4, 50, 60, 70, 80]]
    two_of_four = Pattern(2, 4)
    assert ranks(scores, sparsity=0.25, pattern=two_of_four) == [[[0, 0, 1, 1, 1, 1, 1, 1]]]
    assert ranks(scores, sparsity=0.5, pattern=two_of_four) == [[[0, 0, 1, 1, 0, 0, 1, 1]]]


def test_blocks_of_two_tensors_go_by_their_mean():
    pattern = Pattern(block=(2, 1))
    assert ranks([[1, 9], [1, 9]], [[2, 3], [2, 3]], sparsity=0.5, pattern=pattern) == [
        [[0, 1], [0, 1]],
        [[0, 1], [0, 1]],
    ]


def test_shares_of_what_is_no_smaller_by_hand():
    """Shares 1/4, 1/5, 1 and 1, 1/3, 0: of equal ones the earlier is worth more, and the scale says nothing."""
    first, second = [[1, 1, 3]], [[2e-9, 1e-9, 0]]
    assert ranks(first, second, sparsity=1 / 6, adaptive=True) == [[[1, 1, 1]], [[1, 1, 0]]]
    assert ranks(first, second, sparsity=2 / 6, adaptive=True) == [[[1, 0, 1]], [[1, 1, 0]]]
    assert ranks(first, second, sparsity=3 / 6, adaptive=True) == [[[0, 0, 1]], [[1, 1, 0]]]
    assert ranks(first, second, sparsity=4 / 6, adaptive=True) == [[[0, 0, 1]], [[1, 0, 0]]]


def test_shares_of_blocks_count_their_weights():
    """Means 3 and 1 of 2 weights each, shares 1/2 and 1/8; means 4 and 2 of 2 weights and 1, shares 1/2 and 1/5."""
    pattern = Pattern(block=(1, 2))
    both = [[2, 4, 1, 1]], [[4, 4, 2]]
    assert ranks(*both, sparsity=2 / 7, pattern=pattern, adaptive=True) == [[[1, 1, 0, 0]], [[1, 1, 1]]]
    assert ranks(*both, sparsity=3 / 7, pattern=pattern, adaptive=True) == [[[1, 1, 0, 0]], [[1, 1, 0]]]


@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(0, 4, width=16)), st.floats(0, 0.95))
@settings(deadline=None)
def test_weights_rank_as_blocks_of_one_do(scores, sparsity):
    """Two ways to the same: by order alone, and by place."""
    tensors = [Ranked(scores), Ranked(scores[::-1] * 2 + 1)]
    alone = rank(tensors, [[0, 1]], sparsity, adaptive=True)
    blocks = rank(tensors, [[0, 1]], sparsity, adaptive=True, pattern=Pattern(block=(1, 1)))
    for one, other in zip(alone, blocks, strict=True):
        np.testing.assert_array_equal(one, other)


def test_shares_leave_runs_their_best():
    two_of_four = Pattern(2, 4)
    assert ranks([[4, 1, 2, 3]], sparsity=0.5, pattern=two_of_four, adaptive=True) == [[[1, 0, 0, 1]]]


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(deadline=None)
def test_a_ranking_takes_its_share_and_no_dearer_weight_before_a_cheaper_one(tensors, sparsity, part):
    least = part * (1 - sparsity)
    total = sum(map(len, tensors))
    masks = rank([Ranked(np.array([it], np.float32)) for it in tensors], [range(len(tensors))], sparsity, least=least)
    locked = [int(np.ceil(least * len(it))) for it in tensors]
    assert sum(int(mask.sum()) for mask in masks) == max(total - round(sparsity * total), sum(locked))
    for mask, count in zip(masks, locked, strict=True):
        assert mask.sum() >= count
    if not part:
        kept = [
            s for it, mask in zip(tensors, masks, strict=True) for s, stays in zip(it, mask[0], strict=True) if stays
        ]
        gone = [
            s
            for it, mask in zip(tensors, masks, strict=True)
            for s, stays in zip(it, mask[0], strict=True)
            if not stays
        ]
        assert min(kept, default=9) >= max(gone, default=0)


def test_two_budgets_are_met_at_once():
    generator = np.random.default_rng(0)
    conv, linear = generator.random((10, 100)), generator.random((40, 100))
    tensors = [Ranked(conv, 50), Ranked(linear, 1)]
    low, high = macs_range([1000, 4000], [50, 1], 0.8)
    assert (low, high) == (4000 / 54_000, (1000 * 50 + 3000) / 54_000)
    for macs in (0.2, 0.5, 0.9):
        masks = rank(tensors, [[0], [1]], 0.8, macs=macs)
        assert sum(int(mask.sum()) for mask in masks) == 1000
        saved = 1 - (50 * masks[0].sum() + masks[1].sum()) / 54_000
        assert abs(saved - macs) < 50 / 54_000
        assert conv[masks[0]].min() > conv[~masks[0]].max()


# --- masks along a ramp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["saliency", "magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "kinds", "layer"])
def test_the_share_of_zeros_is_met_and_stays_met(criterion, scope):
    model = net()
    pruner = Pruner(0.7, steps=10, every=2, criterion=criterion, scope=scope)
    assert pruner.prepare(model) is model
    optimizer = loop(model, pruner, 10)
    before = zeros(model)
    assert pruner.report().kept == 90 - round(0.7 * 90)
    assert sum(int(it.sum()) for it in before.values()) == round(0.7 * 90)
    loop(model, pruner, 5, optimizer)
    for name, pruned in zeros(model).items():
        assert torch.equal(pruned, before[name])
        assert torch.equal(~pruned, pruner.masks[name])
    if scope == "layer":
        assert [it.kept for it in pruner.report().tensors] == [18, 9]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"weight_decay": 0.1, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_zeros_stay_under_momentum_and_weight_decay(kind, options):
    model = net()
    pruner = Pruner(0.8, steps=4, every=1)
    pruner.prepare(model)
    optimizer = loop(model, pruner, 4, optimizer_of(model, kind, **options))
    masks = pruner.masks
    for _ in range(3):
        loop(model, pruner, 1, optimizer)
        assert all(torch.equal(p == 0, ~masks[name]) for name, p in model.named_parameters() if p.dim() > 1)


def test_the_ramp_is_cubic_begins_when_told_and_ends_on_its_last_step():
    model = net()
    pruner = Pruner(0.9, steps=8, begin=3, every=3, criterion="magnitude")
    pruner.prepare(model)
    shares = []
    for _ in range(13):
        loop(model, pruner, 1)
        shares.append(round(90 * pruner.report().sparsity))
    at = {6: 3 / 8, 9: 6 / 8, 11: 1.0}
    expected, now = [], 0
    for step in range(1, 14):
        if step in at:
            now = round(0.9 * (1 - (1 - at[step]) ** 3) * 90)
        expected.append(now)
    assert shares == expected


def test_hidden_weights_are_those_of_straight_through_training():
    """A reference that holds dense weights and runs on masked ones: gradients at pruned places move what is hidden."""
    model, rate = net(), 0.2
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.items()}
    pruner = Pruner(0.6, steps=6, every=2, criterion="magnitude", scope="layer")
    pruner.prepare(model)
    optimizer = optimizer_of(model, lr=rate, momentum=0)
    returned = 0
    for step in range(1, 7):
        loop(model, pruner, 1, optimizer)
        masked = {name: torch.where(masks[name], p, 0).requires_grad_() for name, p in dense.items()}
        F.cross_entropy(torch.func.functional_call(net(), masked, (X,)), Y).backward()
        dense = {name: p - rate * masked[name].grad for name, p in dense.items()}
        if step % 2 == 0:
            share = 0.6 * (1 - (1 - step / 6) ** 3)
            for name in ("0.weight", "2.weight"):
                keep = dense[name].numel() - round(share * dense[name].numel())
                least = dense[name].abs().flatten().sort(descending=True).values[keep - 1]
                before, masks[name] = masks[name], dense[name].abs() >= least
                returned += int((masks[name] & ~before).sum())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), torch.where(masks[name], dense[name], 0), rtol=1e-5, atol=1e-6
            )
    assert returned > 0


def test_saliency_by_hand():
    """y = w x: the gradient of a weight is its input, so the mask follows w squared times the sum of inputs."""
    model = nn.Linear(4, 1, bias=False).train()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    pruner = Pruner(0.5, steps=2, every=2)
    pruner.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x in ([1.0, 1.0, 1.0, 9.0], [0.0, 1.0, -9.0, 0.0]):  # sums 1, 2, 10, 9; times squares: 16, 18, 40, 9
        optimizer.zero_grad()
        model(torch.tensor([x])).sum().backward()
        optimizer.step()
        pruner.step()
    assert model.weight.tolist() == [[0.0, -3.0, 2.0, 0.0]]


def test_saliency_does_not_see_the_scale_of_a_layer():
    model = net()
    with torch.no_grad():  # of two linear layers in a row, one may be large and the other small
        model[0].weight.mul_(1000)
        model[2].weight.mul_(0.001)
    pruner = Pruner(0.5, steps=1, scope="global")
    pruner.prepare(model)
    loop(model, pruner, 1, optimizer_of(model, lr=0.0))
    kept = [it.kept for it in pruner.report().tensors]
    assert min(kept) > 5


def test_no_layer_is_emptied():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    pruner = Pruner(0.8, criterion="magnitude")
    pruner.prepare(model)
    assert [it.kept for it in pruner.report().tensors] == [17, 1]


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("2:4", None), ("1:4", 0.75), ("block 4x1", 0.5), ("block 1x8", 0.6)]
)
def test_patterns_hold_at_the_end_of_the_ramp(pattern, sparsity):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).train()
    pruner = Pruner(sparsity, steps=6, every=2, pattern=pattern)
    pruner.prepare(model)
    loop(model, pruner, 8)
    weight = model[2].weight.detach()
    if ":" in pattern:
        n = int(pattern[0])
        assert ((weight.reshape(8, 4, 4) != 0).sum(2) == n).all()
    else:
        rows, columns = (int(part) for part in pattern[6:].split("x"))
        blocks = (weight != 0).reshape(8 // rows, rows, 16 // columns, columns).sum((1, 3))
        assert set(blocks.unique().tolist()) <= {0, rows * columns}
        assert abs(pruner.report().sparsity - sparsity) < 0.05


def test_convolutions_apart_with_a_budget_of_multiply_accumulates():
    model, x = lenet5_trained().train(), torch.rand(2, 1, 28, 28)
    pruner = Pruner(0.9, criterion="magnitude", scope="kinds", macs=0.7, example=x)
    pruner.prepare(model)
    counts = pruner.report()
    assert counts.kept == 43_050
    assert abs(counts.macs_saved - 0.7) < 1e-3
    alone = Pruner(0.9, criterion="magnitude", scope="kinds", example=x)
    alone.prepare(lenet5_trained())
    conv, linear = alone.report().tensors[:2], alone.report().tensors[2:]
    assert [sum(it.kept for it in part) for part in (conv, linear)] == [2_550, 40_500]


def test_none_keeps_to_the_zeros_that_are_there():
    model = net()
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    pruner = Pruner(None)
    pruner.prepare(model)
    loop(model, pruner, 5)
    assert not model[0].weight[:, :2].any()
    assert int((model[0].weight == 0).sum()) == 20


# --- models as they are -----------------------------------------------------------------------------------------------


def test_a_shared_weight_has_one_mask_and_a_frozen_one_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.frozen, self.norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.words.weight
            self.frozen.requires_grad_(False)

    model = Tied().train()
    before = model.frozen.weight.clone()
    pruner = Pruner(0.5, criterion="magnitude")
    pruner.prepare(model)
    assert list(pruner.masks) == ["words.weight"]
    assert model.head.weight is model.words.weight
    assert int((model.head.weight == 0).sum()) == 21
    assert torch.equal(model.frozen.weight, before)
    assert pruner.skipped["frozen.weight"] == "frozen: requires_grad is False"
    assert (
        pruner.skipped["norm.weight"]
        == "weight of a LayerNorm: not the weight of a linear, convolution or embedding layer"
    )
    artifact = pruner.finalize()
    assert artifact.entries["head.weight"].tied_to == "words.weight"


def test_include_and_exclude_choose_by_name():
    pruner = Pruner(0.5, criterion="magnitude", include=["*.weight"], exclude=["2.*"])
    pruner.prepare(net())
    assert list(pruner.masks) == ["0.weight"]
    assert pruner.skipped["2.weight"] == "left out by include or exclude"
    with pytest.raises(PlanError, match=r"'fc\*' matches none of 2 tensors"):
        Pruner(0.5, criterion="magnitude", include=["fc*"]).prepare(net())
    with pytest.raises(PlanError, match="nothing to prune"):
        Pruner(0.5, criterion="magnitude", exclude=["*"]).prepare(net())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_net_is_pruned_under_its_own_names(wrap):
    model = net()
    pruner = Pruner(0.5, steps=2, every=1)
    wrapped = wrap(model)
    assert pruner.prepare(wrapped) is wrapped
    loop(wrapped, pruner, 3)
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    assert set(pruner.finalize().entries) == set(model.state_dict())


def test_masks_follow_a_net_that_is_moved_or_gets_other_parameters():
    model = conv_net()
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 3])
    pruner = Pruner(0.5, steps=4, every=1)
    pruner.prepare(model)

    def step(dtype=torch.float32):
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None if dtype is None else parameter.grad
        pruner.step()
        model.zero_grad()

    step()
    step()
    model.to(memory_format=torch.channels_last)
    step()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone() + 1)
    step()
    before = pruner.masks
    model.double()
    step(torch.float64)
    for name, kept in before.items():
        assert torch.equal(model.get_parameter(name) != 0, kept)
    assert pruner.report().sparsity == 0.5


def test_a_step_that_a_loss_scaler_skips_does_no_harm():
    model = net()
    pruner = Pruner(0.5, steps=4, every=4)
    pruner.prepare(model)
    for step in range(4):
        F.cross_entropy(model(X), Y).backward()
        if step == 1:  # overflow: gradients infinite, the optimizer not run
            for parameter in model.parameters():
                parameter.grad.fill_(torch.inf)
            parameter.grad[0] = torch.nan
        pruner.step()
        model.zero_grad()
    assert pruner.report().kept == 45


def test_mixed_precision_keeps_zeros():
    model = net()
    pruner = Pruner(0.5, steps=3, every=1)
    pruner.prepare(model)
    optimizer = optimizer_of(model)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(X).float(), Y)
        loss.backward()
        optimizer.step()
        pruner.step()
    assert sum(int(it.sum()) for it in zeros(model).values()) == 45


# --- out of it --------------------------------------------------------------------------------------------------------


def pruned_net():
    model = net()
    pruner = Pruner(0.5, steps=3, every=1)
    pruner.prepare(model)
    loop(model, pruner, 4)
    return model, pruner


def test_the_artifact_holds_the_net_bit_for_bit_with_its_zeros_as_a_scatter():
    model, pruner = pruned_net()
    artifact = pruner.finalize()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(artifact.decode(name), value.numpy())
    assert "Scatter" in repr(artifact.entries["0.weight"].skeleton)
    fresh = net()
    load_into(fresh, artifact)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(
    "method",
    [
        KMeans(4),
        "kmeans:n_clusters=4",
        RateAware(0.05),
        Prune(0.6, then=KMeans(3)),
        Plan((Rule("0.weight", KMeans(4)), Rule("*", RateAware(0.1)))),
    ],
)
def test_zeros_stay_zero_under_any_method(method):
    _, pruner = pruned_net()
    artifact = pruner.finalize(method)
    for name, kept in pruner.masks.items():
        decoded = artifact.decode(name)
        assert not decoded[~kept.numpy()].any()
        assert decoded.any()


def test_an_early_end_is_told():
    model = net()
    pruner = Pruner(0.5, steps=30)
    pruner.prepare(model)
    loop(model, pruner, 3)
    assert not pruner.settled
    with pytest.warns(UserWarning, match=r"3 of 30 steps were made, and 13\.3% of the weights are zero, not 50\.0%"):
        pruner.finalize()


@pytest.mark.parametrize("criterion", ["saliency", "magnitude"])
@pytest.mark.parametrize("stop", [0, 1, 5, 8, 10])
def test_a_resumed_run_ends_with_the_same_bits(criterion, stop, tmp_path):
    whole = net()
    pruner = Pruner(0.8, steps=8, every=3, criterion=criterion)
    pruner.prepare(whole)
    optimizer = loop(whole, pruner, stop)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    loop(whole, pruner, 12 - stop, optimizer)

    resumed = net()
    again = Pruner(0.8, steps=8, every=3, criterion=criterion)
    again.prepare(resumed)
    resumed.load_state_dict(state[0])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(state[1])
    again.load_state_dict(state[2])
    loop(resumed, again, 12 - stop, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert pruner.state_dict().keys() == again.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize().save(tmp_path / "whole.cw")
        again.finalize().save(tmp_path / "resumed.cw")
    assert (tmp_path / "whole.cw").read_bytes() == (tmp_path / "resumed.cw").read_bytes()


def test_a_state_holds_tensors_numbers_and_words_only():
    model = net()
    pruner = Pruner(0.8, steps=8)
    pruner.prepare(model)
    loop(model, pruner, 2)
    state = pruner.state_dict()
    assert all(isinstance(value, (torch.Tensor, int, float, str)) for value in state.values())
    assert state["step"] == 2
    before = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    loop(model, pruner, 1)
    assert all(torch.equal(state[name], value) for name, value in before.items())  # a state is a copy


def test_a_state_of_another_run_is_refused():
    _, pruner = pruned_net()
    state = pruner.state_dict()
    other = Pruner(0.6, steps=3, every=1)
    other.prepare(net())
    with pytest.raises(MismatchError, match=r"Pruner\(0\.5, .*this is Pruner\(0\.6, "):
        other.load_state_dict(state)
    wide = Pruner(0.5, steps=3, every=1)
    wide.prepare(nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3)).train())
    with pytest.raises(MismatchError, match=r"'pruned\.0\.weight' of the state is \(10, 6\), the weight \(11, 6\)"):
        wide.load_state_dict(state)
    same = Pruner(0.5, steps=3, every=1)
    same.prepare(net())
    with pytest.raises(MismatchError, match=r"'hidden\.0\.weight' of the state is missing"):
        same.load_state_dict(state | {"step": 1})


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in 0..1, below 1, got 1.0"),
        ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
        ({"steps": 2.5}, "steps must be a whole number >= 0, got 2.5"),
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"criterion": "size"}, "criterion must be one of saliency, magnitude, random, got 'size'"),
        ({"scope": "net"}, "scope must be one of global, kinds, layer, got 'net'"),
        ({"pattern": "4:2"}, 'pattern must be such as "2:4"'),
        ({"pattern": "2:4", "sparsity": 0.6}, "is a sparsity of 0.5, not 0.6"),
        ({"steps": 0}, "saliency needs gradients"),
        ({"macs": 0.5}, 'it needs scope="kinds" and an example input'),
        ({"macs": 1.5, "scope": "kinds", "example": X}, "macs is a share in 0..1"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(PlanError, match=says.replace("(", r"\(")):
        Pruner(**{"sparsity": 0.5, "steps": 5} | options)


def test_budgets_that_no_masks_meet_are_refused_with_those_that_they_do():
    with pytest.raises(PlanError, match=r"save from 16\.9% to 98\.1% of the multiply-accumulates .* not 99\.0%"):
        Pruner(0.9, criterion="magnitude", scope="kinds", macs=0.99, example=torch.rand(1, 1, 28, 28)).prepare(
            lenet5_trained()
        )
    pruner = Pruner(0.9, criterion="magnitude", scope="kinds", macs=0.9, example=X)
    with pytest.raises(PlanError, match="only one of both"):
        pruner.prepare(net())
    with pytest.raises(PlanError, match="call prepare"):  # not half ready
        pruner.step()


def test_steps_at_the_wrong_time_are_named():
    pruner = Pruner(0.5, steps=5)
    with pytest.raises(PlanError, match="call prepare"):
        pruner.step()
    model = net()
    pruner.prepare(model)
    with pytest.raises(PlanError, match=r"before zero_grad\(\)"):
        pruner.step()
    model.eval()
    with pytest.raises(PlanError, match=r"model\.train\(\)"):
        pruner.step()


def test_a_training_that_diverges_is_named():
    model = net()
    pruner = Pruner(0.5, steps=2, every=1)
    pruner.prepare(model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'\d\.weight' or its gradients hold NaN or infinity at step 1"):
        loop(model, pruner, 1)


def test_a_weight_made_from_others_is_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(MismatchError, match="parametrized"):
        Pruner(0.5, steps=2).prepare(nn.Sequential(layer))


def test_a_loop_that_keeps_the_best_epoch_keeps_none_before_the_masks_are_final():
    """Fewer zeros score better, so an epoch of the ramp would nearly always win."""
    model = net()
    data = Dataset("toy", X.numpy(), Y.numpy())
    options = Finetune(epochs=4, batch_size=16, learning_rate=0.2, optimizer="sgd", distill=0.0)
    pruner = Pruner(0.9, steps=10)  # of 4 steps an epoch: final in the third
    history = train(pruner.prepare(model), pruner, data, options, validation=data)
    assert history.kept >= 3
    assert pruner.settled
    assert pruner.report().sparsity == 0.9
    done = history.done[3:]
    assert history.done[history.kept].held_out_top1 == max(it.held_out_top1 for it in done)
