"""Another runtime in a process of its own: its crash is one line here, and nobody else's threads are in its way.

A module that drives a runtime is imported there without torch; it ends with ``serve(answer)`` under ``__main__``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmsparse.errors import UserError

TIMEOUT = 1800  # seconds
THREADS = (1, 2)  # of timed decoding
DECODED = 32  # tokens of a timed continuation
RUNS = 3  # the fastest counts: others share the machine


def run(
    module: str, name: str, file: Path, request: dict[str, Any], timeout: int = TIMEOUT
) -> dict[str, Any]:
    """What ``answer`` of ``module`` returns for ``request`` and ``file``; both travel as JSON.

    Raises:
        UserError: the runtime ``name`` cannot load the file, or ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps({"file": str(file), **request}))
        command = [sys.executable, "-m", module, str(asked), str(told)]
        # the request says how many threads
        free = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, env=free
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{name} did not answer within {timeout} s on {file}") from error
        if done.returncode or not told.is_file():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [
                "it said nothing"
            ]
            raise UserError(f"{name} cannot run {file} (status {done.returncode}): {said[-1].strip()}")
        return json.loads(told.read_text())


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process of its own: read the request, write the answer."""
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))


def loss(logits: Any, targets: list[int]) -> float:
    """Negative log-likelihood (nats), summed, of ``targets`` under ``logits`` (tokens, vocabulary)."""
    rows = np.asarray(logits, np.float64)
    rows = rows - rows.max(1, keepdims=True)
    found = rows[np.arange(len(targets)), targets] - np.log(np.exp(rows).sum(1))
    return float(-found.sum())


def rate(decode: Callable[[int], float]) -> float:
    """Tokens a second, of the fastest of some runs; ``decode(count)``: the seconds of so many tokens after a prompt."""
    decode(8)  # the first tokens fill caches
    return DECODED / min(decode(DECODED) for _ in range(RUNS))
