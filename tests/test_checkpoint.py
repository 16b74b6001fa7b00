"""States of training: what goes in comes out, bit for bit, and nothing else is believed."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from codeword.errors import MismatchError, SourceError, WriteError
from codeword.train.checkpoint import check_same_run, load_state, save_state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes(flat(a)) == bytes(flat(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def flat(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def test_round_trip_of_everything(tmp_path):
    kinds = [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.bfloat16, torch.float16, torch.float64]
    kinds += [torch.bool, torch.float32]
    state = {
        "net": {f"a.{kind}": (torch.arange(6) % 2).reshape(2, 3).to(kind) for kind in kinds},
        "numbers": [1, True, None, 0.1, -0.0, math.inf, -math.inf, math.nan, "é/\n", 2**60],
        "keys": {0: {"step": torch.tensor(3.0)}, "0": {"step": torch.tensor(4.0)}, "a/b": torch.ones(1)},
        "nested": ([], {}, (torch.zeros(0, 3), [torch.tensor(7)])),
    }
    save_state(tmp_path / "s.safetensors", state)
    assert same(load_state(tmp_path / "s.safetensors"), state)
    with safe_open(tmp_path / "s.safetensors", "np") as file:  # a plain file of the library's too
        assert "net/a.torch.float32" in file.keys()  # noqa: SIM118
    save_state(tmp_path / "none.safetensors", {"a": [1]})
    assert load_state(tmp_path / "none.safetensors") == {"a": [1]}


def test_strange_memory(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    state = {"t": x.transpose(0, 2), "expanded": x[:1].expand(5, 3, 4), "tied": x, "again": x}
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["t"].numpy().dtype != ml_dtypes.bfloat16


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_where_it_was(tmp_path, kind):
    def step(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = kind(net.parameters(), lr=0.1)
    step(net, optimizer)
    save_state(tmp_path / "s.safetensors", {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    other = nn.Linear(3, 2)
    again = kind(other.parameters(), lr=0.5)
    found = load_state(tmp_path / "s.safetensors")
    other.load_state_dict(found["net"])
    again.load_state_dict(found["optimizer"])
    for _ in range(3):
        step(net, optimizer)
        step(other, again)
    assert torch.equal(net.weight, other.weight)


def test_what_cannot_be_saved_leaves_the_old_state(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": 1})
    for value, says in (({"net": {"f": print}}, "net/f is a builtin"), ({"x": {(1, 2): 3}}, "keys of x")):
        with pytest.raises(WriteError, match=says):
            save_state(path, value)
    assert load_state(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_state(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(SourceError, match=r"s\.safetensors"):
        load_state(path)
    save_state(path, {"a": torch.ones(4)})
    whole = path.read_bytes()
    for cut in (3, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"s\.safetensors"):
            load_state(path)
    path.write_bytes(whole.replace(b"training state 1", b"training state 9"))
    with pytest.raises(SourceError, match="training state 9"):
        load_state(path)
    path.write_bytes(whole.replace(rb"{\"tensor\":\"a\"}", rb"{\"tensor\":\"b\"}"))
    with pytest.raises(SourceError, match="damaged"):
        load_state(path)
    from codeword.safetensors_file import write_safetensors

    write_safetensors(path, [("a", "float32", (2,))], lambda _: np.ones(2, np.float32))
    with pytest.raises(SourceError, match="no training state"):
        load_state(path)


def test_another_run_is_named(tmp_path):
    check_same_run(tmp_path, {"epochs": 3}, {"epochs": 3})
    with pytest.raises(MismatchError, match=r"epochs is 3 there and 4 here; data is None there and 9 here"):
        check_same_run(tmp_path, {"epochs": 3, "seed": 0}, {"epochs": 4, "seed": 0, "data": 9})
