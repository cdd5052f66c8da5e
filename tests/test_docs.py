"""The README says only what the program does."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from llmsparse import plugins
from llmsparse.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {file.name: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = "\n".join([README, (ROOT / "CONTRIBUTING.md").read_text(), *DOCS.values()])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def console_lines() -> list[str]:
    """The llmsparse commands in the documents' console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", EVERYTHING, flags=re.DOTALL)
    return [
        line[line.index("llmsparse ") :]
        for block in blocks
        for line in block.splitlines()
        if re.match(r"(accelerate launch .* -m )?llmsparse ", line)
    ]


def options(command: str) -> set[str]:
    return {
        name for p in COMMANDS[command].params for name in (*p.opts, *p.secondary_opts) if name[:2] == "--"
    }


@pytest.mark.parametrize("line", console_lines())
def test_every_command_and_option_in_the_documents_exists(line: str) -> None:
    _, command, *arguments = shlex.split(line)
    assert command in COMMANDS
    assert {a for a in arguments if a.startswith("--")} <= options(command)


def test_every_command_is_in_the_readme_and_every_command_there_exists() -> None:
    named = re.findall(r"^\| `llmsparse ([\w-]+)", README, flags=re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)


def test_the_solver_table_lists_exactly_the_solvers() -> None:
    section = README.split("### Solvers")[1].split("###")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == plugins.names("solvers")


def test_the_table_of_runtimes_lists_exactly_the_exporters() -> None:
    section = README.split("### Other runtimes")[1].split("###")[0]
    assert sorted(re.findall(r"^\| `(\w[\w-]*)` \|", section, flags=re.MULTILINE)) == plugins.names(
        "exporters"
    )


def test_every_make_target_in_the_documents_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", EVERYTHING, re.M)
    assert {a or b for a, b in named} <= set(targets)


def test_every_file_that_the_documents_name_exists() -> None:
    named = set(re.findall(r"`((?:llmsparse|eval|kernels|tests|benchmarks)/[\w/.]*\w\.\w+)`", EVERYTHING))
    assert [name for name in sorted(named) if not (ROOT / name).exists() and "/x.py" not in name] == []


def test_no_document_has_a_gap_to_be_filled() -> None:
    assert re.findall(r"@[A-Z]+@|TODO|FIXME", EVERYTHING) == []
