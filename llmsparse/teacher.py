"""What a teacher says of windows: while it runs beside the student, or as it was written down before."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmsparse.atomic import write_whole
from llmsparse.distil import Divergence, likeliest, of_likeliest, of_whole
from llmsparse.eval.forward import Forward, forward_of, pieces
from llmsparse.processes import Processes
from llmsparse.writer import disk_errors

PHASE = "asking the teacher"
FILES: dict[str, Any] = {"ids": np.int32, "logs": np.float16}
FLUSH = 32  # windows that are written down between two notes of how far it came


class Lesson(NamedTuple):
    """Of some windows: how far a student is from the teacher, and what the teacher's blocks put out."""

    divergence: Divergence
    outputs: list[Tensor]


class Teacher(Protocol):
    """``read(rows)``: what it says of those of its windows."""

    def read(self, rows: list[int]) -> Lesson: ...


@dataclass
class Beside:
    """A ``model`` in memory, and the ``windows`` (count, length) that it reads each time; ``blocks`` are looked at."""

    model: nn.Module
    windows: Tensor
    blocks: list[nn.Module]

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.forward: Forward = forward_of(self.model, self.windows[:1].to(self.device))

    @torch.no_grad()
    def read(self, rows: list[int]) -> Lesson:
        with outputs_of(self.blocks) as outputs:
            states = self.forward.states(self.windows[rows].to(self.device)).flatten(0, -2)
        return Lesson(partial(self._divergence, states), list(outputs.values()))

    def _divergence(self, states: Tensor, span: slice, student: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self.forward.logits(states[span])
        return of_whole(expected, student)


@contextmanager
def outputs_of(blocks: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each of ``blocks`` puts out in the forward passes inside, by its place."""
    found: dict[int, Tensor] = {}

    def note(place: int, module: nn.Module, given: Any, output: Any) -> None:
        found[place] = output if isinstance(output, Tensor) else output[0]

    hooks = [block.register_forward_hook(partial(note, place)) for place, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Written:
    """The ``likeliest`` tokens of each position of ``windows`` (count, length), in two files in ``folder``.

    Each process asks its own teacher about some of the windows and reads what all were told, from one disk.
    """

    folder: Path
    windows: Tensor
    likeliest: int
    device: torch.device
    processes: Processes

    def __post_init__(self) -> None:
        self.note = self.folder / f"{self.processes.rank}.json"
        self.mine = range(self.processes.rank, len(self.windows), self.processes.count)
        self.processes.together(self._create)
        self.ids, self.logs = self._open()

    def _create(self) -> None:
        """The files in their full size, whole or not at all: a full disk shows here, and not in a mapped page."""
        if not self.processes.is_main or self.folder.exists():
            return
        new = self.folder.with_name(f"{self.folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with disk_errors(self.folder):
            new.mkdir()
            for name, kind in FILES.items():
                size = self.windows.numel() * self.likeliest * np.dtype(kind).itemsize
                with (new / name).open("wb") as stream:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(stream.fileno(), 0, size)
                    else:
                        stream.truncate(size)
            new.rename(self.folder)

    def _open(self) -> list[Any]:
        shape = *self.windows.shape, self.likeliest
        return [np.memmap(self.folder / name, kind, "r+", shape=shape) for name, kind in FILES.items()]

    @property
    def done(self) -> int:
        """How many of this process's windows are written down."""
        return json.loads(self.note.read_text())["windows"] if self.note.exists() else 0

    @property
    def is_whole(self) -> bool:
        return self.done == len(self.mine)

    @torch.no_grad()
    def write(self, model: nn.Module, progress: Any) -> None:
        """Let ``model`` read what an earlier, interrupted run did not."""
        forward = forward_of(model, self.windows[:1].to(self.device))
        progress.start(PHASE, len(self.mine) - self.done)
        for place in range(self.done, len(self.mine)):
            row = self.mine[place]
            states = forward.states(self.windows[row : row + 1].to(self.device))[0]
            for span in pieces(0, len(states)):
                ids, logs = likeliest(forward.logits(states[span]), self.likeliest)
                self.ids[row, span], self.logs[row, span] = ids.cpu().numpy(), logs.cpu().numpy()
            if (place + 1) % FLUSH == 0 or place + 1 == len(self.mine):
                self.ids.flush()
                self.logs.flush()
                write_whole(self.note, json.dumps({"windows": place + 1}))
            progress.advance(PHASE)

    def read(self, rows: list[int]) -> Lesson:
        ids, logs = (
            torch.from_numpy(each[rows]).flatten(0, 1).to(self.device) for each in (self.ids, self.logs)
        )
        return Lesson(lambda span, student: of_likeliest(ids[span], logs[span], student), [])
