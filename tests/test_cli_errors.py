"""Bad input from the command line: the exit code, a message that names the thing, and nothing half-written."""

import errno
import json
import os
import pickle

import numpy as np
import pytest
from typer.testing import CliRunner

import codeword
from codeword import api, zoo
from codeword.cli import app
from codeword.safetensors_file import write_safetensors

LENET = zoo.lenet5_path()
runner = CliRunner()


def fails(*args, code, says=()):
    """Run a verb that must fail: as text on stderr in one line, and the same as JSON on stdout. Returns the message."""
    args = [str(arg) for arg in args]
    result = runner.invoke(app, args)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code != 2:  # Typer draws its own box
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
    as_json = runner.invoke(app, [*args, "--json"])
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == found["exit_code"] == code
    assert as_json.stderr == ""
    for word in says:
        assert str(word) in found["error"]
    return found["error"]


def write(path, tensors):
    write_safetensors(path, [(n, str(t.dtype), t.shape) for n, t in tensors.items()], tensors.__getitem__)
    return path


@pytest.fixture(scope="module")
def made():
    return codeword.fit(LENET, "40x")


@pytest.fixture(scope="module")
def small(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "model.cw"
    made.artifact.save(path)
    return path


@pytest.fixture
def out(tmp_path):
    """An output that exists: a verb that fails must leave it alone, and nothing beside it."""
    path = tmp_path / "out" / "old.cw"
    path.parent.mkdir()
    path.write_bytes(b"yesterday's good file")
    yield path
    assert path.read_bytes() == b"yesterday's good file"
    assert [entry.name for entry in path.parent.iterdir()] == ["old.cw"]


# Checkpoints


def test_missing_input(tmp_path, out):
    fails("compress", tmp_path / "no.safetensors", "-o", out, code=3, says=["no.safetensors", "does not exist"])


def test_empty_input(tmp_path, out):
    (tmp_path / "empty.safetensors").touch()
    fails("compress", tmp_path / "empty.safetensors", "-o", out, code=3, says=["is empty"])


@pytest.mark.parametrize("length", [5, 100, 100_000])
def test_truncated_input(tmp_path, out, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(LENET.read_bytes()[:length])
    fails("compress", path, "-o", out, code=3, says=["cut.safetensors"])


def test_corrupted_input(tmp_path, out):
    path = tmp_path / "bad.safetensors"
    data = bytearray(LENET.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    fails("compress", path, "-o", out, code=3, says=["bad.safetensors"])


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path, out):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "trap.pt"
    path.write_bytes(pickle.dumps({"weight": Trap()}, protocol=2))
    fails("compress", path, "-o", out, code=3, says=["trap.pt", "refused"])
    assert not (tmp_path / "ran").exists()


def test_a_compressed_input_is_told_as_such(small, out):
    fails("compress", small, "-o", out, code=3, says=["compressed already", "codeword decompress"])


def test_nan_is_named_or_kept(tmp_path, out):
    weights = {name: np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) for name in ("a", "b")}
    weights["b"][3, 5] = np.nan
    path = write(tmp_path / "nan.safetensors", weights)
    fails("compress", path, "-o", out, "--target", "1.5x", code=3, says=["'b'", "nan", "[3, 5]", "--keep-nonfinite"])
    kept = tmp_path / "kept.cw"
    args = ["compress", str(path), "-o", str(kept), "--target", "1.9x", "--keep-nonfinite", "--json"]
    result = runner.invoke(app, args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept"]["b"].startswith("holds NaN or infinity")
    assert codeword.load(kept).decode("b").tobytes() == weights["b"].tobytes()


# Targets, plans, globs


@pytest.mark.parametrize("target", ["thirty", "0x", "-3x", "30xx", ""])
def test_a_target_that_cannot_be_read(out, target):
    fails("compress", LENET, "-o", out, f"--target={target}", code=6, says=["30x", "120KB", "2.5bpw"])


@pytest.mark.parametrize("target", ["1B", "1e12x", "1e-9bpw"])
def test_an_impossible_target_gives_the_nearest_file(tmp_path, target):
    path = tmp_path / "tiny.cw"
    result = runner.invoke(app, ["compress", str(LENET), "-o", str(path), "--target", target])
    assert result.exit_code == 6, result.output
    assert f"the smallest file there is has {path.stat().st_size} bytes" in result.stderr
    assert codeword.verify(path, LENET) == []


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (np.full((30, 40), 0.3, np.float32), "the lossless file has 4"),
        (np.full((30, 40), np.finfo(np.float32).max), "the lossless file has 4"),
        (np.zeros((0, 3), np.float32), "the smallest file there is has 3"),
        (np.array([2.0], np.float32), "the smallest file there is has 4"),
    ],
    ids=["constant", "constant of the largest", "empty", "one weight"],
)
def test_a_net_that_no_target_fits_is_written_as_it_is(tmp_path, weight, says):
    source, path = write(tmp_path / "net.safetensors", {"w": weight}), tmp_path / "net.cw"
    result = runner.invoke(app, ["compress", str(source), "-o", str(path), "--target", "8x"])
    assert result.exit_code == 6, result.output
    assert says in result.stderr
    np.testing.assert_array_equal(codeword.load(path).decode("w"), weight)


def test_a_plan_that_a_tensor_does_not_fit_names_both(tmp_path, out):
    source = write(tmp_path / "net.safetensors", {"fc.weight": np.ones((3, 5), np.float32)})
    plan = tmp_path / "plan.toml"
    plan.write_text('[[rule]]\ntensors = "*"\nmethod = "product"\ncluster_dim = 2\n')
    says = ["'fc.weight'", "cluster_dim 2", "(3, 5)", "valid are 5"]
    fails("compress", source, "-o", out, "--plan", plan, code=5, says=says)


def test_target_and_plan_exclude_each_other(tmp_path, out):
    plan = tmp_path / "plan.toml"
    plan.write_text('[[rule]]\ntensors = "*"\nmethod = "keep"\n')
    fails("compress", LENET, "-o", out, "--target", "30x", "--plan", plan, code=5, says=["not both"])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ('tensors = "*"\nmethod = "kmean"', ["rule[0].method", "did you mean 'kmeans'"]),
        ('tensors = "*"\nmethod = "kmeans"\nn_cluster = 4', ["rule[0].n_cluster", "did you mean 'n_clusters'"]),
        ('tensors = "*"\nmethod = "kmeans"\nn_clusters = "4"', ["rule[0].n_clusters"]),
        ('tensors = "fc1.wieght"\nmethod = "keep"', ["'fc1.wieght'", "'fc1.weight'"]),
        ("tensors = ", ["not TOML"]),
    ],
)
def test_a_plan_with_a_typo(tmp_path, out, rule, says):
    plan = tmp_path / "plan.toml"
    rest = "" if rule.endswith("= ") or '"*"' in rule else '\n[[rule]]\ntensors = "*"\nmethod = "keep"\n'
    plan.write_text(f"[[rule]]\n{rule}\n{rest}")
    fails("compress", LENET, "-o", out, "--plan", plan, code=5, says=says)


def test_a_missing_plan(tmp_path, out):
    fails("compress", LENET, "-o", out, "--plan", tmp_path / "no.toml", code=5, says=["no.toml"])


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_glob_that_matches_nothing(out, option):
    fails("compress", LENET, "-o", out, option, "fc9.*", code=5, says=["'fc9.*'", "matches none of 8 tensors", "fc"])


def test_calibration_needs_both_model_and_data(out):
    fails("compress", LENET, "-o", out, "--data", "digits", code=2, says=["--model and --data"])
    fails("compress", LENET, "-o", out, "--model", "codeword.zoo:lenet5", code=2, says=["--model and --data"])
    fails("compress", LENET, "-o", out, "--limit", "5", code=2, says=["--limit"])


# Outputs


@pytest.mark.parametrize("where", ["folder", "missing/model.cw", "file/model.cw"])
def test_unwritable_output_is_told_before_the_work(tmp_path, monkeypatch, where):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(api, "fit", lambda *_, **__: pytest.fail("it went to work"))
    fails("compress", LENET, "-o", tmp_path / where, code=8, says=[where, "nothing was changed"])
    fails("compress", LENET, "-o", tmp_path / "a.cw", "--save-plan", tmp_path / where, code=8, says=[where])
    assert not (tmp_path / "a.cw").exists()


def test_unwritable_report_folder(tmp_path, out):
    (tmp_path / "file").touch()
    fails("compress", LENET, "-o", out, "--report", tmp_path / "file", code=8, says=["file"])


def test_the_input_is_never_overwritten(tmp_path, small):
    path = tmp_path / "net.safetensors"
    path.write_bytes(LENET.read_bytes())
    fails("compress", path, "-o", path, code=8, says=["it is the input"])
    assert path.read_bytes() == LENET.read_bytes()
    before = small.read_bytes()
    fails("decompress", small, "-o", small, code=8, says=["it is the input"])

    assert small.read_bytes() == before


def test_no_shard_of_a_folder_is_replaced(tmp_path):
    """The input is a folder or an index; what would be lost are the files it stands for."""
    shard = write(tmp_path / "model-1.safetensors", {"w": np.eye(8, dtype=np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard.name}}))
    before = shard.read_bytes(), index.read_bytes()
    for source in (tmp_path, index):
        for out in (shard, index):
            fails("compress", source, "-o", out, code=8, says=["it is the input", out])
            fails("compress", source, "-o", tmp_path / "x.cw", "--save-plan", out, code=8, says=["it is the input"])
    assert (shard.read_bytes(), index.read_bytes()) == before


def test_file_and_plan_cannot_be_one(tmp_path):
    out = tmp_path / "x.cw"
    fails("compress", LENET, "-o", out, "--save-plan", tmp_path / "." / "x.cw", code=8, says=["--save-plan", out])
    assert not out.exists()


def test_a_full_disk_leaves_the_old_file(made, out, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(api, "fit", lambda *_, **__: made)
    monkeypatch.setattr("codeword.atomic.os.fsync", full)
    fails("compress", LENET, "-o", out, code=8, says=["old.cw", "No space left"])


def test_ctrl_c_leaves_the_old_file(out, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "fit", interrupt)
    fails("compress", LENET, "-o", out, code=130, says=["interrupted"])


def test_a_difference_after_writing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "verify", lambda *_: [codeword.report.Difference("fc1.weight", "is not what it was")])
    result = runner.invoke(app, ["compress", str(LENET), "-o", str(tmp_path / "a.cw")])
    assert result.exit_code == 1
    assert "NO: fc1.weight is not what it was" in result.stdout


def test_a_bug_keeps_its_traceback(monkeypatch, out):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(api, "fit", bug)
    result = runner.invoke(app, ["compress", str(LENET), "-o", str(out)])
    assert isinstance(result.exception, ZeroDivisionError)


# Files


@pytest.mark.parametrize("verb", ["inspect", "verify", "decompress", "eval"])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "flipped header", "flipped payload", "no .cw"])
def test_a_damaged_file(verb, kind, small, tmp_path, out):
    path = tmp_path / "bad.cw"
    data = bytearray(small.read_bytes())
    if kind == "empty":
        data.clear()
    elif kind == "truncated":
        del data[len(data) // 2 :]
    elif kind == "flipped header":
        data[30] ^= 1
    elif kind == "flipped payload":
        data[-1000] ^= 1
    elif kind == "no .cw":
        data[:] = LENET.read_bytes()
    if kind != "missing":
        path.write_bytes(data)
    more = {"decompress": ["-o", out], "eval": ["--model", "codeword.zoo:lenet5", "--data", "digits"]}
    fails(verb, path, *more.get(verb, []), code=4, says=["bad.cw"])


def test_verify_needs_an_original_that_is_there(small, tmp_path):
    fails("verify", small, "--against", tmp_path / "no.pt", code=3, says=["no.pt"])


def test_inspect_against_another_net(small, tmp_path):
    other = write(tmp_path / "other.safetensors", {"x": np.ones((4, 4), np.float32)})
    fails("inspect", small, "--against", other, code=9, says=["conv1.bias"])


# Models and data


def test_a_model_whose_shapes_do_not_fit(small):
    args = ("--model", "codeword.zoo:lenet_300_100", "--data", "digits")
    fails("eval", small, *args, code=9, says=["do not fit"])
    fails("eval", LENET, *args, code=9, says=["do not fit"])


def test_a_factory_that_is_not_there(small):
    fails("eval", small, "--model", "codeword.zoo:lenet6", "--data", "digits", code=3, says=["did you mean 'lenet5'"])
    fails("eval", small, "--model", "lenet5", "--data", "digits", code=3, says=["module:factory"])
    fails("eval", small, "--model", "builtins:dict", "--data", "digits", code=3, says=["torch.nn.Module"])


def test_data_that_is_not_there(small, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEWORD_DATA", str(tmp_path))
    model = ("--model", "codeword.zoo:lenet5")
    fails("eval", small, *model, "--data", "mnist:test", code=7, says=["t10k-images-idx3-ubyte", "http"])
    fails("eval", small, *model, "--data", "mnist:tset", code=7, says=["did you mean 'mnist:test'"])
    fails("eval", small, *model, "--data", "digits", "--mean", "0,0,0", code=7, says=["mean has 3 values"])


# The command line itself


@pytest.mark.parametrize(
    "args", [["compres"], ["compress"], ["inspect"], ["compress", "a", "-o", "b", "--seed", "x"], ["inspect", "--no"]]
)
def test_a_wrong_command_line(args):
    fails(*args, code=2)


def test_missing_matplotlib_is_told_before_the_work(out, tmp_path, monkeypatch):
    monkeypatch.setattr("codeword.report.page.find_spec", lambda _: None)
    fails("compress", LENET, "-o", out, "--report", tmp_path / "r", code=10, says=['pip install "codeword[plot]"'])
