"""Other checkpoints that are made of the source before it is pruned, each in a folder beside OUT."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsparse.calibration import Calibration
from llmsparse.permute import permute
from llmsparse.plan import Job, prepare
from llmsparse.work import Work
from llmsparse.writer import Writer, interrupted, refuse_another

Stage = Callable[[Work, Calibration | None], dict[str, Any]]  # writes every block; what the report says of it


def asked(job: Job) -> dict[str, Stage]:
    """The stages of a run in their order, by the names that they have in its report."""
    return {"permutation": permute} if job.recipe.permute else {}


def staged(work: Work, text: Calibration | None, resume: bool) -> Work:
    """The same work on what the stages that the run asks for made of the source; ``work`` itself where it asks for none.

    A stage's folder is there whole or not at all, and goes when OUT has come; an interrupted run takes it as it is.

    Raises:
        UserError: an interrupted run is in the way, or differs.
    """
    for name, stage in asked(work.job).items():
        work = _after(work, name, stage, text, resume)
    return work


def _after(work: Work, name: str, stage: Stage, text: Calibration | None, resume: bool) -> Work:
    out, processes = work.writer.out, work.processes
    folder = work.stage_folder(name)
    with work.phases("hash"):
        fingerprint = work.fingerprint(text)
    found = processes.together(lambda: _finished(work, folder, fingerprint, resume) if work.main else None)
    record = processes.first(found)
    if record is None:
        inner = replace(work, writer=Writer(work.job.checkpoint, folder, work.writer.overwrite))
        inner.begin(text, resume)
        record = processes.first(stage(inner, text))
        processes.together(lambda: _finish(inner, fingerprint, record) if work.main else None)
    work.job.checkpoint.close()
    job = prepare(folder, work.job.recipe, smaller=True)
    job.device, job.origin = work.job.device, work.job.source
    writer = Writer(job.checkpoint, out, work.writer.overwrite, job.beside())
    return replace(work, job=job, writer=writer, stages={**work.stages, name: record})


def _finished(work: Work, folder: Path, fingerprint: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """What the stage told when an earlier, interrupted run finished it."""
    report = folder / "report.json"
    if not report.is_file():
        return None
    if resume:
        found = json.loads(report.read_text())
        refuse_another(found["fingerprint"], fingerprint)
        return found["record"]
    if not work.writer.overwrite:
        raise interrupted(work.writer.out)
    shutil.rmtree(folder)
    return None


def _finish(work: Work, fingerprint: dict[str, Any], record: dict[str, Any]) -> None:
    """Copy what no block holds, and let the folder appear."""
    job, report = work.job, {"fingerprint": fingerprint, "record": record}
    inside = {name for index in range(len(job.skeleton.blocks)) for name in job.tensors(index)}
    work.writer.copy(sorted(set(job.checkpoint.names()) - inside))
    work.writer.prepare_to_finish(report)
    work.writer.finish(report)
