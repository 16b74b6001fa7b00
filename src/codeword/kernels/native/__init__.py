"""The native core: C++ behind a plain C ABI, compiled when the package is built and called through ctypes.

Whoever calls a kernel calls the public function in `codeword.kernels`; that asks `library()` whether there is a core.
`CODEWORD_KERNELS` chooses: "native" (an error if there is none), "numpy", or unset: native if there. `CODEWORD_THREADS`
limits the threads of one call; the result does not depend on it. Arrays are checked before their pointers go down.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import numpy as np

from codeword.errors import MissingDependencyError, PlanError
from codeword.kernels.native.build import ABI, LIBRARY

Argument = np.ndarray | int | None
_NO_MEMORY = -1
_NONE = "{path} is not there, or from another version or machine; build it with: python -m codeword.kernels.native"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native core, or None where NumPy does the work: then said once, unless it was asked for."""
    choice = os.environ.get("CODEWORD_KERNELS", "")
    if choice not in ("", "native", "numpy"):
        raise PlanError(f"CODEWORD_KERNELS must be native or numpy, or not set; got {choice!r}")
    if choice == "numpy":
        return None
    found = load(LIBRARY)
    if found is None and choice == "native":
        raise MissingDependencyError(f"CODEWORD_KERNELS=native: {_NONE.format(path=LIBRARY)}")
    if found is None:
        warnings.warn(
            "codeword works without its native core, 5 to 100 times slower: "
            + _NONE.format(path=LIBRARY)
            + " (needs a C++ compiler); CODEWORD_KERNELS=numpy hides this",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def call(name: str, *arguments: Argument) -> int:
    """Result of function `name` of the core; arrays in C order go down as pointers, None as a null pointer."""
    core = library()
    if core is None:
        raise MissingDependencyError(_NONE.format(path=LIBRARY))
    function = getattr(core, name)
    function.restype = ctypes.c_int64
    result = function(*(_down(argument) for argument in arguments))
    if result == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for its tables")
    return result


def threads() -> int:
    """Threads one call may use: CODEWORD_THREADS, else the cores this process may run on."""
    asked = os.environ.get("CODEWORD_THREADS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (asked.isascii() and asked.isdigit() and int(asked) > 0):
        raise PlanError(f"CODEWORD_THREADS must be a whole number above 0, got {asked!r}")
    return min(int(asked), 256)


def load(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The library at path, or None if it is not there, not for this machine, or from other sources."""
    try:
        core = ctypes.CDLL(os.fspath(path))
        core.cw_abi.restype = ctypes.c_int64
        return core if core.cw_abi() == ABI else None
    except (OSError, AttributeError):
        return None


def _down(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, np.ndarray):
        if not (argument.flags.c_contiguous and argument.flags.aligned and argument.dtype.isnative):
            raise ValueError(f"a native kernel needs an aligned array in C order, got {argument.flags}")
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)
