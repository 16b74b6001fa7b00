"""What the command line prints and how: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from codeword.atomic import replacing
from codeword.errors import CodewordError, WriteError

_WIDE = 10_000  # columns of a pipe: a name that is cut is no name


def stdout() -> Console:
    """The console of results: colours and folding on a terminal only."""
    return _console(stderr=False)


def stderr() -> Console:
    """The console of progress and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # Made anew each time: whatever sys.stdout is now is what counts. Names of tensors and files are no markup.
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def say(message: str) -> None:
    """A sentence on stdout."""
    stdout().print(message)


def warn(message: str) -> None:
    """A sentence on stderr: something went otherwise than was asked."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), message))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, footer: Sequence[Sequence[str]] = (), left: int = 1
) -> None:
    """A table on stdout; columns after the first `left` are numbers."""
    grid = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        number = index >= left
        # Folded, never cut: a narrow terminal must still tell two tensors apart.
        grid.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        grid.add_row(*row)
    if footer:
        grid.add_section()
    for row in footer:
        grid.add_row(*row, style="bold")
    stdout().print(grid)


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Lines of a name and what there is to say of it, on stdout."""
    out, width = stdout(), max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        # Not a grid, which would fill every line with blanks up to the longest.
        out.print(Text.assemble((name.ljust(width), "bold"), text), soft_wrap=True)


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn a CodewordError into its message and exit code, Ctrl-C into 130. A bug keeps its traceback."""
    try:
        yield
    except CodewordError as error:
        fail(str(error), type(error).__name__, error.exit_code, as_json)
    except KeyboardInterrupt as error:
        # What was being written is removed, what was there before stays (codeword.atomic).
        fail(str(error) or "interrupted", "KeyboardInterrupt", 130, as_json)


def fail(message: str, kind: str, code: int, as_json: bool) -> None:
    """Say what went wrong, on stdout if as JSON, and exit. Raises typer.Exit."""
    if as_json:
        print_json({"error": message, "type": kind, "exit_code": code})
    else:
        stderr().print(Text.assemble(("error: ", "bold red"), message))
    raise typer.Exit(code)


class Watch(Protocol):
    """Told how far the work is."""

    def __call__(self, done: int, total: int, name: str) -> None:
        """`done` of `total` values, the tensor `name` at work."""
        ...

    def phase(self, text: str) -> None:
        """What is being done from now on; of unknown length until the next call."""
        ...

    def line(self, text: str) -> None:
        """A line that stays."""
        ...


class _Silent:
    def __call__(self, done: int, total: int, name: str) -> None:
        del done, total, name

    def phase(self, text: str) -> None:
        del text

    def line(self, text: str) -> None:
        stderr().print(text)


class _Bar:
    """The work is a few passes over all weights: to find the plan, then one for each file that is tried."""

    def __init__(self, progress: Progress, passes: Sequence[str]) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, tensor="")
        self._passes = list(passes)
        self._made = 0
        self._last: int | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        if self._last is None or done < self._last:
            self._next_pass(total)
        self._last = done
        self._progress.update(self._task, completed=done, tensor=name)

    def phase(self, text: str) -> None:
        self._last, self._passes, self._made = None, [text], 0
        self._progress.reset(self._task, total=None, description=text, tensor="")

    def line(self, text: str) -> None:
        self._progress.console.print(text)

    def _next_pass(self, total: int) -> None:
        text = self._passes[min(self._made, len(self._passes) - 1)]
        again = self._made - len(self._passes) + 2
        self._made += 1
        self._progress.reset(
            self._task, total=max(total, 1), description=text if again < 2 else f"{text}, file {again}", tensor=""
        )


@contextmanager
def progress(passes: Sequence[str]) -> Iterator[Watch]:
    """A bar with the time left on stderr, gone when the block ends; nothing if stderr is no terminal.

    passes: what each pass over the weights does; the last goes for all that follow.
    """
    console = stderr()
    if not console.is_terminal:
        yield _Silent()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("time left", style="dim"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, passes)


def working(text: str) -> Any:  # noqa: ANN401 - rich's Status or nothing
    """A spinner on stderr while the block runs; nothing if stderr is no terminal."""
    console = stderr()
    return console.status(text) if console.is_terminal else nullcontext()


class _Rehearsed(Exception):  # noqa: N818 - not an error: how `check_writable` leaves
    """Ends a rehearsal."""


def check_writable(path: Path | None, *inputs: Path | None) -> None:
    """Raises WriteError, before hours of work and not after, if `path` cannot be written or is one of the inputs."""
    if path is None:
        return
    for other in inputs:
        if other is not None and path.exists() and other.exists() and path.samefile(other):
            raise WriteError(f"cannot write {path}: it is the input {other}; name another file (nothing was changed)")
    # The very steps of the real thing, but for the rename.
    try:
        with replacing(path):
            raise _Rehearsed
    except _Rehearsed:
        pass
