"""The loop of a recovery: steps over windows, looks at text that is held out, the best that was seen, resumption."""

import errno
import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import distil
from llmsparse.apart import Text
from llmsparse.course import Course
from llmsparse.errors import UserError, first_line
from llmsparse.eval.forward import Forward, forward_of
from llmsparse.processes import Processes
from llmsparse.recovery import Recovery
from llmsparse.schedule import share_of
from llmsparse.student import Student
from llmsparse.teacher import Lesson, Teacher, outputs_of
from llmsparse.writer import disk_errors

BETAS = (0.9, 0.95)  # of Adam: few steps are taken
WARM = 0.05  # share of the steps in which the rate rises
CLIPPED = 1.0  # the largest norm of all gradients together
LOST = 2.0  # times the divergence before: a held-out one beyond it ends the run
STATE, BEST = "state.pt", "best.pt"


class NotFinite(UserError):
    """The divergence before the first step is none."""


class Setting(NamedTuple):
    """Where a run takes place: the dtype of its matrix products, its processes, a folder for its state, what it tells."""

    dtype: torch.dtype
    processes: Processes
    folder: Path
    progress: Any


class Training:
    """One run of ``options.steps`` steps; ``folder`` keeps the state from which it goes on, and the best weights."""

    def __init__(self, student: Student, teacher: Teacher, text: Text, setting: Setting) -> None:
        self.student, self.teacher, self.text = student, teacher, text
        self.options: Recovery = student.options
        self.dtype, self.processes, self.folder, self.progress = setting
        self.tokens = self.options.batch * text.windows.shape[1]  # of a step
        with torch.no_grad(), self._products():
            student.lighten(self.dtype)
            self.forward: Forward = forward_of(student.model, text.windows[:1].to(student.device))
        self.optimizer = _optimizer(self.options, student.masters)
        self.course = Course()
        self.losses: list[float] = []  # since the last look

    def run(self) -> Course:
        """Train to the end, or to where the loss is lost; the best weights lie in ``folder`` then."""
        self._resume()
        course, options = self.course, self.options
        if not course.curve:
            self._look()
        self.progress.start("recovering", options.steps - course.step)
        looks = {round(options.steps * i / options.evaluations) for i in range(1, options.evaluations + 1)}
        while course.step < options.steps and course.diverged is None:
            began = time.perf_counter()
            loss = self._step()
            course.seconds += time.perf_counter() - began
            self.losses.append(loss)
            self.progress.advance("recovering", f"KL {loss:.4f}, held out {course.best:.4f}")
            if not math.isfinite(loss):
                course.diverged = f"the loss is not finite at step {course.step}"
            elif course.step in looks:
                self._look()
        return course

    def _step(self) -> float:
        """Move the masters once; the mean divergence of this step's tokens, over all processes."""
        self.course.step += 1
        student, options, step = self.student, self.options, self.course.step
        self._choose_masks(step)
        rate = options.lr * share_of(step, options.steps, WARM)
        for group in self.optimizer.param_groups:
            own = group["lr"]  # torchao's is a tensor
            group["lr"] = own.fill_(rate) if isinstance(own, Tensor) else rate
        student.train(True)
        lost = torch.zeros((), device=student.device)
        for rows in self._batches(step):
            lost += self._backward(rows)
        student.train(False)
        student.take()
        self._average()
        torch.nn.utils.clip_grad_norm_(student.masters, CLIPPED)
        with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
            torch.manual_seed(options.seed * 1009 + step)  # of stochastic rounding
            self.optimizer.step()
        student.place()
        return self._sum(lost) / self.tokens

    def _sum(self, lost: Tensor) -> float:
        return float(self.processes.average(lost)) * self.processes.count

    def _choose_masks(self, step: int) -> None:
        options = self.options
        if not self.student.spliced:
            return
        if step > options.splice_last:
            self.student.fix()
        elif (step - 1) % options.splice_every == 0 and step > 1:
            self.student.splice()
            self.student.place()

    def _batches(self, step: int) -> list[list[int]]:
        """This process's rows of a step, as they go through the model; each epoch has an order of its own."""
        rows = []
        for place in range((step - 1) * self.options.batch, step * self.options.batch):
            epoch, index = divmod(place, self.text.trained)
            random = torch.Generator().manual_seed(self.options.seed * 100003 + epoch)
            rows.append(int(torch.randperm(self.text.trained, generator=random)[index]))
        rows = rows[self.processes.rank :: self.processes.count]
        size = self.options.in_a_pass
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _backward(self, rows: list[int]) -> Tensor:
        """Add the gradients of the windows ``rows``, their part of the step's mean; their summed divergence.

        All processes' gradients are averaged, so that each counts its own as many times as there are processes.
        """
        lesson = self._read(rows)
        watched = [*self.student.skeleton.blocks] if self.options.hidden else []
        part = self.processes.count
        with torch.enable_grad(), self._products(), outputs_of(watched) as outputs:
            states = self.forward.states(self.text.windows[rows].to(self.student.device))
            extra = None
            if watched:
                weight = self.options.hidden * part * len(rows) / self.options.batch
                extra = weight * distil.block_errors(list(outputs.values()), lesson.outputs)
        with self._products():
            return distil.backward(self.forward, states, lesson.divergence, part / self.tokens, extra)

    def _read(self, rows: list[int]) -> Lesson:
        with torch.no_grad():
            return self.teacher.read(rows)

    def _products(self) -> AbstractContextManager[Any]:
        """Matrix products in ``dtype``, everything else as the masters are."""
        if self.dtype == self.student.master:
            return nullcontext()
        return torch.autocast(self.student.device.type, self.dtype)

    def _average(self) -> None:
        """Gradients as the mean over all processes; one that used no token of an expert adds none."""
        if self.processes.count == 1:
            return
        for master in self.student.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            self.processes.average(master.grad)

    @torch.no_grad()
    def _look(self) -> None:
        """The divergence on the held-out text; the state is kept, and the weights if they are the best.

        Raises:
            NotFinite: it is not finite before the first step.
        """
        course, lost = self.course, torch.zeros((), device=self.student.device)
        held = range(self.text.trained, len(self.text.windows))
        for row in held[self.processes.rank :: self.processes.count]:
            lesson = self._read([row])
            with self._products():
                states = self.forward.states(self.text.windows[row : row + 1].to(self.student.device))
                lost += distil.forward(self.forward, states, lesson.divergence)
        found = self._sum(lost) / (len(held) * self.text.windows.shape[1])
        tokens = course.step * self.tokens
        train = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses = []
        seconds = round(course.seconds, 3)
        course.curve.append(
            {"step": course.step, "tokens": tokens, "train": train, "held_out": found, "seconds": seconds}
        )
        if not course.step:
            course.before = found
            if not math.isfinite(found):
                raise NotFinite(
                    "the divergence of SPARSE from its teacher is not finite; use --dtype float32, or see whether "
                    "`llmsparse eval` finds one of the two broken"
                )
        if not found <= LOST * course.before:
            rose = f"rose from {course.before:.4g} to {found:.4g}"
            course.diverged = f"the held-out divergence {rose} at step {course.step}"
        if found < course.best:
            course.best, course.best_step = found, course.step
            self._save(BEST, {"values": self.student.values(), "masks": self.student.current_masks()})
        self._save(STATE, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "course": asdict(self.course),
            "masters": [master.data for master in self.student.masters],
            "optimizer": self.optimizer.state_dict(),
            "masks": {name: each.mask for name, each in self.student.spliced.items()},
        }

    def _save(self, name: str, state: dict[str, Any]) -> None:
        """Replace a file of ``folder`` by another whole one."""

        def act() -> None:
            new = self.folder / f"{name}.new"
            with disk_errors(new):
                try:
                    torch.save(state, new)
                except RuntimeError as error:  # torch's own, of a file that ended too soon
                    raise OSError(errno.ENOSPC, first_line(error)) from error
                with new.open("rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(new, self.folder / name)

        self.processes.together(lambda: act() if self.processes.is_main else None)

    def _resume(self) -> None:
        """Go on from the state that an interrupted run left, if it left one."""
        if not (self.folder / STATE).exists():
            return
        state = torch.load(self.folder / STATE, map_location=self.student.device, weights_only=True)
        self.course = Course(**state["course"])
        with torch.no_grad():
            for master, value in zip(self.student.masters, state["masters"], strict=True):
                master.data.copy_(value)
            for name, mask in state["masks"].items():
                self.student.spliced[name].mask.copy_(mask)
        self.optimizer.load_state_dict(state["optimizer"])
        self.student.place()

    def best(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights that were the best on the held-out text, and their masks, by parameter."""
        found = torch.load(self.folder / BEST, map_location="cpu", weights_only=True)
        return found["values"], found["masks"]

    def clean(self) -> None:
        """Delete what only this run needed."""
        for name in (STATE, BEST):
            (self.folder / name).unlink(missing_ok=True)


def _optimizer(options: Recovery, masters: list[Any]) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        fused = all(master.dtype == torch.float32 for master in masters)
        return torch.optim.AdamW(masters, options.lr, BETAS, weight_decay=0.0, fused=fused)
    from torchao.optim import AdamW8bit

    rounding = options.master == "bfloat16"
    return AdamW8bit(masters, options.lr, BETAS, weight_decay=0.0, bf16_stochastic_round=rounding)
