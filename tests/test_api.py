"""The main path, end to end, on the LeNet-5 and the digits that ship with the package."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import codeword
from codeword import Keep, KMeans, Plan, Rule
from codeword.data import load_data
from codeword.errors import DataError, FormatError, MismatchError, PlanError, SourceError, TargetError, WriteError
from codeword.report import Difference
from codeword.safetensors_file import write_safetensors
from codeword.zoo import digits, lenet5, lenet5_path, lenet5_trained, lenet_300_100

PUBLIC = [
    "Artifact",
    "Birch",
    "CodewordError",
    "Compressed",
    "DensityKMeans",
    "Finetune",
    "FixedPoint",
    "Forecast",
    "Front",
    "KMeans",
    "Keep",
    "KernelTemplates",
    "Lloyd",
    "Method",
    "Plan",
    "ProductQuantization",
    "Prune",
    "RateAware",
    "RowScaled",
    "Rule",
    "TargetMissed",
    "compress",
    "decompress",
    "dry_run",
    "evaluate",
    "fit",
    "inspect",
    "load",
    "state_dict",
    "swap",
    "sweep",
    "verify",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """LeNet-5 at 30x, saved."""
    path = tmp_path_factory.mktemp("api") / "lenet5.cw"
    codeword.compress(lenet5_path(), "30x").save(path)
    return path


@pytest.fixture
def artifact(path):
    with codeword.load(path) as artifact:
        yield artifact


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_public_names():
    assert sorted(codeword.__all__) == PUBLIC
    assert all(hasattr(codeword, name) for name in PUBLIC)


def test_importing_needs_no_torch_and_neither_does_a_round_trip(tmp_path):
    code = """
import sys
import codeword
print("torch" in sys.modules)
sys.modules["torch"] = None  # an import of it fails from here on
codeword.compress(sys.argv[1], "30x").save(sys.argv[2])
print(len(codeword.verify(sys.argv[2], sys.argv[1])))
"""
    assert python(code, lenet5_path(), tmp_path / "net.cw") == ["False", "0"]
    assert (tmp_path / "net.cw").stat().st_size <= 57_477


def test_thirty_times_smaller_without_data(path, artifact):
    size = path.stat().st_size
    assert artifact.nbytes == size
    assert artifact.dense_nbytes == 431_080 * 4
    assert artifact.ratio == 431_080 * 4 / size >= 30
    assert artifact.bits_per_weight == pytest.approx(8 * size / 431_080)


def test_what_is_in_the_file_is_what_was_compressed(path, artifact):
    assert codeword.verify(path) == codeword.verify(path, lenet5_path()) == []
    assert codeword.verify(artifact, lenet5_trained()) == []
    made = codeword.compress(lenet5_path(), "30x")
    for name in artifact:
        assert made.decode(name).tobytes() == artifact.decode(name).tobytes()


def test_a_module_and_its_file_give_the_same_bytes(path, tmp_path):
    # The module's tensors are in another order, so what is compared are the tensors.
    with codeword.load(path) as of_file:
        of_module = codeword.compress(lenet5_trained(), plan=codeword.fit(lenet5_path(), "30x").plan)
        assert set(of_module) == set(of_file)
        for name in of_file:
            np.testing.assert_array_equal(of_module.decode(name), of_file.decode(name))


def test_classifying_from_the_file(artifact):
    dense, model = lenet5_trained(), lenet5()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swapped = codeword.swap(model, artifact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # a copy was swapped
    model.load_state_dict(codeword.state_dict(artifact))
    x = torch.from_numpy(digits()[0])
    with torch.inference_mode():
        loaded, run = model(x), swapped(x)
    assert (loaded - run).abs().max() <= 1e-5 * loaded.abs().max()
    with torch.inference_mode():
        assert (loaded - dense(x)).abs().max() > 0.01  # lossy, and not the net it came from


def test_accuracy_within_a_point(path, artifact):
    data = load_data("digits")
    dense = codeword.evaluate(lenet5_trained(), data)
    assert dense.n == 1000
    assert dense.top1 > 98
    for file in (path, str(path), artifact):
        score = codeword.evaluate(file, "digits", model=lenet5())
        assert score.top1 >= dense.top1 - 1
    assert codeword.evaluate(path, "digits", model=lenet5(), limit=10).n == 10


def test_facts_add_up_to_the_file_on_disk(path):
    report = codeword.inspect(path, lenet5_path())
    size = path.stat().st_size
    assert report.nbytes == size
    assert report.ratio == 431_080 * 4 / size
    # A tensor's bytes are its streams and a checksum of 4, unless all it has is in pools; what is left is the header.
    checksums = 4 * sum(len(tensor.shape) > 1 for tensor in report.tensors)
    assert sum(tensor.nbytes for tensor in report.tensors) + report.container_nbytes - checksums == size
    assert report.container_nbytes <= 220
    source = load_file(lenet5_path())
    assert [tensor.name for tensor in report.tensors] == list(codeword.load(path))
    for tensor in report.tensors:
        found, original = codeword.load(path).decode(tensor.name), source[tensor.name].astype(np.float64)
        assert (tensor.shape, tensor.dtype) == (original.shape, "float32")
        assert tensor.bits_per_weight == pytest.approx(8 * tensor.nbytes / original.size)
        assert tensor.sparsity == np.mean(found == 0)
        noise = np.square(found - original).sum()
        assert tensor.sqnr_db == pytest.approx(10 * np.log10(np.square(original).sum() / noise))
        assert not tensor.exact
        if tensor.method.startswith("shared"):
            assert tensor.n_clusters >= len(np.unique(found))


def test_decompressed_it_is_plain_safetensors(path, artifact, tmp_path):
    codeword.decompress(path, tmp_path / "dense.safetensors")
    found = load_file(tmp_path / "dense.safetensors")
    assert set(found) == set(artifact)
    for name, value in found.items():
        assert value.tobytes() == artifact.decode(name).tobytes()
    assert codeword.verify(path, tmp_path / "dense.safetensors") == []
    codeword.decompress(artifact, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "dense.safetensors").read_bytes()


def test_with_data_the_target_is_still_met():
    made = codeword.fit(lenet5_trained(), "30x", data=load_data("digits", limit=300))
    assert made.missed is None
    assert made.artifact.ratio >= 30
    plain = codeword.compress(lenet5_trained(), "30x")
    assert np.any(made.artifact.decode("fc1.weight") != plain.decode("fc1.weight"))


def test_eight_times_is_the_default():
    made = codeword.fit(lenet5_path())
    assert (made.plan.target, made.target_nbytes) == ("8x", 431_080 * 4 // 8)
    assert made.missed is None


MEMORY = """
import resource
import sys
import codeword
import codeword.allocate
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
artifact = codeword.compress(sys.argv[1], "10x")
print(peak() - before, int(artifact.ratio))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_follows_the_largest_tensor_not_the_file(tmp_path):
    names, shape = [f"layer{i}.weight" for i in range(8)], (2048, 2048)  # 8 tensors of 16 MiB
    rng = np.random.default_rng(0)
    write_safetensors(
        tmp_path / "net.safetensors",
        [(name, "float32", shape) for name in names],
        lambda name: rng.standard_normal(shape, np.float32),
    )
    grown, ratio = map(int, python(MEMORY, tmp_path / "net.safetensors"))
    assert ratio == 10
    # Measured: 140 MiB, of which 48 are bins and compressed files in memory. The whole net would add 112.
    assert grown < 1.5 * 16 + 175


def test_a_compressed_file_is_no_checkpoint(path):
    with pytest.raises(SourceError, match="compressed already; decompress it first"):
        codeword.compress(path, "4x")
    with pytest.raises(SourceError, match="compressed already"):
        codeword.verify(path, path)


def test_a_checkpoint_is_no_compressed_file():
    for function in (codeword.load, codeword.verify, codeword.inspect):
        with pytest.raises(FormatError, match=r"lenet5\.safetensors"):
            function(lenet5_path())


@pytest.mark.parametrize("what", [None, 3, [1, 2], object(), b"bytes"])
def test_what_is_no_net(what):
    with pytest.raises(SourceError, match="cannot read tensors from a"):
        codeword.compress(what, "4x")


def test_arguments_that_contradict_each_other(path):
    plan = Plan((Rule("*", Keep()),))
    x = digits()[0][:10]
    for arguments, error, says in (
        ({"target": "4x", "plan": plan}, PlanError, "target or plan, not both"),
        ({"target": "4x", "data": [x], "importance": {}}, PlanError, "data or importance, not both"),
        ({"target": "4x", "data": [x]}, PlanError, "data needs a model"),
        ({"target": "a lot"}, TargetError, "'a lot' cannot be read"),
        ({"plan": "absent.toml"}, PlanError, "absent.toml: cannot be read"),
        ({"target": "4x", "include": ["absent*"]}, PlanError, "'absent.' matches none of 8"),
    ):
        with pytest.raises(error, match=says):
            codeword.compress(lenet5_path(), **arguments)
    with pytest.raises(PlanError, match="needs the module it belongs to: give model="):
        codeword.evaluate(path, "digits")
    with pytest.raises(DataError):
        codeword.evaluate(lenet5_trained(), "no such spec")


def test_a_model_that_does_not_fit(path, artifact):
    for function in (lambda: codeword.swap(lenet_300_100(), artifact), lambda: codeword.inspect(path, lenet_300_100())):
        with pytest.raises(MismatchError, match=r"conv1|fc1|fc2"):
            function()
    with pytest.raises(MismatchError):
        codeword.evaluate(path, "digits", model=lenet_300_100())
    found = codeword.verify(path, lenet_300_100())
    assert Difference("conv1.weight", "is not in LeNet300 module") in found
    assert Difference("fc1.weight", "is float32 (500, 800), the original float32 (300, 784)") in found
    assert Difference("fc3.weight", "is missing from the file") in found


def test_verify_tells_integers_that_differ(tmp_path):
    net = {"w": np.ones((4, 4), np.float32), "steps": np.arange(3)}
    artifact = codeword.compress(net, plan=Plan((Rule("*", Keep()),)))
    assert codeword.verify(artifact, net) == []
    other = net | {"steps": np.arange(1, 4), "w": net["w"] * 2}  # how close floats are is not verify's matter
    assert [difference.tensor for difference in codeword.verify(artifact, other)] == ["steps"]


def test_outputs_that_cannot_be_written_leave_nothing(artifact, tmp_path):
    for target in (tmp_path / "absent" / "net.cw", tmp_path):
        with pytest.raises(WriteError):
            artifact.save(target)
        with pytest.raises(WriteError):
            codeword.decompress(artifact, target)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_survives_a_write_that_fails(artifact, tmp_path, monkeypatch):
    path = tmp_path / "net.cw"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="No space left"):
        artifact.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_went_in_is_not_changed(tmp_path):
    model = lenet5_trained()
    before = copy.deepcopy(model.state_dict())
    codeword.compress(model, plan=Plan((Rule("*.weight", KMeans(2)), Rule("*", Keep(3)))))
    codeword.compress(model, "20x", data=[digits()[0][:10]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    net = {"w": np.ones((4, 4), np.float32)}
    codeword.compress(net, plan=Plan((Rule("*", Keep()),))).decode("w")
    net["w"][0, 0] = 5  # and stays the caller's to change
    assert net["w"].flags.writeable


def test_state_dicts_take_part_in_training(artifact):
    state = codeword.state_dict(artifact)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    layer = nn.Linear(500, 10)
    layer.load_state_dict({"weight": state["fc2.weight"], "bias": state["fc2.bias"]})
    layer(torch.ones(1, 500)).sum().backward()
    with torch.no_grad():
        state["fc2.weight"].add_(1)  # writable
    assert artifact.decode("fc2.weight").tobytes() != state["fc2.weight"].numpy().tobytes()
