"""Prune a checkpoint block by block: the program in one function, `prune`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsparse import gridfile
from llmsparse.allocate import allocate, tell
from llmsparse.block import Block
from llmsparse.calibration import Calibration
from llmsparse.errors import UserError
from llmsparse.heap import return_freed_memory
from llmsparse.plan import prepare
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.push import may_push
from llmsparse.push import push as publish
from llmsparse.recipe import Recipe, with_options
from llmsparse.report import Phases, versions
from llmsparse.sampling import text_of
from llmsparse.shrink import shrink
from llmsparse.solving import solve_block
from llmsparse.stages import staged
from llmsparse.stream import BlockStream
from llmsparse.work import Work
from llmsparse.writer import Writer


def prune(
    model: str | Path, out: str | Path, *, recipe: Any = None, resume: bool = False, overwrite: bool = False,
    push: str | None = None, progress: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Prune ``model`` (hub id or folder) into the new folder ``out`` and return the report.

    ``out`` is an ordinary Hugging Face folder with ``report.json`` beside the weights; it appears whole or
    not at all. ``recipe`` is a YAML file or a ``Recipe``; options win over it. ``solver`` and ``pattern`` may
    also be objects that satisfy the protocols of ``llmsparse.solvers`` and ``llmsparse.pattern``. ``push``: the hub
    repository that ``out`` is then published in, see ``llmsparse.push``; the report then has ``push``, what that returned.

    Raises:
        UserError: anything that the user can mend, before a weight is loaded where possible.
    """
    progress = progress or Quiet()
    job = prepare(model, Recipe.of(recipe, options))
    if push is not None:
        may_push(push, job.recipe.token)
    processes = Processes(job.recipe.device)
    Writer(job.checkpoint, out, overwrite).refuse_interrupted(resume)
    smaller = shrink(job, out, processes, resume, progress)
    job = smaller.job
    job.device = processes.device(job.device)
    phases = Phases(job.device, progress.now)
    writer = Writer(job.checkpoint, out, overwrite, job.beside())
    work = Work(job, writer, processes, phases, progress)
    progress.start("reading text", 1)
    with work.phases("calibration text"):
        text = text_of(job, processes, progress)
    progress.advance("reading text")
    work = staged(work, text, resume)
    progress.start("pruning", len(work.job.skeleton.blocks))
    work.begin(text, resume)
    allocation = allocate(work, text)
    calibrated = text is not None and work.job.solver.statistics is not None
    records = _with_data(work, text) if calibrated else _without_data(work)  # type: ignore[arg-type]
    report = smaller.complete(_report(work, str(model), text, records))
    if allocation is not None:
        tell(allocation, report)
    work.finish(report)
    smaller.clean()
    if push is not None and processes.is_main:
        report["push"] = _published(out, push, job.recipe.token, progress)
    return report


prune.__signature__ = with_options(prune)  # type: ignore[attr-defined]


def _published(out: str | Path, repo: str, token: str | None, progress: Any) -> dict[str, Any]:
    try:
        return publish(out, repo, token=token, progress=progress)
    except UserError as error:
        raise UserError(
            f"{out} is written, but not pushed: {error}; go on with `llmsparse push {out} {repo}`"
        ) from error


def _with_data(work: Work, text: Calibration) -> list[dict[str, Any]]:
    """Solve and write every block in order; finished ones are replayed, forward only."""
    with work.stream(work.processes.share(text.windows)) as stream:
        if work.job.follows_dense:
            stream.follow_dense()
        return _with_stream(work, stream)


def _with_stream(work: Work, stream: BlockStream) -> list[dict[str, Any]]:
    job, finished, main = work.job, work.writer.finished, work.processes.is_main
    path = job.skeleton.block_path
    stream.reader = lambda index: work.writer if f"{path}.{index}" in finished and main else None
    records: list[dict[str, Any]] = []
    for block in _timed(stream, work.phases):
        record = finished.get(block.name)
        if record is None:
            record = solve_block(work, block)
        else:
            with work.phases("forward"):
                work.spread(block.module)
                block.run()
        records += record
        work.progress.advance("pruning")
    if outside := [w for w in job.weights if w.block is None]:
        desk = work.desk(outside, {})
        with work.phases("forward"):
            stream.settle_outside(outside, desk.kinds, desk.solve, work.processes)
        records += desk.finish("outside", [])
    return records


def _without_data(work: Work) -> list[dict[str, Any]]:
    """A data-free solver needs no forward pass: weights are read, solved and written block by block."""
    job = work.job
    records: list[dict[str, Any]] = []
    for index in [*range(len(job.skeleton.blocks)), None]:
        name = "outside" if index is None else f"{job.skeleton.block_path}.{index}"
        record = work.writer.finished.get(name)
        if record is None:
            desk = work.desk([w for w in job.weights if w.block == index], {})
            record = desk.finish(name, [] if index is None else job.tensors(index))
        records += record
        job.checkpoint.close()
        return_freed_memory()
        if index is not None:
            work.progress.advance("pruning")
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


def _report(
    work: Work, model: str, text: Calibration | None, records: list[dict[str, Any]]
) -> dict[str, Any]:
    job = work.job
    warnings = [f"{r['name']} {r['warning']}" for r in records if "warning" in r]
    if job.skeleton.unrecognised:
        names = ", ".join(job.skeleton.unrecognised[:3])
        warnings.append(
            f"left as they are, not linear weights: {len(job.skeleton.unrecognised)} such as {names}"
        )
    grid = (
        {"grid": gridfile.described(job.grid, job.recipe.embeddings or "int8", job.checkpoint.stored_dtype)}
        if job.grid
        else {}
    )
    return {
        "model": model,
        "commit": job.source.commit,
        "out": str(work.writer.out),
        **grid,
        "versions": versions(),
        "options": {
            **job.recipe.as_dict(),
            "dtype": str(job.dtype).removeprefix("torch."),
            "device": str(job.device),
            "processes": work.processes.count,
            **work.phases.facts,
        },
        "source_files": work.source,
        "calibration": None
        if text is None
        else {
            "source": job.recipe.calibration,
            "samples": int(text.windows.shape[0]),
            "sequence_length": int(text.windows.shape[1]),
            "tokens_sha256": text.sha256,
            "sources": text.sources,
        },
        "seconds": work.phases.seconds,
        "peak_memory": work.phases.peak,
        "coverage": job.coverage(),
        **work.stages,
        "weights": records,
        "tables": [],
        "warnings": warnings,
    }
