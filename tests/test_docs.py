"""What the README and the generated pages say is true: they run, and they are the JSON's own numbers."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codeword import zoo
from codeword.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_pages_of_results_and_readme_table_are_what_the_benchmarks_left():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_results.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_page_leaves_out_what_was_not_measured_and_says_where_ours_is_slower(tmp_path, monkeypatch):
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import generate_clustering

    assert "\n## " not in generate_clustering.page(tmp_path)
    rows = [
        {"n": 1000, "k": k, "milliseconds": {"ours": [2, 1, 9], "peer": [took]}, "sse over ours": {"peer": 1.25}}
        for k, took in ((4, 1), (8, 5), (16, 10))
    ]
    record = {"machine": {"cores": 2}, "speed": [*rows, {**rows[0], "k": 64, "milliseconds": {"ours": [1]}}]}
    (tmp_path / "scalar.json").write_text(json.dumps(record))
    page = generate_clustering.page(tmp_path)
    assert "Machine: 2 cores." in page
    assert "| 1,000, k = 64 | 1.00 ms |  |" in page
    assert "peer takes 0.50x to 5.0x the time of ours, median 2.5x" in page
    assert "ours is slower in 1 of 3 cells: 1,000, k = 4 (0.50x)." in page
    assert "at most 25.0 % above ours, and below it in none." in page


def test_ten_lines_of_python_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {})
    assert (tmp_path / "model.cw").stat().st_size <= 1_724_320 / 30
    assert "(500, 800)" in capsys.readouterr().out


def test_ten_lines_of_shell_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(zoo.lenet5_path(), "model.safetensors")
    lines = [shlex.split(line, comments=True) for line in block("sh").splitlines()]
    assert len(lines) == 10
    for words in lines:
        if words[0] == "pip":
            continue
        assert words[0] == "codeword"
        words = [{"mnist:test": "digits"}.get(word, word) for word in words[1:]]  # of MNIST a part is shipped
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    assert Path("demo/report.png").is_file()


def test_make_demo_calls_what_there_is(tmp_path, monkeypatch):
    """The newcomer's first command: `make demo` once named an option that the demo does not have."""
    (command,) = re.findall(r"^\t\$\(BIN\)/codeword (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    assert Path("demo/model.cw").is_file()


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
