"""What a page says of numbers: the machine, ratios as text, and where ours loses, all read off the record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

SHOWN = 5  # labels in a sentence, the worst first; tables and JSON have all


def head(title: str, command: str, name: str, record: Mapping | None = None) -> list[str]:
    """A section's title, the command that made its numbers, where they lie, and on what machine."""
    ran = f" {machine(record)}" if record is not None else ""
    return [f"## {title}", f"`{command}` (raw: `benchmarks/{name}.json`).{ran}"]


def machine(record: Mapping) -> str:
    """'Machine: 2 cores, load average 0.4.', of whichever of these a benchmark wrote down."""
    told = record.get("machine", {})
    facts = [told.split(";")[0]] if isinstance(told, str) else []
    if isinstance(told, Mapping):
        cores = told.get("cores", told.get("cpu_count"))
        facts += [f"{cores} cores"] if cores else []
        facts += [f"{name} {told[name]}" for name in ("python", "numpy", "torch") if name in told]
        facts += [f"load average {told['load']:.1f}"] if "load" in told else []
    facts += [f"{record['threads']} threads"] if "threads" in record else []
    loads = [(load[0], when) for when in ("before", "after") if (load := record.get(f"load average {when}"))]
    facts += [f"load average {', '.join(f'{load:.1f} {when}' for load, when in loads)}"] if loads else []
    return f"Machine: {', '.join(facts)}." if facts else ""


def times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def percent(share: float) -> str:
    """To two figures, small ones too."""
    digits = next((digits for digits in range(1, 6) if abs(100 * share) >= 10.0 ** (1 - digits)), 6)
    return f"{100 * share:.{digits}f} %"


def spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    """'99.47 ± 0.03': the mean, and how far from it the farthest lies; a lone value stands alone."""
    if not values:
        return ""
    middle = statistics.mean(values)
    far = max(abs(value - middle) for value in values)
    return f"{middle:.{digits}f}{unit}" + (f" ± {far:.{digits}f}" if len(values) > 1 else "")


def points(value: float, sign: str = "+") -> str:
    """'+0.16', '+0.283': points of top-1 to the thousandth, of which the last is left out where it is 0."""
    text = f"{value:{sign}.3f}"
    return text.removesuffix("0")


def listed(labels: list[str], joint: str = "; ") -> str:
    more = f"{joint}and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return joint.join(labels[:SHOWN]) + more


def where(cells: Mapping[str, float], least: float = 1) -> str:
    """'in 2 of 12 cells: Gaussian, k = 256 (0.60x); ...': where a ratio is under the least, the worst first."""
    under = sorted((ratio, label) for label, ratio in cells.items() if ratio < least)
    if not under:
        return f"in none of {len(cells)} cells"
    return f"in {len(under)} of {len(cells)} cells: {listed([f'{label} ({times(ratio)})' for ratio, label in under])}"


def speed(peer: str, cells: Mapping[str, float], ours: str = "ours") -> str:
    """Cells: times of the peer over ours."""
    low, middle, high = min(cells.values()), statistics.median(cells.values()), max(cells.values())
    span = f"{times(low)} to {times(high)} the time of {ours}, median {times(middle)}"
    took = span if times(low) != times(high) else f"{times(low)} the time of {ours}"
    return f"{peer} takes {took}; {ours} is slower {where(cells)}."


def errors(peer: str, cells: Mapping[str, float]) -> str:
    """Cells: squared errors of the peer over ours."""
    lower = [1 - ratio for ratio in cells.values() if ratio < 1]
    most = max(cells.values())
    above = f"at most {percent(most - 1)} above ours" if most > 1 else "nowhere above ours"
    below = f"in {len(lower)} of {len(cells)} cells, by {percent(max(lower))} at most" if lower else "in none"
    return f"The squared error of {peer} is {above}, and below it {below}."
