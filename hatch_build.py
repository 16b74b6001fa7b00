"""Build hook: compiles the native core into the package. Without a compiler the package is pure Python, and slower."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUILD = Path("src/codeword/kernels/native/build.py")


class NativeCore(BuildHookInterface):
    """Runs for wheels, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, then tell hatchling that the wheel is of this machine."""
        del version
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / _BUILD)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(_BUILD)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        if why := native.build():
            self.app.display_warning(f"codeword is built without its native core: {why}")
            return
        build_data["artifacts"].append(f"/{_BUILD.parent.as_posix()}/{native.LIBRARY.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
