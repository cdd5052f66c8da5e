"""Prune a checkpoint block by block: the program in one function, `prune`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration import Calibration, calibrate
from llmsparse.errors import UserError
from llmsparse.observe import Observer
from llmsparse.pattern import Unstructured
from llmsparse.plan import Job, prepare
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.recipe import Recipe, with_options
from llmsparse.report import Phases, relative_error, versions
from llmsparse.skeleton import Weight
from llmsparse.solution import Solution
from llmsparse.statistics import SquaredNorm
from llmsparse.stream import Block, BlockStream
from llmsparse.writer import Writer


def prune(
    model: str | Path, out: str | Path, *, recipe: Any = None, resume: bool = False, overwrite: bool = False,
    progress: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Prune ``model`` (hub id or folder) into the new folder ``out`` and return the report.

    ``out`` is an ordinary Hugging Face folder with ``report.json`` beside the weights; it appears whole or
    not at all. ``recipe`` is a YAML file or a ``Recipe``; options win over it.

    Raises:
        UserError: anything that the user can mend, before a weight is loaded where possible.
    """
    processes, phases, progress = Processes(), Phases(), progress or Quiet()
    with phases("plan"):
        job = prepare(model, Recipe.of(recipe, options))
        writer = Writer(job.checkpoint, out, overwrite)
    with phases("calibration text"):
        text = _calibrate(job) if job.solver.statistics else None
    with phases("hash"):
        identity = _identity(job, text)
    if processes.is_main:
        writer.begin(identity, resume)
    writer.finished = processes.first(writer.finished)
    records = _prune_blocks(job, text, writer, processes, phases, progress)
    report = _report(job, str(model), writer, identity, text, records, phases)
    if processes.is_main:
        writer.copy(sorted(set(job.checkpoint.names()) - _written(job)))
        writer.finish(report)
    return report


prune.__signature__ = with_options(prune)  # type: ignore[attr-defined]


def _calibrate(job: Job) -> Calibration:
    from transformers import AutoTokenizer

    recipe = job.recipe
    assert recipe.samples and recipe.sequence_length
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            job.checkpoint.folder, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{job.checkpoint.folder} has no usable tokenizer: {str(error).splitlines()[0]}"
        ) from error
    return calibrate(
        recipe.calibration, tokenizer, samples=recipe.samples, sequence_length=recipe.sequence_length,
        seed=recipe.seed, token=recipe.token, cache_dir=recipe.cache_dir, vocab_size=job.skeleton.config.vocab_size,
    )  # fmt: skip


def _identity(job: Job, text: Calibration | None) -> dict[str, Any]:
    """What must be equal for a resumed run to give the same bytes."""
    result = job.recipe.as_dict()
    for free in ("batch_size", "offload", "cache_dir"):  # these never change the result
        result.pop(free)
    return {
        **result,
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "source": job.checkpoint.sha256(),
        "tokens_sha256": text.sha256 if text else None,
    }


def _written(job: Job) -> set[str]:
    """Disk tensors that the block loop writes itself."""
    return {name for block in range(len(job.skeleton.blocks)) for name in _block_tensors(job, block)} | {
        w.source for w in job.weights
    }


def _block_tensors(job: Job, index: int) -> list[str]:
    prefix = f"{job.skeleton.block_path}.{index}."
    return [name for p, parts in job.skeleton.sources.items() if p.startswith(prefix) for name, _ in parts]


def _prune_blocks(
    job: Job, text: Calibration | None, writer: Writer, processes: Processes, phases: Phases, progress: Any
) -> list[dict[str, Any]]:
    """Solve and write every block in order; finished ones are replayed, forward only."""
    if text is None:
        return _prune_without_data(job, writer, processes, phases, progress)
    stream = BlockStream(
        job.skeleton, processes.share(text.windows), job.dtype, job.device,
        batch_size=_batch_size(job), offload=job.recipe.offload,
    )  # fmt: skip
    try:
        return _stream_blocks(job, stream, writer, processes, phases, progress)
    finally:
        stream.hidden.close()


def _stream_blocks(
    job: Job, stream: BlockStream, writer: Writer, processes: Processes, phases: Phases, progress: Any
) -> list[dict[str, Any]]:
    path, count = job.skeleton.block_path, len(job.skeleton.blocks)
    stream.reader = lambda index: (
        writer if f"{path}.{index}" in writer.finished and processes.is_main else None
    )
    records: list[dict[str, Any]] = []
    progress.start("pruning", count)
    for block in _timed(stream, phases):
        record = writer.finished.get(block.name)
        if record is None:
            record = _prune_block(job, block, writer, processes, phases)
        elif processes.count > 1:
            _spread(block, processes)
        records += record
        with phases("forward"):
            if block.index + 1 < count or job.weights[-1].block is None:
                block.run()
        progress.advance("pruning", _detail(record))
    outside = [w for w in job.weights if w.block is None]
    if outside:
        kinds = dict.fromkeys((w.name for w in outside), job.solver.statistics)
        with phases("observe"):
            observer = stream.observe_outside(kinds, outside)
            processes.merge(observer, kinds)
        records += _solve_and_write(job, outside, observer, {}, writer, processes, phases, [])
    phases.facts["batch_size"] = stream.batch_size
    return records


def _prune_without_data(
    job: Job, writer: Writer, processes: Processes, phases: Phases, progress: Any
) -> list[dict[str, Any]]:
    """A data-free solver needs no forward pass: weights are read, solved and written block by block."""
    path = job.skeleton.block_path
    records: list[dict[str, Any]] = []
    blocks = [*range(len(job.skeleton.blocks)), *([None] if job.weights[-1].block is None else [])]
    progress.start("pruning", len(blocks))
    for index in blocks:
        name = f"{path}.{index}"
        record = writer.finished.get(name)
        if record is None:
            weights = [w for w in job.weights if w.block == index]
            names = [] if index is None else _block_tensors(job, index)
            record = _solve_and_write(job, weights, None, {}, writer, processes, phases, names)
            if processes.is_main:
                writer.finish_block(name, record)
        records += record
        job.checkpoint.close()
        progress.advance("pruning", _detail(record))
    return records


def _timed(stream: BlockStream, phases: Phases) -> Any:
    """Iterate over the blocks, booking what reading them takes."""
    blocks = iter(stream)
    while True:
        with phases("read"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _prune_block(
    job: Job, block: Block, writer: Writer, processes: Processes, phases: Phases
) -> list[dict[str, Any]]:
    weights = [w for w in block.weights if w.name in job.patterns]
    kinds = dict.fromkeys((w.name for w in weights), job.solver.statistics)
    with phases("observe"):
        observer = block.observe(kinds)
        processes.merge(observer, kinds)
    names = _block_tensors(job, block.index)
    record = _solve_and_write(job, weights, observer, block.views, writer, processes, phases, names)
    if processes.is_main:
        writer.finish_block(block.name, record)
    return record


def _solve_and_write(
    job: Job, weights: list[Weight], observer: Observer | None, views: dict[str, Tensor], writer: Writer,
    processes: Processes, phases: Phases, others: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Solve ``weights`` from the source's own values, put the results into the model and on the disk."""
    disk: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    leaders = {w.name: (observer.shared.get(w.name, w.name) if observer else w.name) for w in weights}
    order = {leader: number for number, leader in enumerate(dict.fromkeys(leaders.values()))}
    for weight in weights:
        if weight.source not in disk:
            disk[weight.source] = job.checkpoint.tensor(weight.source).clone()
        stored = weight.stored(disk[weight.source])
        owner = order[leaders[weight.name]] % processes.count
        record = None
        with phases("solve"):
            if processes.rank == owner:
                statistics = observer.statistics.get(leaders[weight.name]) if observer else None
                record = _solve(job, weight, stored, statistics)
            if processes.count > 1:
                record = processes.gather(record)[owner]
                stored.copy_(processes.broadcast(stored.contiguous().to(job.device), owner))
        assert record is not None
        records.append(record)
        if weight.name in views:
            views[weight.name].copy_(stored)
    with phases("write"):
        if processes.is_main:
            writer.write(disk)
            writer.copy(name for name in others if name not in disk)
    return records


def _solve(job: Job, weight: Weight, stored: Tensor, statistics: Any) -> dict[str, Any]:
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
            notes["warning"] = (
                f"saw {statistics.tokens} tokens for {weight.in_features} inputs; use more calibration text"
            )
        solution = job.solver(dense, statistics, pattern)
    stored.copy_(solution.weight)
    pruned = stored.masked_select(~solution.mask.to(stored.device))
    if bool(pruned.count_nonzero()) or bool(torch.signbit(pruned).any()):
        raise RuntimeError(f"{weight.name}: pruned weights are not +0.0 after the cast to {stored.dtype}")
    if not bool(torch.isfinite(stored).all()):
        raise UserError(
            f"{weight.name}: the solved weights are not finite in {stored.dtype}; use other calibration text"
        )
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


def _spread(block: Block, processes: Processes) -> None:
    """Give every process the main one's finished weights of this block."""
    for parameter in block.module.parameters():
        processes.broadcast(parameter.data, 0)


def _batch_size(job: Job) -> int:
    if job.recipe.batch_size != "auto":
        return int(job.recipe.batch_size)
    return 1 if job.device.type == "cpu" else 16  # a CPU gains nothing from more than one window


def _detail(record: list[dict[str, Any]]) -> str:
    errors = [entry["error"] for entry in record if entry["error"] is not None]
    return f"error {sum(errors) / len(errors):.4f}" if errors else ""


def _report(
    job: Job, model: str, writer: Writer, identity: dict[str, Any], text: Calibration | None,
    records: list[dict[str, Any]], phases: Phases,
) -> dict[str, Any]:  # fmt: skip
    calibration = None
    if text is not None:
        calibration = {
            "source": job.recipe.calibration,
            "samples": int(text.windows.shape[0]),
            "sequence_length": int(text.windows.shape[1]),
            "tokens_sha256": text.sha256,
            "sources": text.sources,
        }
    return {
        "model": model,
        "out": str(writer.out),
        "versions": versions(),
        "options": {
            **job.recipe.as_dict(),
            "dtype": identity["dtype"],
            "device": str(job.device),
            **phases.facts,
        },
        "source_files": identity["source"],
        "calibration": calibration,
        "seconds": phases.seconds,
        "peak_memory": phases.peak,
        "coverage": job.coverage(),
        "weights": records,
        "warnings": [f"{r['name']} {r['warning']}" for r in records if "warning" in r],
    }
