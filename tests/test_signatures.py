"""Options come from the sources, and are those of the functions themselves."""

import inspect
import subprocess
import sys

import pytest

from llmsparse.cli import SHELLS
from llmsparse.signatures import signature_of


@pytest.mark.parametrize("command", SHELLS)
def test_the_source_says_what_the_function_says(command: str) -> None:
    shell = SHELLS[command]
    function, read = inspect.signature(shell.load()), signature_of(shell.module, shell.function)
    assert [(p.name, p.kind, p.default) for p in read.parameters.values()] == [
        (p.name, p.kind, p.default) for p in function.parameters.values()
    ]
    for name, parameter in function.parameters.items():
        assert read.parameters[name].annotation == parameter.annotation, name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from llmsparse.cli import SHELLS, app\n"
        "for command in SHELLS:\n"
        "    done = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert done.exit_code == 0 and '--json' in done.output, done.output\n"
        "print(sorted({'torch', 'transformers', 'triton', 'datasets', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
