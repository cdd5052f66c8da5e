"""Prune a checkpoint block by block: the program in one function, `prune`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsparse.calibration import Calibration, calibrate
from llmsparse.errors import UserError
from llmsparse.plan import Job, prepare
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.recipe import Recipe, with_options
from llmsparse.report import Phases, versions
from llmsparse.stream import Block, BlockStream
from llmsparse.work import Work
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
    return {name for block in range(len(job.skeleton.blocks)) for name in _tensors(job, block)} | {
        w.source for w in job.weights
    }


def _tensors(job: Job, index: int) -> list[str]:
    prefix = f"{job.skeleton.block_path}.{index}."
    return [name for p, parts in job.skeleton.sources.items() if p.startswith(prefix) for name, _ in parts]


def _prune_blocks(
    job: Job, text: Calibration | None, writer: Writer, processes: Processes, phases: Phases, progress: Any
) -> list[dict[str, Any]]:
    """Solve and write every block in order; finished ones are replayed, forward only."""
    work = Work(job, writer, processes, phases)
    progress.start("pruning", len(job.skeleton.blocks))
    if text is None:
        return _without_data(work, progress)
    tokens = 2048 if job.device.type == "cpu" else 32768  # a pass; more gain nothing there
    batch = max(1, tokens // text.windows.shape[1])
    stream = BlockStream(
        job.skeleton, processes.share(text.windows), job.dtype, job.device,
        batch_size=batch if job.recipe.batch_size == "auto" else int(job.recipe.batch_size), offload=job.recipe.offload,
    )  # fmt: skip
    try:
        return _with_stream(work, stream, progress)
    finally:
        stream.hidden.close()
        phases.facts["batch_size"] = stream.batch_size


def _with_stream(work: Work, stream: BlockStream, progress: Any) -> list[dict[str, Any]]:
    job, finished, main = work.job, work.writer.finished, work.processes.is_main
    path = job.skeleton.block_path
    stream.reader = lambda index: work.writer if f"{path}.{index}" in finished and main else None
    records: list[dict[str, Any]] = []
    for block in _timed(stream, work.phases):
        record = finished.get(block.name)
        with work.phases("forward"):
            if record is None:
                weights = [w for w in block.weights if w.name in job.patterns]
                desk = work.desk(weights, block.views)
                block.settle(desk.kinds, desk.solve, work.processes)
                record = desk.finish(block.name, _tensors(job, block.index))
            else:
                if work.processes.count > 1:
                    work.spread(block.module)
                block.run()
        records += record
        progress.advance("pruning", _detail(record))
    if outside := [w for w in job.weights if w.block is None]:
        desk = work.desk(outside, {})
        with work.phases("forward"):
            stream.settle_outside(outside, desk.kinds, desk.solve, work.processes)
        records += desk.finish("outside", [])
    return records


def _without_data(work: Work, progress: Any) -> list[dict[str, Any]]:
    """A data-free solver needs no forward pass: weights are read, solved and written block by block."""
    job = work.job
    records: list[dict[str, Any]] = []
    for index in [*range(len(job.skeleton.blocks)), None]:
        name = "outside" if index is None else f"{job.skeleton.block_path}.{index}"
        record = work.writer.finished.get(name)
        if record is None:
            desk = work.desk([w for w in job.weights if w.block == index], {})
            record = desk.finish(name, [] if index is None else _tensors(job, index))
        records += record
        job.checkpoint.close()
        if index is not None:
            progress.advance("pruning")
    return records


def _timed(stream: BlockStream, phases: Phases) -> Iterator[Block]:
    """Iterate over the blocks, booking what reading them takes."""
    blocks = iter(stream)
    while True:
        with phases("read"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


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
