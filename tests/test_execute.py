"""The map from a source to a file: the same bytes for any number of workers, and every tensor back as what it was."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import codeword
from codeword import Keep, KMeans, Plan, RateAware, Rule
from codeword.errors import ExprError, NonFiniteError, PlanError, WorkerError
from codeword.execute import run, tensor_seed
from codeword.expr import DTYPES, FLOATS, Raw, dtype_name
from codeword.safetensors_file import write_safetensors
from codeword.sources import open_source

RNG = np.random.default_rng(0)
NET = {
    "a.weight": RNG.normal(size=(40, 30)).astype(np.float32),
    "a.bias": RNG.normal(size=40).astype(np.float32),
    "b.weight": RNG.laplace(size=(16, 8, 3, 3)).astype(np.float32),
    "c.weight": RNG.laplace(size=(20, 25)).astype(ml_dtypes.bfloat16),
    "steps": np.arange(7),
}
METHODS = {
    "a.weight": RateAware(0.05),
    "a.bias": Keep(7),
    "b.weight": KMeans(8),
    "c.weight": RateAware(0.01, granularity="tensor", codebook="free"),
    "steps": Keep(),
}


def saved(artifact, path):
    artifact.save(path)
    return path.read_bytes()


def on_disk(net, path):
    write_safetensors(path, [(name, str(value.dtype), value.shape) for name, value in net.items()], net.__getitem__)
    return path


def bits(array):
    return array.tobytes()


class Tied(nn.Module):
    """A language model's habit: the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.middle(self.embed(x)))


def test_workers_and_runs_do_not_change_a_byte(tmp_path):
    file = open_source(on_disk(NET, tmp_path / "net.safetensors"))
    expected = saved(run(file, METHODS, seed=5), tmp_path / "1.cw")
    assert saved(run(file, METHODS, seed=5), tmp_path / "again.cw") == expected
    memory = open_source({info.name: NET[info.name] for info in file.infos})  # in the order of the file
    assert saved(run(memory, METHODS, seed=5), tmp_path / "memory.cw") == expected
    for workers in (2, 3):
        assert saved(run(file, METHODS, seed=5, workers=workers), tmp_path / f"{workers}.cw") == expected
    assert saved(run(memory, METHODS, seed=5, workers=2), tmp_path / "memory2.cw") == expected


def test_workers_do_not_change_who_borrows(tmp_path):
    net = {f"{at}.weight": NET["a.weight"] + np.float32(at % 2) for at in range(6)}
    expected = saved(run(open_source(net), dict.fromkeys(net, Keep(7))), tmp_path / "1.cw")
    with codeword.load(tmp_path / "1.cw") as artifact:
        lenders = [entry.leaves[0].lender for entry in artifact.entries.values()]
    assert lenders == [None, None, (0, 0), (1, 0), (0, 0), (1, 0)]
    assert saved(run(open_source(net), dict.fromkeys(net, Keep(7)), workers=3), tmp_path / "3.cw") == expected


def test_workers_read_a_live_module_and_a_checkpoint(tmp_path):
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    methods = dict.fromkeys(["embed.weight", "middle.weight", "middle.bias"], KMeans(4))
    expected = saved(run(open_source(model), methods), tmp_path / "1.cw")
    for number, what in enumerate((model, tmp_path / "net.pt")):
        assert saved(run(open_source(what), methods, workers=2), tmp_path / f"{number}.cw") == expected


def test_workers_take_an_importance(tmp_path):
    importance = {"a.weight": RNG.lognormal(sigma=2, size=(40, 30)).astype(np.float32)}
    source = open_source(NET)
    one, two = (run(source, METHODS, importance=importance, workers=workers) for workers in (1, 2))
    assert saved(one, tmp_path / "1.cw") == saved(two, tmp_path / "2.cw")
    assert np.any(one.decode("a.weight") != run(source, METHODS).decode("a.weight"))


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    model = Tied()
    plan = Plan((Rule("*", Keep()),))
    codeword.compress(model, plan=plan).save(tmp_path / "tied.cw")
    model.head.weight = nn.Parameter(-model.embed.weight.detach())
    codeword.compress(model, plan=plan).save(tmp_path / "apart.cw")
    size = (tmp_path / "tied.cw").stat().st_size
    assert (tmp_path / "apart.cw").stat().st_size - size > 0.8 * 50 * 16 * 4  # random floats hardly shrink
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    codeword.compress(model, plan=plan).save(tmp_path / "copy.cw")
    assert (tmp_path / "copy.cw").stat().st_size - size < 20  # what is equal is stored once
    with codeword.load(tmp_path / "copy.cw") as artifact:
        assert artifact.entries["head.weight"].tied_to is None
        state = codeword.state_dict(artifact)
        assert torch.equal(state["head.weight"], state["embed.weight"])
        assert state["head.weight"].data_ptr() != state["embed.weight"].data_ptr()
    with codeword.load(tmp_path / "tied.cw") as artifact:
        assert artifact.entries["head.weight"].tied_to == "embed.weight"
        assert artifact.entries["head.weight"].nbytes == 0
        assert artifact.dense_nbytes == 4 * (50 * 16 + 16 * 16 + 16)
        assert bits(artifact.decode("head.weight")) == bits(artifact.decode("embed.weight"))
        assert bits(artifact.decode("head.weight")) == bits(model.embed.weight.detach().numpy())
        state = codeword.state_dict(artifact)
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", [RateAware(0.1), KMeans(4), Keep(3)])
def test_what_is_not_finite_is_named_with_its_place(method, value):
    net = {"fine": np.ones((2, 2), np.float32), "w": np.ones((3, 4, 5), np.float32)}
    net["w"][1, 2, 3] = net["w"][2, 0, 0] = value
    methods = {"fine": Keep(), "w": method}
    with pytest.raises(NonFiniteError, match=rf"tensor 'w' holds {value} at \[1, 2, 3\].*--keep-nonfinite"):
        run(open_source(net), methods)
    artifact = run(open_source(net), methods, keep_nonfinite=True)
    assert bits(artifact.decode("w")) == bits(net["w"])


def test_the_place_is_found_far_into_a_large_tensor():
    w = np.zeros((3, 1 << 20), np.float32)
    w[2, 5] = np.nan
    with pytest.raises(NonFiniteError, match=r"holds nan at \[2, 5\]"):
        run(open_source({"w": w}), {"w": KMeans(2)})


def test_float64_beyond_float32_is_not_finite_where_clustering_works():
    w = np.array([[1.0, 1e300]])
    with pytest.raises(NonFiniteError, match=r"holds 1e\+300 at \[0, 1\]"):
        run(open_source({"w": w}), {"w": KMeans(2)})
    assert run(open_source({"w": w}), {"w": Keep()}).decode("w").tolist() == [[1.0, 1e300]]


def test_nan_bits_survive_where_tensors_are_kept():
    w = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32).view(np.float32)
    assert bits(run(open_source({"w": w}), {"w": Keep()}).decode("w")) == bits(w)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3"])
def test_values_beside_the_largest_of_their_dtype_stay_finite(dtype):
    """An attention mask of 0 and the lowest value there is: no codeword may round it to -inf."""
    low = max(float(ml_dtypes.finfo(DTYPES[dtype]).min), float(np.finfo(np.float32).min))
    net = {"mask": np.triu(np.full((48, 48), low), 1).astype(DTYPES[dtype]), "w": NET["b.weight"]}
    for lam in (1e-4, 0.01, 0.3, 3.0):
        methods = {"mask": RateAware(lam, granularity="tensor"), "w": RateAware(lam)}
        artifact = run(open_source(net), methods)
        assert np.isfinite(artifact.decode("mask").astype(np.float64)).all()
        assert codeword.verify(artifact, net) == []


def test_what_cannot_be_approximated_is_said():
    mask = np.triu(np.full((48, 48), np.finfo(np.float32).min, np.float32), 1)
    plan = Plan((Rule("*", RateAware(0.03, granularity="tensor")),))
    made = codeword.fit({"mask": mask, "w": NET["b.weight"]}, plan=plan)
    assert list(made.kept) == ["mask"]
    assert made.kept["mask"].startswith("too near the largest value of its dtype")
    np.testing.assert_array_equal(made.artifact.decode("mask"), mask)


def test_nonfinite_at_the_dial():
    net = NET | {"d.weight": np.full((30, 30), np.inf, np.float16)}
    with pytest.raises(NonFiniteError, match=r"tensor 'd.weight' holds inf at \[0, 0\]"):
        codeword.compress(net, "4x")
    made = codeword.fit(net, "4x", keep_nonfinite=True)
    assert made.missed is None
    assert made.kept["d.weight"].startswith("holds NaN or infinity")
    assert bits(made.artifact.decode("d.weight")) == bits(net["d.weight"])
    excluded = codeword.compress(net, "4x", exclude=["d.weight"])  # what is kept anyway need not be finite
    assert bits(excluded.decode("d.weight")) == bits(net["d.weight"])


def zoo():
    """A tensor of every dtype in every shape that is hard, and what a BatchNorm holds."""
    net = {}
    for name, dtype in DTYPES.items():
        for shape in ((), (0,), (3, 0, 2), (1,), (6,), (5, 7), (2, 3, 2, 2)):
            values = np.random.default_rng(len(net)).normal(size=shape) * 3
            kind = np.abs(values) if name.startswith("u") else values > 0 if name == "bool" else values
            net[f"{name}.{'x'.join(map(str, shape))}"] = np.asarray(kind).astype(dtype)
    norm = nn.BatchNorm2d(6)
    norm(torch.randn(8, 6, 3, 3))
    net |= {f"bn.{name}": value.numpy() for name, value in norm.state_dict().items()}
    ends = ("int8", "int64", "uint64")
    return net | {f"{name}.ends": np.array([np.iinfo(name).min, np.iinfo(name).max], name) for name in ends}


@pytest.mark.parametrize("how", ["keep", "target", "cluster"])
def test_every_tensor_comes_back_in_its_dtype_and_shape(how, tmp_path):
    net = zoo()
    options = {
        "keep": {"plan": Plan((Rule("*", Keep()),))},
        "target": {"target": "1.5x", "fold_norms": False},
        "cluster": {"plan": Plan((Rule("*", RateAware(0.01)),))},
    }[how]
    made = codeword.fit(net, **options)
    made.artifact.save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        assert list(artifact) == list(net)
        assert codeword.verify(artifact, net) == []
        for name, value in net.items():
            found = artifact.decode(name)
            assert (found.shape, found.dtype) == (value.shape, value.dtype), name
            if how == "keep" or dtype_name(value.dtype) not in FLOATS:
                assert bits(found) == bits(value), name
            elif value.size:
                error = np.abs(found.astype(np.float64) - value.astype(np.float64)).max()
                assert error <= 2 * np.abs(value.astype(np.float64)).max(), name


class Draws:
    """Writes down the first number it draws."""

    def compress(self, weight, importance, *, generator):
        return Raw(np.full(weight.shape, generator.random(), np.float32))


def test_each_tensor_has_a_seed_of_its_own_that_order_does_not_change():
    net = {name: np.zeros(3, np.float32) for name in ("a", "b", "c")}
    drawn = {}
    for order in (["a", "b", "c"], ["c", "a"], ["b"]):
        artifact = run(open_source({name: net[name] for name in order}), dict.fromkeys(order, Draws()), seed=7)
        for name in order:
            assert drawn.setdefault(name, artifact.decode(name)[0]) == artifact.decode(name)[0]
            assert artifact.decode(name)[0] == np.float32(tensor_seed(7, name).random())
    assert len(set(drawn.values())) == 3
    assert tensor_seed(8, "a").random() != tensor_seed(7, "a").random()
    plan = Plan((Rule("*", Draws()),), seed=8)
    assert codeword.compress(net, plan=plan, seed=7).decode("a")[0] == np.float32(tensor_seed(8, "a").random())


def test_the_seed_of_a_name_never_changes():
    # sha256("0:fc1.weight"), its first 16 bytes: a plan written today gives the same file in every later version.
    assert tensor_seed(0, "fc1.weight").integers(1 << 32, size=3).tolist() == [395464487, 2914969060, 1658401710]


class Returns:
    def __init__(self, what):
        self.what = what

    def compress(self, weight, importance, *, generator):
        return self.what(weight)


@pytest.mark.parametrize(
    "what",
    [lambda w: Raw(w.reshape(-1)), lambda w: Raw(w.T), lambda w: Raw(w[:2]), lambda w: w, lambda w: None],
    ids=["flat", "transposed", "part", "an array", "nothing"],
)
def test_a_method_that_returns_another_shape(what):
    with pytest.raises(PlanError, match=r"tensor 'w': .*Returns.* made shape .* of \(3, 4\)"):
        run(open_source({"w": np.ones((3, 4), np.float32)}), {"w": Returns(what)})


def test_a_method_that_returns_another_dtype():
    with pytest.raises(ExprError, match="w: an expression of float64 for a tensor of float32"):
        run(open_source({"w": np.ones((3, 4), np.float32)}), {"w": Returns(lambda w: Raw(w.astype(np.float64)))})


def test_errors_of_workers_arrive(tmp_path):
    net = NET | {"bad": np.full((4, 4), np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match=r"'bad' holds nan at \[0, 0\]"):
        run(open_source(net), METHODS | {"bad": KMeans(2)}, workers=2)


class Dies:
    """A method whose process is killed, as one that takes too much memory is."""

    def compress(self, weight, importance, *, generator):
        os._exit(9)


def test_a_worker_that_dies_is_told_with_the_way_out():
    methods = METHODS | {"a.weight": Dies()}
    with pytest.raises(WorkerError, match=r"worker process of 2 ended.*memory.*fewer workers.*__main__"):
        run(open_source(NET), methods, workers=2)


def test_a_script_without_a_main_guard_ends_with_the_way_out(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import numpy, codeword\nw = numpy.eye(40, dtype='f4')\n"
                      "codeword.compress({'a': w, 'b': w}, '4x', workers=2)\n")  # fmt: skip
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert '__name__ == "__main__"' in done.stderr.splitlines()[-1]


def test_progress_counts_values_in_order():
    told = []
    run(open_source(NET), METHODS, progress=lambda *what: told.append(what))
    sizes = [value.size for value in NET.values()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    assert told == [*zip(starts, [sum(sizes)] * len(sizes), NET, strict=True), (sum(sizes), sum(sizes), "")]


def test_metadata_is_kept(tmp_path):
    codeword.compress(NET, "4x", metadata={"who": "größer", "": ""}).save(tmp_path / "net.cw")
    with codeword.load(tmp_path / "net.cw") as artifact:
        assert artifact.metadata == {"who": "größer", "": ""}
