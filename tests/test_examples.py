"""The examples run as they stand, and on what ships with the package."""

import re
import subprocess
import sys
from pathlib import Path

import codeword

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_plain_loop(tmp_path):
    command = [sys.executable, EXAMPLES / "plain_loop.py", "--out", tmp_path / "net.cw", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (re.search(r"([\d.]+)x +top-1 ([\d.]+) %", line).groups() for line in done.stdout.splitlines())
    assert float(second[0]) > 30
    assert float(second[1]) > 95
    assert float(second[0]) >= 0.98 * float(first[0])
    assert codeword.verify(tmp_path / "net.cw") == []


def test_a_loop_gains_three_lines_a_stage():
    added = [line.rstrip() for line in (EXAMPLES / "plain_loop.py").read_text().splitlines() if line.endswith("# +")]
    stages = 2
    assert sum("stage.step()" in line for line in added) == 1  # both stages share the loop
    assert len(added) - 1 == 3 * stages
