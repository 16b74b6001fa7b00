"""The command line: each verb reads its arguments, calls `codeword.api`, and prints. docs/cli.md is made from it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from codeword import __version__, console
from codeword.cli.making import compress
from codeword.cli.planning import plan
from codeword.cli.reading import decompress, evaluate, inspect, verify
from codeword.cli.showing import demo
from codeword.cli.sweeping import sweep

EXIT_CODES = {
    0: "all went well",
    1: "verify found a difference",
    2: "wrong command line",
    3: "a checkpoint is missing, unreadable, unsafe, or holds NaN or infinity",
    4: "a .cw file is missing, truncated, corrupted, or from a newer version",
    5: "a plan, method option or glob is wrong",
    6: "a target cannot be read, or the written file misses it",
    7: "evaluation data is missing or malformed",
    8: "the output could not be written; what was there before is untouched",
    9: "a model and a file do not fit each other",
    10: "an optional package is needed; the message names the extra",
    11: "a worker process ended before its work did, for want of memory most often",
    12: "training came to a loss that is no number; the state after the last good epoch was kept",
    130: "interrupted (Ctrl-C)",
}


class _Verbs(TyperGroup):
    """The group of verbs, which also tells a wrong command line as JSON when JSON was asked for."""

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # noqa: ANN401
        words = sys.argv[1:] if args is None else list(args)
        if "--json" not in words or not standalone_mode:
            return super().main(args, *rest, standalone_mode=standalone_mode, **extra)
        try:
            code = super().main(args, *rest, standalone_mode=False, **extra)
        except Exception as error:
            explain = getattr(error, "format_message", None)  # what Click's errors have, whoever ships Click
            if explain is None:
                raise
            console.print_json({"error": explain(), "type": "UsageError", "exit_code": 2})
            code = 2
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes:\n\n" + "\n\n".join(f"- {code} {meaning}" for code, meaning in EXIT_CODES.items()),
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"codeword {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make trained networks small by weight sharing: one dial in, one small verified file out, and back."""


app.command()(compress)
app.command()(plan)
app.command()(inspect)
app.command()(verify)
app.command()(decompress)
app.command("eval")(evaluate)
app.command()(sweep)
app.command()(demo)


def main() -> None:
    """The entry point of `codeword`."""
    app(prog_name="codeword")


if __name__ == "__main__":
    main()
