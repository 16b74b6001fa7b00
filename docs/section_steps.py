"""Section of docs/training_results.md on what a training step costs, of benchmarks/training_step.json."""

from __future__ import annotations

from wording import head, listed, times

from main_job import table


def steps(record: dict) -> list[str]:
    if not record["rows"]:
        return ["## What a training step costs", "Not measured yet."]
    parts = head("What a training step costs", "python benchmarks/training_step.py", "training_step", record)
    kinds = record["targets over dense"]
    busy = (record["load average before"] or [0])[0] > 1
    parts += [
        f"Forward, backward, optimizer and the stage's own step over the plain dense step, batch {record['batch']}, "
        f"one thread, torch {record['torch']}: ratio of medians over {record['rounds']} rounds in which all kinds take "
        "turns; plain masks are final."
        f"{' Other work ran beside: ratios are uncertain by a tenth and more.' * busy}",
        table(
            ["net", "dense step", *(f"{kind} (target {most:g}x)" for kind, most in kinds.items())],
            [
                [
                    f"{row['net']}, {row['precision']}",
                    f"{row['milliseconds']['dense']:.0f} ms",
                    *(f"{row['over dense'][kind]:.2f}x" for kind in kinds),
                ]
                for row in record["rows"]
            ],
        ),
    ]
    over = [
        f"{kind}, {row['net']} in {row['precision']}: {times(row['over dense'][kind])} for {most:g}x"
        for row in record["rows"]
        for kind, most in kinds.items()
        if row["over dense"][kind] > most
    ]
    cells = len(record["rows"]) * len(kinds)
    said = f"in {len(over)} of {cells} cells: {listed(over)}" if over else f"in none of {cells} cells"
    return [*parts, f"Above its target {said}."]
