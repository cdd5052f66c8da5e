"""A .pte file in real ExecuTorch, in a process of its own; its tensors are torch's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse import runtime_child
from llmsparse.executorch_program import quiet


def run(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What ExecuTorch answers to ``request``: see ``answer``.

    Raises:
        UserError: ExecuTorch cannot load the file, or ended without an answer.
    """
    return runtime_child.run(__name__, "ExecuTorch", file, request)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load ``file``; each timing has a pool of as many threads as it says.

    ``ids``: windows; predictions before position ``first`` of each do not count. ``prompt``: ids to continue
    greedily for ``count`` tokens. Returns ``losses`` (nats, summed, of each window), ``greedy``, ``load_seconds``,
    ``tokens_per_second`` by threads.
    """
    _import()
    begun = time.perf_counter()
    program = Program(request["file"], runtime_child.THREADS[-1])
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - begun}
    windows = zip(request["ids"], request["first"], strict=True)
    found["losses"] = [_loss(program, ids, first) for ids, first in windows]
    found["greedy"] = program.greedy(request["prompt"], request["count"])[0]
    speeds = {}
    for threads in runtime_child.THREADS:
        program = Program(request["file"], threads)
        speeds[threads] = runtime_child.rate(lambda count: program.greedy(request["prompt"], count)[1])  # noqa: B023
    return found | {"tokens_per_second": speeds}


def _import() -> tuple[Any, Callable[[int], None]]:
    """The runtime with the operators of codes, and what sets its threads."""
    with quiet():
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

    return Runtime.get(), _unsafe_reset_threadpool


class Program:
    """A loaded program; a position that is written again forgets what came after it."""

    def __init__(self, file: str, threads: int) -> None:
        runtime, reset_threads = _import()
        reset_threads(threads)  # unsafe only while a program runs
        self.program = runtime.load_program(file)
        self.forward = self.program.load_method("forward")

    def logits(self, token: int, position: int) -> Tensor:
        """(vocabulary,) after ``token``."""
        return self.forward.execute([torch.tensor([[token]]), torch.tensor([position])])[0].flatten()

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """The likeliest ``count`` tokens, and their seconds; the prompt is read before them."""
        for position, token in enumerate(prompt):
            found = self.logits(token, position)
        written: list[int] = []
        begun = time.perf_counter()
        for position in range(len(prompt), len(prompt) + count):
            written.append(int(found.argmax()))
            found = self.logits(written[-1], position)
        return written, time.perf_counter() - begun


def _loss(program: Program, ids: list[int], first: int) -> float:
    found = 0.0
    for position, token in enumerate(ids[:-1]):
        logits = program.logits(token, position)
        if position >= first:
            found += runtime_child.loss(logits[None], [ids[position + 1]])
    return found


if __name__ == "__main__":
    runtime_child.serve(answer)
