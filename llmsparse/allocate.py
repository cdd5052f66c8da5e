"""The step of a run that divides its sparsity among the weights, before the first of them is solved."""

import math
from typing import Any

import torch

from llmsparse.allocation import Divided, Memory, Target, divisible
from llmsparse.allocators.uniform import Uniform
from llmsparse.calibration import Calibration
from llmsparse.costs import Costs, Times, kinds_of, measured
from llmsparse.dense_model import DenseModel
from llmsparse.errors import UserError
from llmsparse.pattern import NM, Pattern, Unstructured
from llmsparse.plan import Job
from llmsparse.skeleton import Weight
from llmsparse.values import Values
from llmsparse.work import Work

DONE, STATE, TIMES = "allocation", "allocation state", "allocation times"  # lines of the run's journal


def allocate(work: Work, text: Calibration | None) -> dict[str, Any] | None:
    """Replace the job's patterns by those of its allocator, found now or by the run that is resumed.

    Every process computes the same, and takes what the main one found. Returns what ``tell`` needs; None for uniform.
    """
    job, processes = work.job, work.processes
    if isinstance(job.allocator, Uniform):
        return None
    with work.phases("allocate"):
        found = work.writer.finished.get(DONE)
        if found is None:
            times = processes.first(processes.together(lambda: _times(work) if work.main else None))
            note(work, TIMES, times)
            windows = torch.empty(0, 0, dtype=torch.int64) if text is None else text.windows
            dense = DenseModel(job, windows, work.writer.work, work.progress)
            found = processes.first(processes.together(lambda: _found(work, dense, times)))
            note(work, DONE, found)
    job.patterns = {
        name: _with(pattern, found["sparsity"].get(name)) for name, pattern in job.patterns.items()
    }
    return {**found, "seconds": work.phases.seconds["allocate"]}


def tell(allocation: dict[str, Any], report: dict[str, Any]) -> None:
    """Add ``allocation`` to the report: weights pruned, bytes or seconds that were asked for, and what came of it."""
    told = {**allocation["report"], "seconds": allocation["seconds"]}
    if told["budget"] == "parameters":
        records = [record for record in report["weights"] if record["name"] in allocation["sparsity"]]
        told["got"] = sum(round(record["sparsity"] * math.prod(record["shape"])) for record in records)
        if told["got"] != told["asked"]:
            report["warnings"].append(
                f"allocation: {told['asked']:,} weights were to be pruned, {told['got']:,} are: solver or pattern count "
                "in whole rows or groups"
            )
    report["allocation"] = told


def note(work: Work, name: str, value: Any) -> None:
    """Put a JSON ``value`` into the run's journal, in the place of an earlier one of that name."""
    if work.main:
        work.writer.finish_block(name, value)
    else:
        work.writer.finished[name] = value


def _found(work: Work, dense: DenseModel, times: Times) -> dict[str, Any]:
    """The sparsity of each weight, or its n, and the totals."""
    job = work.job
    target = target_of(job, times)
    memory = Memory(work.writer.finished.get(STATE), lambda state: note(work, STATE, state))
    chosen: dict[str, Any] = job.allocator(dense, target, memory)
    for name, pattern in target.patterns.items():
        if type(chosen.get(name)) is not type(pattern):
            raise UserError(f"--allocate {job.recipe.allocate} gave no pattern such as {pattern} for {name}")
    asked = sum(target.asked(pattern) for pattern in target.groups)
    got = sum(target.cost(name, pattern) for name, pattern in chosen.items())
    if target.costs.whole:
        whole = sum(w.out_features * w.in_features for w in target.weights.values())
        asked, got = whole - asked, whole - got  # what is pruned
    report = {"allocator": str(job.recipe.allocate), "budget": job.recipe.budget, "asked": asked, "got": got}
    sparsity = {name: p.sparsity if isinstance(p, Unstructured) else p.n for name, p in chosen.items()}
    return {"sparsity": sparsity, "report": {**report, **memory.notes}}


def target_of(job: Job, times: Times) -> Target:
    """The weights that can be divided, and what they cost."""
    weights = _divisible(job)
    patterns: dict[str, Divided] = {name: job.patterns[name] for name in weights}  # type: ignore[misc]
    return Target(weights, patterns, Costs(job.recipe.budget, _values(job), times), job.recipe.seed)


def _times(work: Work) -> Times:
    """What a budget of time is counted in, measured now or by the run that is resumed."""
    if work.job.recipe.budget != "time":
        return {}
    return work.writer.finished.get(TIMES) or measured(_divisible(work.job).values(), _values(work.job))


def _divisible(job: Job) -> dict[str, Weight]:
    names = set(divisible(job.patterns))
    return {w.name: w for w in job.weights if w.name in names}


def _values(job: Job) -> dict[str, Values]:
    """What the numbers of each weight will be stored as, where the budget asks."""
    if job.recipe.budget == "parameters":
        return {}
    weights = _divisible(job)
    dtypes = {name: job.checkpoint.dtype(weight.source) for name, weight in weights.items()}
    return kinds_of(weights.values(), job.recipe.budget, dtypes, str(job.grid) if job.grid else None)


def _with(pattern: Pattern, sparsity: Any) -> Pattern:
    """``pattern`` with another sparsity, or n."""
    if sparsity is None:
        return pattern
    return NM(sparsity, pattern.m) if isinstance(pattern, NM) else Unstructured(sparsity, pattern.scope)  # type: ignore[attr-defined]
