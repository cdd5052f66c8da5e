"""Solve the weights of one block, put the results into the model and on the disk, and record how it went."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.errors import UserError
from llmsparse.pattern import Unstructured
from llmsparse.plan import Job
from llmsparse.processes import Processes
from llmsparse.report import Phases, relative_error
from llmsparse.skeleton import Weight
from llmsparse.solution import Solution
from llmsparse.statistics import SquaredNorm, Statistics
from llmsparse.writer import Writer


@dataclass(frozen=True)
class Work:
    """What every block of a run shares."""

    job: Job
    writer: Writer
    processes: Processes
    phases: Phases

    def desk(self, weights: list[Weight], views: dict[str, Tensor]) -> "Desk":
        return Desk(self, {w.name: w for w in weights}, views)

    def spread(self, module: nn.Module) -> None:
        """Give every process the main one's finished weights."""
        for parameter in module.parameters():
            self.processes.broadcast(parameter.data, 0)


@dataclass
class Desk:
    """The weights of one block while they are solved; ``views`` are (out, in) views into the model."""

    work: Work
    weights: dict[str, Weight]
    views: dict[str, Tensor]
    disk: dict[str, Tensor] = field(default_factory=dict)  # the block's tensors as they will be written
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, type[Statistics]]:
        return dict.fromkeys(self.weights, self.work.job.solver.statistics)

    def solve(self, name: str, statistics: Statistics | None) -> None:
        """Prune one weight, from the source's own values, in one of the processes."""
        weight, processes = self.weights[name], self.work.processes
        with self.work.phases("solve"):
            if weight.source not in self.disk:
                self.disk[weight.source] = self.work.job.checkpoint.tensor(weight.source).clone()
            stored = weight.stored(self.disk[weight.source])
            owner = len(self.records) % processes.count
            record = (
                prune_weight(self.work.job, weight, stored, statistics) if processes.rank == owner else None
            )
            if processes.count > 1:
                record = processes.gather(record)[owner]
                stored.copy_(processes.broadcast(stored.contiguous().to(self.work.job.device), owner))
            assert record is not None
            self.records[name] = record
            if name in self.views:
                self.views[name].copy_(stored)

    def finish(self, block: str, tensors: list[str]) -> list[dict[str, Any]]:
        """Solve what no token came to, write the block with its other ``tensors``, and note that it is done."""
        for name in self.weights:
            if name not in self.records:
                self.solve(name, None)
        records = [self.records[name] for name in self.weights]
        with self.work.phases("write"):
            if self.work.processes.is_main:
                self.work.writer.write(self.disk)
                self.work.writer.copy(name for name in tensors if name not in self.disk)
                self.work.writer.finish_block(block, records)
        return records


def prune_weight(job: Job, weight: Weight, stored: Tensor, statistics: Any) -> dict[str, Any]:
    """Prune one weight in place (``stored``, a view (out, in) of its disk tensor) and say how it went."""
    pattern = job.patterns[weight.name]
    dense = stored.to(job.device, torch.float32, copy=True)
    notes: dict[str, Any] = {}
    if job.solver.statistics is None:
        solution = job.solver(dense, None, pattern)
    elif statistics is None or statistics.tokens == 0:
        notes["warning"] = "saw no calibration token: pruned by magnitude; use more calibration text"
        mask = (pattern.scoped("row") if isinstance(pattern, Unstructured) else pattern).select(dense.abs())
        solution = Solution(dense.masked_fill(~mask, 0.0), mask)
    else:
        if statistics.tokens < weight.in_features:
            seen = f"saw {statistics.tokens} tokens for {weight.in_features} inputs"
            notes["warning"] = f"{seen}; use more calibration text"
        solution = job.solver(dense, statistics, pattern)
    stored.copy_(solution.weight)
    _verify(weight.name, stored, solution.mask.to(stored.device))
    return {
        "name": weight.name,
        "shape": [weight.out_features, weight.in_features],
        "pattern": str(pattern),
        "sparsity": float((~solution.mask).float().mean()),
        "error": relative_error(dense, stored.to(dense), statistics),
        "error_from": {type(None): None, SquaredNorm: "diagonal"}.get(type(statistics), "gram"),
        "tokens": statistics.tokens if statistics is not None else 0,
        **solution.notes,
        **notes,
    }


def _verify(name: str, stored: Tensor, mask: Tensor) -> None:
    """The mask after the cast to the checkpoint's dtype: pruned weights are +0.0, the others finite."""
    pruned = stored.masked_select(~mask)
    if bool(pruned.count_nonzero()) or bool(torch.signbit(pruned).any()):
        raise RuntimeError(f"{name}: pruned weights are not +0.0 after the cast to {stored.dtype}")
    if not bool(torch.isfinite(stored).all()):
        raise UserError(
            f"{name}: the solved weights are not finite in {stored.dtype}; use other calibration text"
        )
