"""Writes docs/cli.md from the command line itself: `python docs/generate_cli.py` (`--check` only compares).

The page is made from the Typer app and its exit codes, and a test keeps it up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from codeword.cli import EXIT_CODES, app

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

<!-- Made by docs/generate_cli.py from the program itself. Edit that or src/codeword/cli/, not this page. -->

Results go to stdout, progress and errors to stderr; progress is shown on a terminal only, but for a line after each
epoch of training. With `--json` every verb
prints one JSON object on stdout and nothing else, an error as `{"error": ..., "type": ..., "exit_code": ...}`. Output
files are written whole or not at all: after an error what was there before is untouched.
"""


def page() -> str:
    """The text of docs/cli.md."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD, "## Exit codes\n\n| code | meaning |\n|---:|---|"]
    parts[-1] += "".join(f"\n| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()) + "\n"
    parts.append("## Verbs\n\n" + "\n".join(f"- [`{name}`](#{name}): {_summary(verb)}" for name, verb in _verbs(group)))
    parts[-1] += "\n\n`codeword --version` prints the version, `codeword VERB --help` what follows here.\n"
    parts += [_section(name, verb) for name, verb in _verbs(group)]
    return "\n".join(parts)


def _verbs(group: Any) -> list[tuple[str, Any]]:
    return list(group.commands.items())


def _summary(verb: Any) -> str:
    return " ".join((verb.help or "").split("\n\n")[0].split())


def _section(name: str, verb: Any) -> str:
    paragraphs = [" ".join(part.split()) for part in (verb.help or "").split("\n\n")]
    arguments = [param for param in verb.params if param.param_type_name == "argument"]
    options = [param for param in verb.params if param.param_type_name == "option"]
    required = [f"{param.opts[-1]} {param.metavar}" for param in options if param.required]
    usage = " ".join(["codeword", name, *(str(param.metavar or param.name) for param in arguments), *required])
    lines = [f"## {name}\n", "\n\n".join(paragraphs), f"\n```\n{usage} [OPTIONS]\n```\n"]
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    lines += [f"| `{_cell(param.metavar or param.name)}` | required | {_cell(param.help)} |" for param in arguments]
    lines += [f"| {_names(param)} | {_default(param)} | {_cell(param.help)} |" for param in options]
    return "\n".join(lines) + "\n"


def _names(option: Any) -> str:
    # Short form last, as in the help of the program: `--out`, `-o`.
    names = sorted(option.opts, key=len, reverse=True)
    metavar = "" if option.is_flag else f" {_cell(option.metavar or option.name.upper())}"
    return ", ".join(f"`{name}`" for name in [*names[1:][::-1], names[0] + metavar, *option.secondary_opts])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.secondary_opts:
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    if option.is_flag or option.default in (None, [], ()):
        return "may be repeated" if option.multiple else ""
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def main() -> int:
    """Write the page, or with --check tell whether it is up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
