"""How reports say numbers: the same words on the command line, on the page and in the picture."""

from __future__ import annotations

from collections.abc import Mapping

from codeword.report.measure import TensorReport

_UNITS = ("KB", "MB", "GB", "TB")  # of 1,000, as in `--target 120KB`


def human_bytes(count: int) -> str:
    """Bytes in three significant digits: "812 bytes", "56.9 KB", "1.72 MB"."""
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in _UNITS:
        value /= 1000
        # 999.5 and more would round to "1000": the next unit says it shorter.
        if value < 999.5 or unit == _UNITS[-1]:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("the last unit takes all")  # pragma: no cover


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as "50 x 20 x 5 x 5"; a single value is "scalar"."""
    return " x ".join(map(str, shape)) or "scalar"


def method_text(tensor: TensorReport) -> str:
    """The method; raw values that are not the original's bits were rounded to fewer bits of mantissa."""
    return "raw, rounded" if tensor.method == "raw" and tensor.exact is False else tensor.method


def error_text(tensor: TensorReport) -> str:
    """The SQNR in dB, "exact" for a copy of every bit, nothing without an original to compare with."""
    if tensor.exact:
        return "exact"
    return "" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}"


def by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """reason -> names of the tensors kept for it, in the file's order."""
    groups: dict[str, list[str]] = {}
    for name, reason in kept.items():
        groups.setdefault(reason, []).append(name)
    return groups
