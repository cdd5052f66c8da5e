"""The C sources alone: under sanitizers, for aarch64, and without warnings."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"
FLAGS = ["-std=gnu99", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}"]


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs {' or '.join(names)}")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def build(compiler: str, out: Path, *flags: str) -> str:
    driver = Path(__file__).with_name("compare.c")
    run(compiler, *FLAGS, *flags, *map(str, SOURCES.glob("*.c")), str(driver), "-o", str(out), "-lm")
    return str(out)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_compiler_has_no_warnings_and_its_kernels_agree(compiler: str, tmp_path: Path) -> None:
    run(build(tool(compiler), tmp_path / "compare", "-O3"), "500")


@pytest.mark.long
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(build(tool("gcc", "clang"), tmp_path / "compare", *sanitizers), "3000")


def test_neon_equals_portable_c(tmp_path: Path) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        run(build(tool("gcc", "clang"), tmp_path / "compare", "-O2"), "500", "neon")
        return
    compiler = tool("aarch64-linux-gnu-gcc")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    run(emulator, build(compiler, tmp_path / "compare", "-O2", "-static"), "500", "neon")
