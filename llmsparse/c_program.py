"""The C of an export compiled for this machine, and what its program answers: exporters/llama_check.c."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.runtime_child import TIMEOUT

COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-O3", "-march=native", "-ffast-math")  # those that the compiler knows
QUESTIONS = Path(__file__).with_name("exporters") / "llama_check.c"


def compiler() -> list[str]:
    """The command that compiles C on this machine: $CC, else cc, gcc or clang.

    Raises:
        UserError: there is none.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    looked = f"CC={shlex.join(asked)}" if asked else ", ".join(COMPILERS)
    raise UserError(
        f"--format c-header --check compiles llama.c and runs it, and no C compiler was found ({looked}); "
        "install gcc (Debian: apt-get install gcc libc6-dev), name one with CC, or leave --check out"
    )


class Program(NamedTuple):
    """A compiled model."""

    file: Path
    name: str  # which compiler, with which options
    seconds: float  # that compiling took

    @classmethod
    def build(cls, folder: Path, context: int, work: Path) -> "Program":
        """Compile ``folder``/llama.c into ``work`` with room for ``context`` tokens.

        Raises:
            UserError: there is no compiler, or it ended with an error or not in time.
        """
        command, begun = compiler(), time.perf_counter()
        options = _known(command)
        file = work / "model"
        sizes = [f"-DLLAMA_CONTEXT={context}", "-I", str(folder.absolute())]
        done = _run([*command, *options, *sizes, str(QUESTIONS), "-o", str(file), "-lm"], "the C compiler")
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(
                f"{shlex.join(command)} cannot compile {folder / 'llama.c'} (status {done.returncode}): {said[-1]}"
            )
        return cls(file, f"llama.c, {_version(command)} {' '.join(options)}", time.perf_counter() - begun)

    def ask(self, question: str, number: int, ids: Iterable[int] = ()) -> list[str]:
        """The lines that the program answers.

        Raises:
            UserError: it ended with an error or not in time.
        """
        text = " ".join(map(str, ids)).encode()
        done = _run([str(self.file), question, str(number)], "the compiled llama.c", text)
        if done.returncode:
            raise UserError(
                f"the compiled llama.c ended with status {done.returncode} when asked for {question}"
            )
        return done.stdout.decode().split()

    def weights(self, shapes: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """The matrices (out, in) that the program multiplies by, in float32, one after another.

        Raises:
            UserError: it has others than those of ``shapes``.
        """
        with subprocess.Popen([str(self.file), "weights"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for out, columns in shapes:
                data = bytearray(process.stdout.read(4 * out * columns))
                if len(data) < 4 * out * columns:
                    break
                yield torch.frombuffer(data, dtype=torch.float32).view(out, columns)
            else:
                data = bytearray(process.stdout.read(1))
                if not data:
                    return
            process.kill()
        raise UserError("the compiled llama.c has other weights than the model; export it again")


def _run(command: list[str], name: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{name} did not end within {TIMEOUT} s ({shlex.join(command)})") from error


def _known(command: list[str]) -> list[str]:
    empty = ("-fsyntax-only", "-x", "c", os.devnull)
    return [option for option in OPTIONS if not _run([*command, option, *empty], "the C compiler").returncode]


def _version(command: list[str]) -> str:
    said = _run([*command, "--version"], "the C compiler").stdout.decode(errors="replace")
    return (said.splitlines() or [shlex.join(command)])[0]
