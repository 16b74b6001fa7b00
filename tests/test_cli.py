"""What each verb does and prints, with the files on disk as the judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import codeword
from codeword import zoo
from codeword.cli import EXIT_CODES, app
from codeword.errors import CodewordError
from codeword.safetensors_file import read_header, write_safetensors

LENET = zoo.lenet5_path()
runner = CliRunner()


def invoke(*args, code=0):
    """stdout of a verb; asserts the exit code and, as CliRunner is no terminal, a silent stderr where all is well."""
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    if code == 0:
        assert result.stderr == ""
    return result.stdout


def invoke_json(*args, code=0):
    return json.loads(invoke(*args, "--json", code=code))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """LeNet-5 at 30x, and what compressing it said."""
    path = tmp_path_factory.mktemp("cli") / "model.cw"
    facts = invoke_json("compress", LENET, "-o", path, "--target", "30x", "--save-plan", path.with_suffix(".toml"))
    return path, facts


@pytest.fixture
def net(tmp_path):
    """A small checkpoint with floats, integers and two names of no special kind."""
    rng = np.random.default_rng(0)
    tensors = {
        "body.weight": rng.standard_normal((64, 96)).astype(np.float32),
        "body.bias": rng.standard_normal(64).astype(np.float32),
        "head.weight": rng.standard_normal((10, 64)).astype(np.float32),
        "steps": np.arange(5),
    }
    path = tmp_path / "net.safetensors"
    write_safetensors(path, [(n, str(t.dtype), t.shape) for n, t in tensors.items()], tensors.__getitem__)
    return path


def test_compress_tells_what_is_on_disk(small):
    path, facts = small
    assert facts["nbytes"] == path.stat().st_size
    assert facts["dense_nbytes"] == 4 * 431_080
    assert facts["ratio"] == pytest.approx(facts["dense_nbytes"] / path.stat().st_size)
    assert 0.98 * facts["target_nbytes"] <= facts["nbytes"] <= facts["target_nbytes"]
    assert facts["verified"] is True
    assert facts["differences"] == []
    assert facts["missed"] is None
    assert facts["tensors"] == 8 == facts["compressed"] + len(facts["kept"]) + facts["tied"]


def test_compress_prints_a_short_table(tmp_path, net):
    text = invoke("compress", net, "-o", tmp_path / "a.cw", "--target", "4x")
    size = (tmp_path / "a.cw").stat().st_size
    assert f"{size:,} bytes on disk" in text
    assert "verified" in text
    assert "1 int64 values are never approximated" in text
    assert "3 compressed, 1 kept losslessly" in text
    assert len(text.splitlines()) < 12


def test_a_saved_plan_makes_the_same_bytes(small, tmp_path):
    path, _ = small
    facts = invoke_json("compress", LENET, "-o", tmp_path / "again.cw", "--plan", path.with_suffix(".toml"))
    assert (tmp_path / "again.cw").read_bytes() == path.read_bytes()
    assert facts["target_nbytes"] is None


def test_workers_and_seed_make_the_same_bytes_again(net, tmp_path):
    invoke("compress", net, "-o", tmp_path / "a.cw", "--target", "4x", "--seed", 3)
    invoke("compress", net, "-o", tmp_path / "b.cw", "--target", "4x", "--seed", 3, "--workers", 1)
    assert (tmp_path / "a.cw").read_bytes() == (tmp_path / "b.cw").read_bytes()


def test_include_and_exclude_keep_the_rest_losslessly(net, tmp_path):
    out = tmp_path / "a.cw"
    facts = invoke_json(
        "compress", net, "-o", out, "--target", "1.5bpw", "--include", "*.weight", "--exclude", "head.*", code=6
    )
    assert set(facts["kept"]) == {"body.bias", "head.weight", "steps"}
    tensors = {t["name"]: t for t in invoke_json("inspect", out, "--against", net)["tensors"]}
    assert [name for name, t in tensors.items() if not t["exact"]] == ["body.weight"]


def test_a_missed_target_is_written_and_told(net, tmp_path):
    out = tmp_path / "tiny.cw"
    result = runner.invoke(app, ["compress", str(net), "-o", str(out), "--target", "5000x"])
    assert result.exit_code == 6
    assert f"the smallest file there is has {out.stat().st_size} bytes" in result.stderr
    assert codeword.verify(out, net) == []
    facts = invoke_json("compress", net, "-o", out, "--target", "5000x", code=6)
    assert facts["missed"].startswith("target 5000x is")
    assert facts["verified"] is True


def test_calibration_weighs_errors_without_labels(small, tmp_path):
    plain, _ = small
    weighed = tmp_path / "weighed.cw"
    calibration = ["--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", 100]
    invoke("compress", LENET, "-o", weighed, "--target", "30x", *calibration)
    assert plain.read_bytes() != weighed.read_bytes()
    found = invoke_json("eval", weighed, "--model", "codeword.zoo:lenet5", "--data", "digits")
    assert found["top1"] > 95


def test_report_folder(net, tmp_path):
    facts = invoke_json("compress", net, "-o", tmp_path / "a.cw", "--target", "4x", "--report", tmp_path / "new" / "r")
    assert {Path(path).name for path in facts["report"].values()} == {"report.json", "report.md", "report.png"}
    page = json.loads((tmp_path / "new" / "r" / "report.json").read_text())
    assert page["measured"]["nbytes"] == (tmp_path / "a.cw").stat().st_size


def test_inspect_agrees_with_the_file(small):
    path, _ = small
    facts = invoke_json("inspect", path, "--against", LENET)
    assert facts["nbytes"] == path.stat().st_size
    header = facts["nbytes"] - sum(tensor["nbytes"] for tensor in facts["tensors"])
    assert 0 < header < facts["container_nbytes"] <= 220
    text = invoke("inspect", path, "--against", LENET)
    for tensor in facts["tensors"]:
        line = next(line for line in text.splitlines() if line.startswith(tensor["name"] + " "))
        assert f"{tensor['nbytes']:,}" in line
        assert f"{tensor['sqnr_db']:.1f}" in line
    assert f"{path.stat().st_size:,} bytes" in text
    assert "SQNR" not in invoke("inspect", path)


def test_inspect_marks_exact_copies(net, tmp_path):
    invoke("compress", net, "-o", tmp_path / "a.cw", "--target", "4x")
    text = invoke("inspect", tmp_path / "a.cw", "--against", net)
    assert next(line for line in text.splitlines() if line.startswith("steps")).split()[-1] == "exact"


def test_long_names_are_not_cut_and_nothing_is_coloured_when_piped(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "backbone." + "block." * 30 + "weight[0]"
    weights = {name: np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
    codeword.compress(weights, "4x").save(tmp_path / "a.cw")
    text = invoke("inspect", tmp_path / "a.cw")
    assert name in text
    assert "\x1b" not in text


def test_verify(small, net):
    path, _ = small
    assert "verified" in invoke("verify", path, "--against", LENET)
    assert invoke_json("verify", path) == {
        "file": str(path),
        "against": None,
        "ok": True,
        "tensors": 8,
        "nbytes": path.stat().st_size,
        "differences": [],
    }
    found = invoke_json("verify", path, "--against", net, code=1)
    assert found["ok"] is False
    assert {"tensor": "steps", "what": "is missing from the file"} in found["differences"]
    assert "steps is missing from the file" in invoke("verify", path, "--against", net, code=1)


def test_decompress_writes_safetensors(small, tmp_path):
    path, _ = small
    facts = invoke_json("decompress", path, "-o", tmp_path / "dense.safetensors")
    assert facts["output_nbytes"] == (tmp_path / "dense.safetensors").stat().st_size
    assert read_header(tmp_path / "dense.safetensors").entries.keys() == read_header(LENET).entries.keys()
    again = codeword.inspect(path, tmp_path / "dense.safetensors")
    assert all(tensor.exact for tensor in again.tensors)


def test_eval_puts_the_uncompressed_net_beside_it(small):
    path, _ = small
    args = ("eval", path, "--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", 300)
    facts = invoke_json(*args, "--against", LENET)
    assert facts["n"] == 300
    assert facts["original_top1"] >= 98
    assert facts["drop_top1"] == pytest.approx(facts["original_top1"] - facts["top1"])
    assert facts["agreement"] >= 98
    text = invoke(*args, "--against", LENET)
    assert f"{facts['top1']:.2f}" in text
    assert "drop (points)" in text
    alone = invoke(*args)
    assert "--against" in alone
    assert f"top-1 {facts['top1']:.2f} %" in alone


def test_eval_of_a_checkpoint_is_its_own_score():
    facts = invoke_json("eval", LENET, "--model", "codeword.zoo:lenet5", "--data", "digits")
    model = zoo.lenet5_trained()
    assert facts["top1"] == codeword.evaluate(model, "digits").top1
    assert facts["n"] == 1000


def test_eval_normalises_on_request():
    args = ("eval", LENET, "--model", "codeword.zoo:lenet5", "--data", "digits", "--limit", 50)
    plain = invoke_json(*args)
    assert invoke_json(*args, "--mean", "0", "--std", "1")["top1"] == plain["top1"]
    assert invoke_json(*args, "--mean", "50", "--std", "1")["top1"] < plain["top1"]
    assert "no list of numbers" in invoke_json(*args, "--mean", "a,b", code=2)["error"]


def test_version_and_help():
    assert invoke("--version") == f"codeword {codeword.__version__}\n"
    for verb in ("compress", "plan", "inspect", "verify", "decompress", "eval", "sweep", "demo"):
        assert "--json" in invoke(verb, "--help")
    text = invoke("--help")
    assert "Exit codes" in text
    assert "interrupted (Ctrl-C)" in text


def test_every_error_has_its_code_in_the_table():
    kinds = [CodewordError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        assert kind.exit_code in EXIT_CODES


def test_a_real_process_is_quiet_and_imports_no_torch(small):
    path, _ = small
    program = (
        "import sys\nfrom codeword.cli import app\n"
        f"app(['inspect', {str(path)!r}, '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["nbytes"] == path.stat().st_size


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_progress_with_the_time_left(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        command = [sys.executable, "-m", "codeword", "compress", LENET, "-o", tmp_path / "a.cw", "--json"]
        env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env)
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = terminal.read(4096)
            except OSError:  # how a pseudo-terminal says that the other side is gone
                break
            if not chunk:
                break
            seen += chunk
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"time left" in seen
    assert b"coding" in seen
    assert json.loads(out)["nbytes"] == (tmp_path / "a.cw").stat().st_size
