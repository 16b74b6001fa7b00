"""The dial: how small the file shall be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from codeword.errors import TargetError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MOST = 1e18  # of anything: more than any file has bytes, and not so much that products become infinite
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio ("30x"), a size ("120KB": 1,000 bytes a KB, 1,024 a KiB) or bits per weight ("2.5bpw")."""

    text: str
    kind: Literal["ratio", "bytes", "bpw"]
    value: float

    @classmethod
    def parse(cls, text: str | float) -> Target:
        """Read a target; a bare number is bytes. Raises TargetError with the forms there are."""
        match = _PATTERN.fullmatch(str(text))
        value = float(match[1]) if match else 0.0
        unit = match[2].lower() if match else ""
        if match and 0 < value <= _MOST:
            if unit == "x":
                return cls(str(text), "ratio", value)
            if unit == "bpw":
                return cls(str(text), "bpw", value)
            if unit in _UNITS and value * _UNITS[unit] >= 1:
                return cls(str(text), "bytes", value * _UNITS[unit])
        raise TargetError(
            f'target {text!r} cannot be read; give a ratio "30x", a size "120KB" or "1.5MiB", or "2.5bpw"'
        )

    def nbytes(self, dense_nbytes: int, size: int) -> int:
        """Bytes, 1 at least, that meet the target for a net of `size` values that takes dense_nbytes uncompressed."""
        if self.kind == "ratio":
            return max(1, int(dense_nbytes / self.value))
        if self.kind == "bpw":
            return max(1, int(self.value * size / 8))
        return int(self.value)
