"""Writes docs/commands.md, every command with its arguments and options, from the command line itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from llmsparse.cli import app

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Commands and options

`python -m docs.commands` writes this page from the code, and `make docs` runs it; do not edit it. `--help` after a command
shows the same, `llmsparse --version` the version. The options of `prune`, `quantize` and `plan` can be kept in a file, see
[recipes](index.md#recipes).
"""


def page() -> str:
    """The page as Markdown."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([HEAD, *(section(name, command) for name, command in commands.items())])


def section(name: str, command: Any) -> str:
    """A command: its line of help, how it is called, its arguments and its options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    call = " ".join(["llmsparse", name, *map(_placed, arguments), "[OPTIONS]"])
    return "\n".join([f"## {name}\n", f"{command.help}\n", f"`{call}`\n", *_table(arguments, options)])


def _placed(argument: Any) -> str:
    word = f"{argument.metavar}..." if argument.nargs != 1 else str(argument.metavar)
    return word if argument.required else f"[{word}]"


def _table(arguments: list[Any], options: list[Any]) -> Iterator[str]:
    if arguments:
        yield "| argument | what it is |\n|---|---|"
        yield from (f"| `{_placed(each)}` | {_cell(each.help)} |" for each in arguments)
        yield ""
    yield "| option | default | what it does |\n|---|---|---|"
    yield from (f"| {_names(each)} | {_default(each)} | {_cell(each.help)} |" for each in options)
    yield ""


def _names(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    return ", ".join(f"`{name}{value}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    """Nothing for a switch that is off, and for what its help says."""
    values = option.default if isinstance(option.default, list | tuple) else [option.default]
    return ", ".join(f"`{value}`" for value in values if type(value) in (str, int, float) and value != "")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
