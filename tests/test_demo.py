"""The demo: what it promises, measured on the files it wrote; and the page of the command line is up to date."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import codeword
from codeword import zoo
from codeword.cli import EXIT_CODES, app
from codeword.demo import run_demo
from codeword.errors import TargetError, WriteError

DOCS = Path(__file__).parents[1] / "docs"
runner = CliRunner()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "demo"
    start = time.perf_counter()
    result = runner.invoke(app, ["demo", "-o", str(folder), "--json"])
    seconds = time.perf_counter() - start
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return folder, json.loads(result.stdout), seconds


def test_the_seconds_it_tells_are_not_more_than_it_took(demo):
    _, facts, seconds = demo
    assert 0 < facts["seconds"] <= seconds


def test_small_and_still_right(demo):
    folder, facts, _ = demo
    assert facts["nbytes"] == (folder / "model.cw").stat().st_size
    assert 4 * 431_080 / (folder / "model.cw").stat().st_size >= 30
    assert facts["accuracy"]["n"] == 1000
    assert facts["accuracy"]["original_top1"] >= 99
    assert facts["accuracy"]["drop_top1"] <= 1.0
    assert facts["differences"] == []
    assert facts["container_nbytes"] <= 220


def test_the_accuracy_is_that_of_the_file(demo):
    folder, facts, _ = demo
    model = zoo.lenet5()
    model.load_state_dict(codeword.state_dict(codeword.load(folder / "model.cw")))
    assert codeword.evaluate(model, "digits").top1 == pytest.approx(facts["accuracy"]["top1"], abs=0.1)


def test_its_files(demo):
    folder, facts, _ = demo
    assert {path.name for path in folder.iterdir()} == {"model.cw", "report.json", "report.md", "report.png"}
    assert set(facts["files"]) == {"model", "json", "md", "png"}
    assert f"**{(folder / 'model.cw').stat().st_size:,} bytes** on disk" in (folder / "report.md").read_text()
    page = json.loads((folder / "report.json").read_text())
    assert page["accuracy"] == facts["accuracy"]


def test_it_prints_a_short_table_and_runs_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("codeword.demo.find_spec", lambda _: None)
    result = runner.invoke(app, ["demo", "-o", str(tmp_path), "--target", "35x"])
    assert result.exit_code == 0, result.output
    assert f"{(tmp_path / 'model.cw').stat().st_size:,}" in result.stdout
    assert "1,000 MNIST test digits" in result.stdout
    assert "read back and verified" in result.stdout
    assert len(result.stdout.splitlines()) < 20
    assert 'pip install "codeword[plot]"' in result.stderr
    assert not (tmp_path / "report.png").exists()


def test_its_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file"):
        run_demo(tmp_path / "file")
    with pytest.raises(TargetError):
        run_demo(tmp_path / "demo", "30y")
    result = runner.invoke(app, ["demo", "-o", str(tmp_path / "tiny"), "--target", "5000x", "--json"])
    assert result.exit_code == 6
    assert "smallest file" in json.loads(result.stdout)["missed"]


# docs/cli.md


def test_the_page_of_the_command_line_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert text == module.page(), "run python docs/generate_cli.py"
    for verb in ("compress", "inspect", "verify", "decompress", "eval", "demo"):
        assert f"\n## {verb}\n" in text
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text
