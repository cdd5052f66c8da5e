"""Every command and every block of the README and of docs/ runs, in order, on tiny models in the place of real ones."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmsparse.cli import app
from tests import docs_fixtures, hub_server
from tests.docs_fixtures import make_what_is_named
from tests.pruned import ONE_THREAD

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    file.name: file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LANGUAGES = ("console", "python", "yaml", "json", "c")

# What is other here than in the documents: options of a command, set whether it has them or not...
SET = {
    "prune": {"--samples": "6", "--sequence-length": "32"},
    "recover": {"--tokens": "1k", "--sequence-length": "32"},
    "quantize": {"--samples": "6", "--sequence-length": "32"},
    "plan": {"--samples": "6", "--sequence-length": "32"},
    "eval": {"--context": "32", "--windows": "2"},
    "generate": {"--max-new-tokens": "4"},
    "bench": {"--calls": "2"},
}
# ... and texts, everywhere.
REPLACED = {
    r"--stride \d+": "--stride 16",
    r"--limit \d+": "--limit 4",
    r"\bsamples=\d+": "samples=6",
    r'\btokens="[\d.]+M"': 'tokens="1k"',
    r"\bsequence_length=\d+": "sequence_length=32",
    r"\bcontext=\d+": "context=32",
    r"\bOWNER/": f"{hub_server.OWNER}/",
    "20 504 3575 282": "20 50 35 28",  # ids of a vocabulary of 128
}
SHELL = ("mv", "cc", "./model", "accelerate")  # run as they are
NOT_RUN = {  # beginning of a command -> why
    "git clone": "the repository is here",
    "make ": "each target runs by itself; tests/test_docs.py knows that they exist",
    "pip install": "a test changes no environment",
    "python -m benchmarks.": "they measure real models, for minutes to hours",
    "python -m llmsparse.gguf_checkpoint": "needs a file of 250 MB; tests/test_gguf_checkpoint.py runs it",
    'python -c "from llmsparse.gguf_checkpoint': "writes into the user's cache; tests/test_real.py runs it",
}
ABSENT = r"needs? .*not installed|no native kernel runs here"  # of this machine, and no fault of a document
WRITES_OUT = ("prune", "recover", "quantize", "export")  # a document may write the same OUT in several ways


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def lines(block: str) -> Iterator[str]:
    """The commands of a console block, without comments."""
    for line in block.splitlines():
        command = re.sub(r"\s+#\s.*", "", line)
        if command.strip() and not command.startswith("#"):
            yield command


def why_not(line: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def test_every_block_and_command_runs_or_says_why_not() -> None:
    found = [block for text in DOCUMENTS.values() for block in blocks(text)]
    assert {language for language, _ in found} <= set(LANGUAGES)
    commands = [line for language, block in found if language == "console" for line in lines(block)]
    left = [line for line in commands if line.split()[0] not in ("llmsparse", *SHELL)]
    assert [line for line in left if why_not(line) is None] == []
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in left)] == []
    assert [name for name in docs_fixtures.MADE if not any(name in block for _, block in found)] == []


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Reader"]:
    """Someone who follows a document in an empty folder, with a hub and data of their own."""
    place, data = tmp_path / "here", tmp_path / "data"
    place.mkdir()
    docs_fixtures.text(data / "text" / "wikitext2" / "test.txt")
    docs_fixtures.tasks(data / "zeroshot")
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLMSPARSE_DATA", str(data))
    with hub_server.running() as (_, address):
        yield Reader(place, address, tmp_path / "hub")


class Reader:
    """Runs the blocks of one document, in order; ``left`` is what could not be run here, with the reason."""

    def __init__(self, place: Path, hub: str, home: Path) -> None:
        self.place = place
        self.left: list[str] = []
        self.python = ""  # a later block goes on from the earlier ones
        kept = {key: value for key, value in ONE_THREAD.items() if key != "HF_HUB_OFFLINE"}
        there = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writes", "HF_HOME": str(home)}
        self.environment = {
            **kept,
            **there,
            "PYTHONPATH": str(ROOT),
            "LLMSPARSE_DATA": os.environ["LLMSPARSE_DATA"],
        }

    def read(self, language: str, block: str) -> None:
        for found, instead in REPLACED.items():
            block = re.sub(found, instead, block)
        getattr(self, f"read_{language}")(block)

    def read_console(self, block: str) -> None:
        for line in lines(block):
            if why_not(line) is None:
                make_what_is_named(line, self.place)
                self.command(line)

    def read_python(self, block: str) -> None:
        if 'device_map="cuda"' in block and not torch.cuda.is_available():
            self.left.append("a block of Python needs a GPU")
            return
        make_what_is_named(block, self.place)
        self.python += block + "\n"
        self.process([sys.executable, "-c", self.python])

    def read_yaml(self, block: str) -> None:
        (self.place / "run.yaml").write_text(block)

    def read_json(self, block: str) -> None:
        json.loads(f"{{{block}}}")

    def read_c(self, block: str) -> None:
        if self.compiles():
            (self.place / "block.c").write_text(block)
            self.process(["cc", "-std=c99", "-fsyntax-only", "-IOUT", "block.c"])

    def command(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] in ("cc", "./model") and not self.compiles():
            return
        at = words.index("llmsparse") if "llmsparse" in words else None
        if at is None:
            self.process(words)
            return
        words[at:] = self.prepared(words[at:])
        if words[0] == "accelerate":
            self.process([sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]])
        elif (
            "push" in words or "--push" in words
        ):  # huggingface_hub reads where the hub is when it is imported
            self.process([sys.executable, "-m", *words])
        else:
            self.invoke(line, words[1:])

    def prepared(self, words: list[str]) -> list[str]:
        """With small options; what an earlier line wrote in the place of OUT is gone."""
        for option, value in SET.get(words[1], {}).items():
            at = words.index(option) if option in words else len(words)
            words[at : at + 2] = [option, value]
        if words[1] in WRITES_OUT:
            shutil.rmtree(self.place / words[3], ignore_errors=True)
        return words

    def invoke(self, line: str, words: list[str]) -> None:
        words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
        done = CliRunner().invoke(app, words)
        if done.exit_code and re.search(ABSENT, done.stderr):
            self.left.append(f"{line}: {done.stderr.strip()}")
            return
        assert done.exit_code == 0, f"{line}\n{done.output}{done.exception!r}"
        if target:
            (self.place / target).write_text(done.stdout)

    def process(self, words: list[str]) -> None:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, cwd=self.place)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"

    def compiles(self) -> bool:
        if shutil.which("cc") is None:
            self.left.append("no C compiler")
        return shutil.which("cc") is not None


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if blocks(text)])
def test_what_a_document_says_works(reader: Reader, name: str) -> None:
    for language, block in blocks(DOCUMENTS[name]):
        reader.read(language, block)
    if reader.left:
        pytest.skip(f"all of it ran but: {'; '.join(reader.left)}")
