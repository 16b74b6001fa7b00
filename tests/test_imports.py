"""Who may import whom (design.md, section 4), and that reading a file needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import codeword

PACKAGE = Path(codeword.__file__).parent
# A module imports from its own line or from those above it, wherever in its text the import stands.
LAYERS = [
    "errors",
    "atomic",
    "expr",
    "math kernels coding",
    "methods artifact cluster",
    "plan target finetune sources safetensors_file calibrate sensitivity refine steer allocate curves cache candidates "
    "execute drop fold job nn data evaluate zoo",
    "train runtime export peers front report",
    "api demo nets sweep forecast",
    "cli console show __main__",
]
LAYER_OF = {name: at for at, layer in enumerate(LAYERS) for name in layer.split()}
TORCH_FREE = ["codeword.expr", "codeword.coding", "codeword.artifact", "codeword.methods"]


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def top(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """(line, top-level module of codeword) of each import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module, names, 0):
                found = [f"{module}.{alias.name}" for alias in names]
            case ast.ImportFrom():
                found = ["codeword.<relative>"]  # no layer of that name: the test below says so
            case _:
                continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "codeword" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def broken(path):
    for line, name in imported(path):
        where = f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        if name not in LAYER_OF:
            yield f"{where}, which has no layer"
        elif LAYER_OF[name] > LAYER_OF[top(path)]:
            yield f"{where}, which is above it"


def test_every_module_has_a_layer():
    assert sorted({top(path) for path in modules()} - set(LAYER_OF)) == []  # new? put it into LAYERS


def test_modules_import_their_own_layer_or_lower_ones():
    assert [line for path in modules() if top(path) in LAYER_OF for line in broken(path)] == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("expr.py", "from codeword.coding import Codec", "above"),
        ("errors.py", "def f():\n    import codeword.expr", "above"),
        ("atomic.py", "from codeword import expr", "above"),
        ("methods.py", "from codeword.nowhere import x", "no layer"),
        ("methods.py", "from .expr import Raw", "no layer"),
    ],
)
def test_the_rule_finds_what_it_forbids(name, text, says, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / name).write_text(text)
    assert [says in line for line in broken(tmp_path / name)] == [True]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_golden_file_is_read_where_torch_cannot_be_imported(module):
    code = f"""
import sys
class NoTorch:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "torch":
            raise ImportError("there is no torch here")
sys.meta_path.insert(0, NoTorch())
import {module}
from codeword.artifact import Artifact
with Artifact.open(sys.argv[1]) as artifact:
    print(len(artifact), artifact.decode("scatter").tolist()[0])
try:
    import torch
except ImportError:
    print("no torch")
"""
    golden = Path(__file__).parent / "golden" / "nodes.cw"
    done = subprocess.run([sys.executable, "-c", code, golden], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith("11 [0.0, 0.1000000")
    assert second == "no torch"
