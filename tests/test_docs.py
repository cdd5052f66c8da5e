"""The README and the documentation say only what the program does."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from docs import commands
from docs.pictures.demo import PICTURE, drawn
from llmsparse import plugins
from llmsparse.cli import app
from llmsparse.demo import SOLVERS

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
    named = set(
        re.findall(r"`((?:llmsparse|eval|kernels|tests|benchmarks|docs)/[\w/.]*\w\.\w+)`", EVERYTHING)
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists() and "/x.py" not in name] == []


def test_no_document_has_a_gap_to_be_filled() -> None:
    assert re.findall(r"@[A-Z]+@|TODO|FIXME", EVERYTHING) == []


def test_the_page_of_commands_is_what_the_code_says() -> None:
    assert DOCS["commands.md"] == commands.page(), "run python -m docs.commands"
    for name, command in COMMANDS.items():
        section = DOCS["commands.md"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert options(name) == set(re.findall(r"^\| `(--[\w-]+)", section, re.M)) and command.help in section


def test_every_error_message_in_the_documents_is_in_the_sources() -> None:
    quoted = [text for _, text in re.findall(r"^\*\*(`+) ?(.+?) ?\1\*\*$", DOCS["troubleshooting.md"], re.M)]
    said = [re.compile(message, re.DOTALL) for message in messages()]
    assert len(quoted) == DOCS["troubleshooting.md"].count("\n**")
    assert [text for text in quoted if not any(message.fullmatch(text) for message in said)] == []


def messages() -> Iterator[str]:
    """Every text of the sources as a regular expression, in which a value may be anything."""
    for file in (f for folder in ("llmsparse", "eval", "kernels") for f in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if all(isinstance(text, str | None) for text in texts) and sum(len(t or "") for t in texts) >= 15:
                yield "".join(".*" if text is None else re.escape(text) for text in texts)


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 150


def test_every_link_between_the_documents_leads_to_a_heading() -> None:
    pages = {"README.md": README, **{f"docs/{name}": text for name, text in DOCS.items()}}
    for page, text in pages.items():
        for name, anchor in re.findall(r"\]\(([\w/.]*\.md)?(?:#([\w-]+))?\)", text):
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.is_file(), f"{page} leads to {name}"
            assert not anchor or anchor in headings(target.read_text()), f"{page} leads to {name}#{anchor}"


def headings(text: str) -> set[str]:
    """The anchors of a page, as code hosts and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_the_picture_of_the_demo_shows_its_solvers() -> None:
    shown = re.findall(r">(\w+)(?:&#160;)*<", PICTURE.read_text())
    assert [word for word in shown if word in plugins.names("solvers")] == [*SOLVERS, *SOLVERS]


def test_the_picture_of_a_terminal_asks_nothing_of_another_host() -> None:
    picture = drawn("perplexity before and after")
    assert "before" in picture and "demo" in picture
    assert set(re.findall(r"https?://[^\s\"'<)]+", picture)) <= {
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    }
