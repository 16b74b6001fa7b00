"""Compiles the native core with the machine's C++ compiler: `python -m codeword.kernels.native`.

The build hook of the package runs this file by itself, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ABI = 6  # that of the sources; cw_abi() in abi.cpp says what a library was made from
LIBRARY = Path(__file__).with_name("_core" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so"))
# No -march: vector paths are picked at run time. No contraction to fused multiply-adds: results are equal everywhere.
_FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
)


def compilers() -> list[list[str]]:
    """Commands worth trying, $CXX before all; with $CXX set, that alone."""
    if chosen := os.environ.get("CXX"):
        return [shlex.split(chosen)]
    return [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]


def build(target: Path = LIBRARY) -> str | None:
    """Compile the core to `target`, which is replaced in one step. Returns None, or why there is no core now."""
    sources = sorted(str(path) for path in Path(__file__).parent.glob("*.cpp"))
    fresh = target.with_name(f".{os.getpid()}-{target.name}")
    why = "no C++ compiler found ($CXX, c++, g++, clang++)"
    try:
        for compiler in compilers():
            try:
                done = subprocess.run(
                    [*compiler, *_FLAGS.split(), "-o", str(fresh), *sources],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                )
            except OSError as error:
                why = f"{compiler[0]}: {error}"
                continue
            if done.returncode:
                why = f"{compiler[0]} failed:\n{done.stderr[-4000:]}"
                continue
            try:
                ctypes.CDLL(str(fresh))  # a cross compiler's library is of no use here
            except OSError as error:
                why = f"{compiler[0]}: {error}"
                continue
            fresh.replace(target)
            return None
    finally:
        fresh.unlink(missing_ok=True)
    target.unlink(missing_ok=True)  # one of older sources would be worse than none
    return why
