"""The native core is built where there is a compiler and done without where there is none."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from codeword.errors import MissingDependencyError, PlanError
from codeword.kernels import native
from codeword.kernels.bits import pack_bits
from codeword.kernels.native.build import ABI, compilers

SOURCES = Path(native.__file__).parent
needs_compiler = pytest.mark.skipif(not compilers(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def choose_again(monkeypatch):
    """Each test chooses its kernels anew, and leaves no choice behind."""
    monkeypatch.delenv("CODEWORD_KERNELS", raising=False)
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


def without_library(monkeypatch, path):
    monkeypatch.setattr(native, "LIBRARY", path)


# -- the choice ---------------------------------------------------------------------------------------------------


def test_without_a_library_numpy_does_the_work_and_says_so_once(monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path / "none.so")
    with pytest.warns(RuntimeWarning, match=r"slower.*python -m codeword.kernels.native"):
        assert pack_bits(np.array([1, 2, 3], np.uint8), 2) == bytes([0b111001])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pack_bits(np.array([1, 2, 3], np.uint8), 2) == bytes([0b111001])


def test_numpy_when_asked_for_is_silent(monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path / "none.so")
    monkeypatch.setenv("CODEWORD_KERNELS", "numpy")
    assert native.library() is None


def test_native_when_asked_for_must_be_there(monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path / "none.so")
    monkeypatch.setenv("CODEWORD_KERNELS", "native")
    with pytest.raises(MissingDependencyError, match=re.escape(str(tmp_path / "none.so"))):
        native.library()


@pytest.mark.skipif(native.load() is None, reason="no native core: python -m codeword.kernels.native")
def test_native_is_the_default_where_it_is(monkeypatch):
    assert native.library() is not None
    monkeypatch.setenv("CODEWORD_KERNELS", "numpy")
    native.library.cache_clear()
    assert native.library() is None


def test_a_choice_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("CODEWORD_KERNELS", "cuda")
    with pytest.raises(PlanError, match=r"native or numpy.*'cuda'"):
        native.library()


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5"])
def test_threads_are_a_whole_number_above_0(threads, monkeypatch):
    monkeypatch.setenv("CODEWORD_THREADS", threads)
    with pytest.raises(PlanError, match=re.escape(repr(threads))):
        native.threads()


def test_threads_are_all_cores_unless_limited(monkeypatch):
    monkeypatch.delenv("CODEWORD_THREADS", raising=False)
    assert 1 <= native.threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("CODEWORD_THREADS", "1")
    assert native.threads() == 1


# -- the build ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources, to build elsewhere than where other tests have the library open."""
    return Path(shutil.copytree(SOURCES, tmp_path / "native", ignore=shutil.ignore_patterns("_core*", "__pycache__")))


def build_there(sources, **env):
    """What `build.py` in a folder says, run as the build hook runs it: without the package around it."""
    code = "import importlib.util as u, sys; s = u.spec_from_file_location('b', sys.argv[1]); m = u.module_from_spec(s)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{code}; s.loader.exec_module(m); print(m.build() or m.LIBRARY)", "build.py"],
        cwd=sources,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_compiler
def test_a_build_makes_a_library_that_loads(sources):
    library = Path(build_there(sources))
    assert native.load(sources / library.name) is not None
    assert [path.name for path in sources.iterdir() if "-_core" in path.name] == []


def test_without_a_compiler_there_is_no_library_and_a_reason(sources):
    stale = sources / native.LIBRARY.name
    stale.write_bytes(b"of an older version")
    assert "no-such-compiler" in build_there(sources, CXX="no-such-compiler --fast")
    assert not stale.exists()


@needs_compiler
def test_sources_that_do_not_compile_are_reported(sources):
    (sources / "bits.cpp").write_text("this is not C++")
    assert "error" in build_there(sources)
    assert not (sources / native.LIBRARY.name).exists()


def test_a_file_that_is_no_library_is_ignored(tmp_path):
    assert native.load(tmp_path / "none.so") is None
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"\x7fELF, but of nobody")
    assert native.load(foreign) is None


@needs_compiler
def test_a_library_of_another_version_is_ignored(sources):
    abi = sources / "abi.cpp"
    abi.write_text(abi.read_text().replace(f"return {ABI};", f"return {ABI + 1};"))
    for path in sources.glob("*.cpp"):
        if path != abi:
            path.unlink()
    library = sources / Path(build_there(sources)).name
    assert library.exists()
    assert native.load(library) is None
    abi.write_text('extern "C" int unrelated() { return 0; }')
    build_there(sources)
    assert native.load(library) is None


def test_the_sources_say_the_version_that_the_loader_wants():
    assert f"cw_abi() {{ return {ABI}; }}" in (SOURCES / "abi.cpp").read_text()
