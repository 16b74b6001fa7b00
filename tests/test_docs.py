"""What the README and the generated pages say is true: they run, and they are the JSON's own numbers."""

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


def test_results_page_and_readme_table_are_what_the_benchmarks_left():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_results.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


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
        # The test set of MNIST is not shipped, and this net's classifier has another name than the example's.
        words = [{"mnist:test": "digits", "head.*": "fc2.*"}.get(word, word) for word in words[1:]]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    assert Path("demo/report.png").is_file()


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
