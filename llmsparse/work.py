"""Solve the weights of one block, put the results into the model and on the disk, and record how it went."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse import gridfile
from llmsparse.block import Block
from llmsparse.calibration import Calibration
from llmsparse.compensation import compensate, keys, write_config
from llmsparse.errors import SolverError, UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Fixed, Pattern, Unstructured
from llmsparse.plan import Job
from llmsparse.processes import Processes
from llmsparse.propagation import aimed
from llmsparse.reconstruct import Outcome
from llmsparse.report import Phases, relative_error, versions
from llmsparse.skeleton import Weight
from llmsparse.solution import Solution, masked
from llmsparse.solvers.sparsegpt import SparseGPT
from llmsparse.statistics import FirstTokens, Gram, SquaredNorm, Statistics
from llmsparse.stream import BlockStream
from llmsparse.tables import round_table
from llmsparse.writer import Writer

AIM_DAMPING = 0.1  # of aiming a weight at the dense model's inputs


@dataclass
class Work:
    """What every block of a run shares."""

    job: Job
    writer: Writer
    processes: Processes
    phases: Phases
    progress: Any  # a Progress
    source: dict[str, str] = field(default_factory=dict)  # hashes of the files of what the user named
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was done before, for the report

    def fingerprint(self, text: Calibration | None) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        if not self.source:
            hashes = self.processes.together(lambda: self.job.source.sha256() if self.main else {})
            self.source = self.processes.first(hashes)
        return {
            **self.job.identity(),
            "processes": self.processes.count,
            "source": self.source,
            "tokens_sha256": text.sha256 if text else None,
            "versions": versions(),
        }

    def begin(self, text: Calibration | None, resume: bool) -> None:
        """Open the output, or the one of an interrupted run; the main process alone writes."""
        with self.phases("hash"):
            fingerprint = self.fingerprint(text)
        self.processes.together(lambda: self.writer.begin(fingerprint, resume) if self.main else None)
        self.writer.finished = self.processes.first(self.writer.finished)

    def finish(self, report: dict[str, Any]) -> None:
        """Copy what no block holds, and let the output appear with its report."""
        written = {name for index in range(len(self.job.skeleton.blocks)) for name in self.job.tensors(index)}
        written |= {
            name for w in self.job.weights for name in (w.source, *self.job.skeleton.same_as(w.source))
        }
        with self.phases("finish"):
            if self.main:
                for name, grid in self.job.tables.items():
                    report["tables"].append(self._round_table(name, grid))
                    written |= {name, *self.job.skeleton.same_as(name)}
                self.writer.copy(sorted(set(self.job.checkpoint.names()) - written))
                if paths := self.job.adapted:
                    weights = {w.name: w for w in self.job.weights}
                    write_config(
                        self.writer.work, weights, paths, self.job.recipe.compensate, self.writer.out.name
                    )
                self.writer.prepare_to_finish(report)
        self.processes.together(lambda: self.writer.finish(report) if self.main else None)
        for name in self.stages if self.main else ():
            shutil.rmtree(self.stage_folder(name), ignore_errors=True)
        self.processes.close()

    def stage_folder(self, name: str) -> Path:
        """Where a stage before pruning leaves its checkpoint until OUT is there."""
        return self.writer.out.with_name(f".{self.writer.out.name}.llmsparse-{name}")

    @contextmanager
    def stream(self, windows: Tensor) -> Iterator[BlockStream]:
        """The job's blocks with the activations of ``windows``, this process's part."""
        job = self.job
        stream = BlockStream(
            job.skeleton,
            windows,
            job.dtype,
            job.device,
            job.batch_size(),
            job.recipe.offload,
            self.writer.work,
        )
        stream.keep = job.passes_kept(stream.batch_size)
        try:
            yield stream
        finally:
            stream.close()
            self.phases.facts["batch_size"] = stream.batch_size

    def _round_table(self, name: str, grid: Grid) -> dict[str, Any]:
        """Round an embedding or output table, and write it with its codes."""
        stored = self.job.checkpoint.tensor(name)
        table = round_table(stored, grid)
        same = dict.fromkeys([name, *self.job.skeleton.same_as(name)], stored)
        self.writer.write(same | table.tensors(name))
        return table.row(name, grid)

    @property
    def main(self) -> bool:
        return self.processes.is_main

    def desk(self, weights: list[Weight], views: dict[str, Tensor]) -> "Desk":
        return Desk(self, {w.name: w for w in weights}, views)

    def spread(self, module: nn.Module) -> None:
        """Give every process the main one's finished weights."""
        if self.processes.count > 1:
            for parameter in module.parameters():
                self.processes.broadcast(parameter.data, 0)


@dataclass
class Desk:
    """The weights of one block while they are solved; ``views`` are (out, in) views into the model."""

    work: Work
    weights: dict[str, Weight]
    views: dict[str, Tensor]
    disk: dict[str, Tensor] = field(default_factory=dict)  # the block's tensors as they will be written
    codes: dict[str, Tensor] = field(default_factory=dict)  # tensors of the files beside
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)  # (out, in), of a block that is to be trained
    trained: dict[str, Tensor] = field(default_factory=dict)  # its weights after that, (out, in) float32

    _turns: int = 0

    @property
    def kinds(self) -> dict[str, type[Statistics]]:
        """The statistics that each weight's solver wants; the first token's weight is for queries, keys and values."""
        return self._kinds(self.work.job.solver.statistics)

    @property
    def rounding_kinds(self) -> dict[str, type[Statistics]]:
        """The same of the sweep that rounds trained weights."""
        return self._kinds(Gram)

    def _kinds(self, kind: Any) -> dict[str, type[Statistics]]:
        job, kinds = self.work.job, dict.fromkeys(self.weights, kind)
        if kind is Gram and job.first_token != 1:
            attention: Any = FirstTokens(job.first_token)
            kinds |= {name: attention for name, w in self.weights.items() if w.feeds_attention}
        return kinds

    def solve(self, name: str, statistics: Statistics | None) -> None:
        """Prune one weight, from the source's own values, in one of the processes."""
        job, weight = self.work.job, self.weights[name]
        if weight.source not in self.disk:
            self.disk[weight.source] = job.checkpoint.tensor(weight.source).clone()
        grid = (
            None if job.reconstruction and weight.block is not None else job.grid
        )  # then it is trained first
        self._settle(weight, lambda stored: prune_weight(job, weight, stored, statistics, grid))

    def round(self, name: str, statistics: Statistics | None) -> None:
        """Round a trained weight to the grid, its mask kept."""
        job, weight = self.work.job, self.weights[name]
        dense = self.trained.pop(name)
        before, mask = self.records[name], self.masks[name]

        def act(stored: Tensor) -> Solved:
            stored.copy_(dense)
            record, codes, kept = prune_weight(
                job, weight, stored, statistics, job.grid, SparseGPT(), Fixed(mask.to(job.device))
            )
            return {**before, **record, "pattern": before["pattern"]}, codes, kept

        self._settle(weight, act)

    def _settle(self, weight: Weight, act: Callable[[Tensor], "Solved"]) -> None:
        """Let one of the processes ``act`` on the weight as it will be stored, and tell the others."""
        processes, name = self.work.processes, weight.name
        with self.work.phases("solve"):
            stored = weight.stored(self.disk[weight.source])
            owner = self._turns % processes.count
            self._turns += 1
            mine = processes.rank == owner
            solved = processes.together(lambda: act(stored) if mine else None)
            mask = solved[2] if solved else torch.empty(stored.shape, dtype=torch.bool)
            if processes.count > 1:
                told = processes.gather(solved[:2] if solved else None)[owner]
                device = self.work.job.device
                stored.copy_(processes.broadcast(stored.contiguous().to(device), owner))
                mask = processes.broadcast(mask.to(device, torch.uint8), owner).bool()
                solved = (*told, mask)
            assert solved is not None
            record, codes, _ = solved
            self.records[name] = record
            self.codes.update(codes)
            if self.work.job.reconstruction:
                self.masks[name] = mask
            if record["error"] is not None:
                self.work.progress.tell("pruning", f"error {record['error']:.4f} {name}")
            if name in self.views:
                self.views[name].copy_(stored)

    def retake(self, block: Block, outcome: Outcome) -> None:
        """Take over what the training of the block made of its weights and vectors."""
        job = self.work.job
        views = job.skeleton.views([w for w in block.weights if w.name in self.masks], outcome.matrices)
        for name, view in views.items():
            weight, mask = self.weights[name], self.masks[name]
            stored = weight.stored(self.disk[weight.source])
            stored.copy_(torch.where(mask.to(view.device), view, 0.0))
            verify(name, stored, mask.to(stored.device))
            self.views[name].copy_(stored)
            self.records[name]["block_error"] = outcome.errors
            if job.grid:
                self.trained[name] = view.clone()
        for name, vector in outcome.vectors.items():
            source = job.skeleton.sources[name][0][0]
            self.disk[source] = vector.to("cpu", job.checkpoint.dtype(source))
            job.skeleton.model.get_parameter(name).data.copy_(self.disk[source])

    def finish(self, block: str, tensors: list[str]) -> list[dict[str, Any]]:
        """Solve what no token came to, write the block with its other ``tensors``, and note that it is done."""
        unseen = [w for name, w in self.weights.items() if name not in self.records]
        if self.work.job.solver.statistics is not None:
            self._refuse_unobserved(unseen)
        for weight in unseen:
            self.solve(weight.name, None)
            if self.work.job.grid and weight.name in self.masks:
                self.trained[weight.name] = weight.stored(self.disk[weight.source]).float()
                self.round(weight.name, None)
        for name in list(self.disk):
            self.disk.update(dict.fromkeys(self.work.job.skeleton.same_as(name), self.disk[name]))
        records = [self.records[name] for name in self.weights]
        with self.work.phases("write"):
            if self.work.main:
                self.work.writer.write(self.disk | self.codes)
                self.work.writer.copy(name for name in tensors if name not in self.disk)
                self.work.writer.finish_block(block, records)
        return records

    def _refuse_unobserved(self, unseen: list[Weight]) -> None:
        """A single expert may be idle; any other weight that no product used was not recognised."""
        seen = {self.weights[name].parameter for name in self.records}
        lost = [w for w in unseen if w.expert is None or w.parameter not in seen]
        if lost:
            model_type = self.work.job.skeleton.config.model_type
            raise UserError(
                f"{model_type} cannot be pruned whole: no matrix product of its forward was recognised as "
                f"{lost[0].name}; leave it out with --skip"
            )


Solved = tuple[
    dict[str, Any], dict[str, Tensor], Tensor
]  # record, tensors of the files beside, mask (out, in)


def prune_weight(
    job: Job, weight: Weight, stored: Tensor, statistics: Any, grid: Grid | None,
    solver: Any = None, pattern: Pattern | None = None,
) -> Solved:  # fmt: skip
    """Prune one weight in place (``stored``, a view (out, in) of its disk tensor); say how it went, what is written beside.

    By the job's solver to the job's pattern, unless others are given.
    """
    solver, pattern = solver or job.solver, pattern or job.patterns[weight.name]
    dense = stored.to(job.device, torch.float32, copy=True)
    notes: dict[str, Any] = {}
    if solver.statistics is None:
        solution = _call(solver, dense, None, pattern, grid)
    elif statistics is None or statistics.tokens == 0:
        notes["warning"] = "saw no calibration token: pruned by magnitude; use more calibration text"
        mask = (pattern.scoped("row") if isinstance(pattern, Unstructured) else pattern).select(dense.abs())
        solution = masked(dense, mask, grid)
    else:
        if statistics.tokens < weight.in_features:
            seen = f"saw {statistics.tokens} tokens for {weight.in_features} inputs"
            notes["warning"] = f"{seen}; use more calibration text"
        solution = _calibrated(solver, weight.name, dense, statistics, pattern, grid)
    stored.copy_(solution.weight)
    verify(weight.name, stored, solution.mask.to(stored.device))
    solved, codes = stored.to(dense), {}
    if grid is not None:
        if solution.codes is None or solution.scales is None:
            raise UserError(f"solver {job.recipe.solver} returned no codes; it cannot round to --values")
        solved = grid.values(solution.codes, solution.scales)
        codes = gridfile.tensors(weight.name, solution.codes.cpu(), solution.scales.cpu())
        notes["values"] = str(grid)
    if path := job.adapted.get(weight.name):
        wanted = aimed(dense, statistics, AIM_DAMPING) if isinstance(statistics, Gram) else dense
        adapter = compensate(wanted - solved, statistics, job.recipe.compensate)
        parts = zip(keys(path), adapter[:2], strict=True)
        codes |= {key: part.to("cpu", job.checkpoint.stored_dtype) for key, part in parts}
        notes["error_left"] = adapter.left
    record = {
        "name": weight.name,
        "shape": [weight.out_features, weight.in_features],
        "pattern": str(pattern),
        "sparsity": 1 - int(solution.mask.count_nonzero()) / solution.mask.numel(),
        "error": relative_error(dense, solved, statistics),
        "error_from": {type(None): None, SquaredNorm: "diagonal"}.get(type(statistics), "gram"),
        "tokens": statistics.tokens if statistics is not None else 0,
        **solution.notes,
        **notes,
    }
    return record, codes, solution.mask


def _call(solver: Any, dense: Tensor, statistics: Any, pattern: Pattern, grid: Grid | None) -> Solution:
    """The solver, with the grid only where there is one: a solver of the user's own may not know grids."""
    return solver(dense, statistics, pattern, **({"grid": grid} if grid else {}))


def _calibrated(
    solver: Any, name: str, dense: Tensor, statistics: Any, pattern: Pattern, grid: Grid | None
) -> Solution:
    sums = statistics.sums()
    if not bool(torch.isfinite(sums.diagonal() if sums.dim() == 2 else sums).all()):
        raise SolverError(f"{name}: its calibration inputs are not finite; use --dtype float32 or other text")
    try:
        if isinstance(statistics, Gram):
            dense = aimed(dense, statistics, AIM_DAMPING)
        return _call(solver, dense, statistics, pattern, grid)
    except SolverError as error:
        raise SolverError(f"{name}: {error}") from error


def verify(name: str, stored: Tensor, mask: Tensor) -> None:
    """The mask after the cast to the checkpoint's dtype: pruned weights are +0.0, the others finite."""
    bits = stored.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.element_size()])
    if not bool(((bits == 0) | mask).all()):
        raise RuntimeError(f"{name}: pruned weights are not +0.0 after the cast to {stored.dtype}")
    if not bool(torch.isfinite(torch.stack(stored.aminmax())).all()):  # NaN is both
        raise UserError(
            f"{name}: the solved weights are not finite in {stored.dtype}; use other calibration text"
        )
