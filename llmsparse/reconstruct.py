"""Block reconstruction: the kept weights of a whole block, trained together towards the dense block's outputs."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.block import Block
from llmsparse.errors import UserError
from llmsparse.massive import parts, relative_error, weights
from llmsparse.processes import Processes
from llmsparse.schedule import share_of

BETAS = (0.9, 0.95)  # of Adam: few steps are taken
WARM = 0.1  # share of the steps in which the rate rises


@dataclass(frozen=True)
class Reconstruction:
    """Options: ``epochs`` over the calibration windows, ``batch`` windows a step, Adam with the learning ``rate``.

    The rate is relative to each weight's root mean square, rises over the first tenth and falls to zero by a cosine.
    ``held_out`` of the windows choose the best epoch and are not trained on. ``norms``: train vectors (norms, biases)
    too. ``channels``: the power with which a channel of the hidden states counts less the larger it is; 0 counts all as
    they are.
    """

    epochs: int = 2
    rate: float = 0.015
    batch: int = 1
    held_out: float = 0.0625
    norms: bool = False
    channels: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"reconstruct.{name} must be at least 1; {getattr(self, name)} was given")
        if not self.rate > 0:
            raise UserError(f"reconstruct.rate must be positive; {self.rate} was given, its default is 0.015")
        if not 0 <= self.channels <= 2:
            raise UserError(f"reconstruct.channels must lie between 0 and 2; {self.channels} was given")
        if not 0 < self.held_out < 1:
            raise UserError(f"reconstruct.held_out must lie between 0 and 1; {self.held_out} was given")


class Outcome(NamedTuple):
    """Parameters by name, in float32: ``matrices`` that hold weights, and ``vectors``; what came of the errors."""

    matrices: dict[str, Tensor]
    vectors: dict[str, Tensor]
    errors: dict[str, Any]


def reconstruct(
    block: Block, masks: dict[str, Tensor], options: Reconstruction, processes: Processes, seed: int
) -> Outcome:
    """Train ``block`` on the stream's hidden states towards ``block.aims``; zeros outside ``masks`` stay.

    ``masks``: weight name -> (out, in), True = kept; a weight without one is left as it is. The error of a token is
    sum_c w_c (y - aim)_c^2 / |aim|^2, so that the few tokens of massive activations weigh as any other, and with w_c the
    inverse of a channel's part in |aim|^2 the few massive channels no more than the rest: in some models they hold nine
    tenths of it, and the next norm scales them down. The block itself is as it was before afterwards.
    """
    training = _Training(block, masks, options, processes)
    try:
        best = before = training.held_out_error()
        kept, best_epoch = training.snapshot(), 0
        for epoch in range(1, options.epochs + 1):
            training.epoch(epoch, seed)
            error = training.held_out_error()
            if error < best:
                best, kept, best_epoch = error, training.snapshot(), epoch
    finally:
        training.close()
    errors = {"before": before, "after": best, "epoch": best_epoch}
    return Outcome(
        {name: p for name, p in kept.items() if name in training.marks},
        {name: p for name, p in kept.items() if name not in training.marks},
        errors,
    )


class _Training:
    """A block in float32 while it is trained."""

    def __init__(self, block: Block, masks: dict[str, Tensor], options: Reconstruction, processes: Processes):
        self.block, self.options, self.processes = block, options, processes
        self.stored = {f"{block.name}.{name}": p.data for name, p in block.module.named_parameters()}
        chosen = [w for w in block.weights if w.name in masks]
        self.marks = {w.parameter: _all(self.stored[w.parameter]) for w in chosen}
        for name, view in block.stream.skeleton.views(chosen, self.marks).items():
            view.copy_(masks[name])
        everything = {f"{block.name}.{name}": p for name, p in block.module.named_parameters()}
        sources = block.stream.skeleton.sources
        for p in everything.values():
            p.data = p.data.to(torch.float32, copy=True)
        plain = {name for name, parts in sources.items() if len(parts) == 1 and parts[0][1] is None}
        vectors = {n for n, p in everything.items() if p.dim() == 1 and n in plain and options.norms}
        self.parameters = {n: p for n, p in everything.items() if n in self.marks or n in vectors}
        groups = []
        for name, p in self.parameters.items():
            kept = p.detach()[self.marks[name]] if name in self.marks else p.detach()
            groups.append({"params": [p], "peak": options.rate * float(kept.square().mean().sqrt())})
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        count = min(processes.gather(len(block.stream.hidden)))  # every process takes as many steps
        held = max(1, round(options.held_out * count))
        if count <= held:
            raise UserError(
                f"--reconstruct needs 2 windows a process at least; there are {count}; raise --samples"
            )
        self.held_out, self.windows = range(count - held, count), count - held
        self.steps = options.epochs * math.ceil(self.windows / options.batch)
        self.step = 0
        self.weighing = self._weighing()

    def epoch(self, number: int, seed: int) -> None:
        """Every window that is not held out, once, in an order of its own."""
        random = torch.Generator().manual_seed((seed * 1009 + self.block.index) * 1009 + number)
        order = torch.randperm(self.windows, generator=random).tolist()
        for p in self.parameters.values():
            p.requires_grad_(True)
        for start in range(0, len(order), self.options.batch):
            self._step(order[start : start + self.options.batch])
        for p in self.parameters.values():
            p.requires_grad_(False)

    def _step(self, windows: list[int]) -> None:
        self.step += 1
        share = share_of(self.step, self.steps, WARM)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.zero_grad()
        with torch.enable_grad():
            for window in windows:
                (self._error(window) / len(windows)).backward()
        for p in self.parameters.values():
            if p.grad is not None:
                self.processes.average(p.grad)
        self.optimizer.step()
        for name, mask in self.marks.items():
            self.parameters[name].data.masked_fill_(~mask, 0.0)

    def _error(self, window: int) -> Tensor:
        stream, indices = self.block.stream, range(window, window + 1)
        assert self.block.aims is not None
        aim = self.block.aims.read(indices).float()
        with torch.autocast(stream.device.type, stream.dtype, enabled=stream.dtype != torch.float32):
            output = self.block.forward(self.block.module, stream.hidden.read(indices).float())
        return relative_error(output, aim, self.weighing)

    def _weighing(self) -> Tensor:
        """How much each channel counts, (hidden,)."""
        aims = self.block.aims
        assert aims is not None
        count = len(self.block.stream.hidden)
        found = torch.stack([parts(aims.read(range(window, window + 1))) for window in range(count)])
        return weights(self.processes.average(found.mean(0)), self.options.channels)

    def held_out_error(self) -> float:
        """The mean over the windows held out, of all processes."""
        with torch.no_grad():
            errors = torch.stack([self._error(window) for window in self.held_out])
        return float(self.processes.average(errors.mean()))

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def close(self) -> None:
        """Give the block its own values back."""
        for name, p in self.block.module.named_parameters():
            p.data, p.grad = self.stored[f"{self.block.name}.{name}"], None
            p.requires_grad_(False)


def _all(like: Tensor) -> Tensor:
    """Everything of a parameter is kept where no mask says otherwise."""
    return torch.ones_like(like, dtype=torch.bool)
