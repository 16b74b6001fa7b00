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


def test_commands_before_and_beyond_a_size_run(tmp_path, monkeypatch):
    """As a reader would type them, on few of the digits that ship with the package."""
    section = README.split("## Before and beyond a size")[1].split("\n## ")[0]
    lines = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    short = {"compress": ["--limit", "100"], "sweep": ["--limit", "100", "--targets", "20x", "--peers", "none"]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEWORD_CACHE", "")
    shutil.copy(zoo.lenet5_path(), "model.safetensors")
    assert [shlex.split(line)[1] for line in lines] == ["plan", "compress", "sweep"]
    for line in lines:
        words = [re.sub("mnist:.*", "digits", word) for word in shlex.split(line, comments=True)[1:]]
        result = CliRunner().invoke(app, [*words, *short.get(words[0], [])])
        assert result.exit_code == 0, (words, result.output)
    assert all(Path(file).is_file() for file in ("plan.toml", "model.cw", "front/front.json", "front/front.png"))


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]))
def test_links_to_sections_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ (.*)$", (page.parent / file if file else page).read_text(encoding="utf-8"), re.M)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in anchors, f"{page.name} links to {file}#{anchor}"


def test_planner_sections_say_where_ours_falls_short_and_leave_out_what_was_not_measured(tmp_path, monkeypatch):
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import generate_results

    assert generate_results.sections(tmp_path) == []
    measured = {"most": 0.5, "drop": 0.4, "low": None, "high": None, "trials": [{"check": False}, {"check": True}]}
    found = {"net": "small", "bytes": 1000, "ratio": 8.0, "drop": 0.75, "seconds": 3.2, "measured": measured}
    (tmp_path / "max_drop.json").write_text(json.dumps({"rows": [found]}))
    run = {"planning_seconds": 2, "cpu_seconds": 0.25, "nbytes": 1000, "error": 0.1, "peak_nbytes": 5_000_000}
    ratios = [
        {"nbytes": 0.99, "error": 1.0, "cpu_seconds": 1.3, "peak_nbytes": 1.06} | it for it in ({}, {"nbytes": 1.02})
    ]
    rows = [
        {"net": "small", "target": "8x", "data": None, "predicted": run, "measured": run, "predicted_over_measured": it}
        for it in ratios
    ]
    (tmp_path / "prediction.json").write_text(json.dumps(rows))
    images = {"photographs": {"n": 20, "classes": 7, "mean top probability": 0.5}}
    row = {
        "target": "8x",
        "calibrated": True,
        "bytes": 900,
        "ratio": 8.1,
        "agreement": {"photographs": 95.5},
        "seconds": 9,
    }
    net = {"dense_nbytes": 7290, "calibration": "4 crops", "images": images, "rows": [row]}
    (tmp_path / "efficientnet.json").write_text(json.dumps(net))
    families = {"product, rate-aware": {"factor": 0.5}, "free, rate-aware": None}
    tensors = [
        {"tensor": "a", "families": families, "seconds": {"product, rate-aware": 2.0, "product, alone": 50.0}},
        {"tensor": "b", "families": {"product, rate-aware": {"factor": 0.75}}, "seconds": {}},
    ]
    files = [
        {"net": "small", "data": "none", "ratio": 8, "candidates": kind, "nbytes": 9, "kl": kl}
        for kind, kl in {"fast": 0.2, "all": 0.1}.items()
    ]
    (tmp_path / "candidates.json").write_text(json.dumps({"tensors": {"small": tensors}, "files": [*files, files[0]]}))
    folder = tmp_path / "fronts" / "small"
    folder.mkdir(parents=True)
    points = [
        ("codeword", "8x", "cw", 800, 90.0),
        ("nf4", "blocks", "xz", 700, 90.5),
        ("uniform", "int4", "xz", 1000, 90.0),
    ]
    front = {
        "net": "small.safetensors",
        "digest": "",
        "data": "test",
        "n": 10,
        "calibration": None,
        "dense_nbytes": 6400,
        "dense_top1": 91.0,
        "rows": [
            dict(zip(("method", "settings", "packing", "nbytes", "top1"), point, strict=True))
            | {"agreement": 5 + point[-1], "seconds": 1.0}
            for point in points
        ],
    }
    (folder / "front.json").write_text(json.dumps(front))
    page = "\n\n".join(generate_results.sections(tmp_path))
    assert "A peer within our bytes is more accurate at 8x (-0.50). No next larger file of one is." in page
    assert "Beside rounding + xz ours take -20 %; -35 % was wanted, which fell short at 8x (-20 %)." in page
    assert "| small | 0.5 | 1,000 | 8.00x | +0.40 | +0.75 | 1 + 1 | 3 s |" in page
    assert "More than was asked for is lost on the test set by small (+0.75 for 0.5)." in page
    assert "| 8x | yes | 900 | 8.10x | 95.5 | 9 s |" in page
    assert "Bytes are -1.0 % to +2.0 % off" in page
    assert "| product, rate-aware | 0.50 (a) |" in page
    assert "took 2 s (small)" in page
    assert "| small 8x |  | 9 | 9 | 0.2 | 0.1 | 2.0 times nearer |" in page
