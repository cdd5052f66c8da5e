"""Make a model smaller before it is pruned: each step writes an ordinary checkpoint that the next one reads."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.calibration import Calibration
from llmsparse.checkpoint import Checkpoint
from llmsparse.drop import choose
from llmsparse.errors import UserError
from llmsparse.narrow import narrow
from llmsparse.narrowing import narrowing
from llmsparse.outline import Outline, origin, renumbered, shallower
from llmsparse.plan import Job, prepare
from llmsparse.processes import Processes
from llmsparse.publication import REPORT
from llmsparse.recipe import Recipe
from llmsparse.report import Phases, versions
from llmsparse.sampling import text_of
from llmsparse.shrinking import KINDS, Depth, Shrink, Width
from llmsparse.skeleton import Skeleton
from llmsparse.stream import BlockStream
from llmsparse.work import Work
from llmsparse.writer import Writer

RUN = (  # what of a recipe says how a model is calibrated and run, and not what is done to it
    "calibration", "samples", "sequence_length", "seed", "device", "dtype", "batch_size", "offload", "trust_remote_code",
    "token", "cache_dir",
)  # fmt: skip
ALIKE = 1e-3  # how far what was written may be from what was meant in float32, relative to it
ALIKE_16 = 0.1  # the same in 16 bits


@dataclass
class Staged:
    """``job`` is what is left to do; ``facts`` and ``sections`` go to the report, ``folders`` are to be removed."""

    job: Job
    facts: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)
    folders: tuple[Path, ...] = ()

    def complete(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a run on what lies between, as one on the model that was given."""
        if not self.sections:
            return report
        seconds = {str(section["pattern"]): section["seconds"] for section in self.sections}
        peaks = {str(section["pattern"]): section["peak_memory"] for section in self.sections}
        return {
            **report,
            **self.facts,
            "smaller": self.sections,
            "seconds": {**seconds, **report["seconds"]},
            "peak_memory": {**peaks, **report["peak_memory"]},
        }

    def clean(self) -> None:
        """Remove the checkpoints between, and what an earlier run left of them."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def shrink(job: Job, out: str | Path, processes: Processes, resume: bool, progress: Any) -> Staged:
    """Do what ``job`` asks for to make its model smaller; ``job`` itself where it asks for nothing.

    The checkpoints between lie beside ``out``. With ``resume`` one that an interrupted run finished is used again where it
    is of the same options, source and text; one that was cut off is done anew.
    """
    out = Path(out).expanduser().absolute()
    between = {name: out.with_name(f".{out.name}.llmsparse-{name}") for name in KINDS.values()}
    cut_off = [folder.with_name(f".{folder.name}.llmsparse-work") for folder in between.values()]
    folders = (*between.values(), *cut_off) if processes.is_main else ()
    checkpoint = root = origin(job.checkpoint)
    sections = []
    for pattern in job.shrinks:
        step = Step(
            pattern, _plain(checkpoint, job.recipe), between[KINDS[type(pattern)]], processes, progress
        )
        sections.append(step.run(resume))
        checkpoint = Checkpoint(step.folder)
    if not sections:
        return Staged(job, folders=folders)
    sources = [section.pop("source_files") for section in sections]
    facts = {"commit": root.commit, "source_files": sources[0]}
    return Staged(prepare(checkpoint.folder, job.recipe, smaller=True), facts, sections, folders)


def _plain(checkpoint: Checkpoint, recipe: Recipe) -> Job:
    """A job on every weight of ``checkpoint``: how it is calibrated and run, and that nothing is in the way of it."""
    return prepare(checkpoint.folder, Recipe(**{name: getattr(recipe, name) for name in RUN}))


@dataclass
class Step:
    """One pattern that makes the checkpoint of ``job`` smaller, into ``folder``."""

    pattern: Shrink
    job: Job
    folder: Path
    processes: Processes
    progress: Any
    outline: Outline = field(init=False)  # of what is written, from the moment that it is known
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        self.job.device = self.processes.device(self.job.device)
        self.phases = Phases(self.job.device, self.progress.now)

    def run(self, resume: bool) -> dict[str, Any]:
        """Write ``folder`` unless it lies there already; what was done."""
        text = text_of(self.job, self.processes, self.progress)
        assert text is not None
        main, checkpoint = self.processes.is_main, self.job.checkpoint
        source = self.processes.first(self.processes.together(lambda: checkpoint.sha256() if main else {}))
        fingerprint = {
            **self.job.identity(),
            "pattern": repr(self.pattern),
            "processes": self.processes.count,
            "source": source,
            "tokens_sha256": text.sha256,
            "versions": versions(),
        }
        found = self.processes.first(self._finished(fingerprint) if resume and main else None)
        if found is None:
            with self.phases(str(self.pattern)):
                found = (self._narrow if isinstance(self.pattern, Width) else self._drop)(text, fingerprint)
            found |= {"tokens_sha256": text.sha256, "source_files": source}
            found |= {
                "seconds": self._booked(self.phases.seconds),
                "peak_memory": self._booked(self.phases.peak),
            }
            report = {"fingerprint": fingerprint, "section": found}
            self.processes.together(lambda: self.writer.finish(report) if main else None)
        return found

    def _finished(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """What an earlier run did, where it finished this very step."""
        try:
            found = json.loads((self.folder / REPORT).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        same = found["fingerprint"] == json.loads(json.dumps(fingerprint))
        return found["section"] if same else None

    def _narrow(self, text: Calibration, fingerprint: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(self.pattern, Width)
        job, width = self.job, self.pattern
        narrower = narrowing(job.checkpoint, width, job.recipe.trust_remote_code)
        self._open(narrower.outline, fingerprint)
        work = Work(job, self.writer, self.processes, self.phases, self.progress)
        self.progress.start("narrowing", len(job.skeleton.blocks))
        windows = self.processes.share(text.windows)
        records, states = narrow(work, windows, narrower, width)
        if self.processes.is_main:
            inside = {name for index in range(len(job.skeleton.blocks)) for name in job.tensors(index)}
            self.writer.copy(name for name in job.checkpoint.names() if name not in inside)
        self._close(windows[:1], states)
        options = {"score": width.score, "compensation": width.compensation}
        return {"pattern": str(width), **options, **self._sizes(), **narrower.facts, "cuts": records}

    def _drop(self, text: Calibration, fingerprint: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(self.pattern, Depth)
        job, count = self.job, len(self.job.skeleton.blocks)
        windows = text.windows[: self.pattern.windows]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        dropped = choose(job, windows, self.pattern.blocks, self.folder.parent, self.progress)
        gone = self.processes.first(dropped.blocks)
        self._open(shallower(job.checkpoint, job.skeleton, gone), fingerprint)
        if self.processes.is_main:
            kept = [index for index in range(count) if index not in gone]
            for name in job.checkpoint.names():
                if new := renumbered(job.skeleton, name, kept):
                    self.writer.write({new: job.checkpoint.tensor(name)})
        self._close(windows[:1], dropped.states)
        path = job.skeleton.block_path
        found = zip(gone, self.processes.first(dropped.divergences), strict=True)
        blocks = [{"name": f"{path}.{index}", "kl": divergence} for index, divergence in found]
        sizes = {**self._sizes(), "blocks": [count, count - len(gone)], "windows": len(windows)}
        return {"pattern": str(self.pattern), **sizes, "dropped": blocks}

    def _open(self, outline: Outline, fingerprint: dict[str, Any]) -> None:
        """Begin to write; what lies there is of another run, or was cut off."""
        self.outline = outline
        self.writer = Writer(outline, self.folder, overwrite=True)
        begin = self.writer.begin
        self.processes.together(lambda: begin(fingerprint, resume=False) if self.processes.is_main else None)

    def _close(self, window: Tensor, states: Tensor) -> None:
        """Complete the folder, and see that it computes what was meant."""

        def act() -> None:
            self.writer.prepare_to_finish({})
            self.outline.write_config(self.writer.work)
            try:
                _compare(self.writer.work, self.job, window, states)
            except UserError:
                shutil.rmtree(self.writer.work)
                raise

        self.processes.together(lambda: act() if self.processes.is_main else None)

    def _sizes(self) -> dict[str, Any]:
        return {"parameters": [_parameters(self.job.checkpoint), _parameters(self.outline)]}

    def _booked(self, by_phase: dict[str, Any]) -> Any:
        return by_phase.get(str(self.pattern), 0)


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.bytes(name) // checkpoint.dtype(name).itemsize for name in checkpoint.names())


def _compare(folder: Path, job: Job, window: Tensor, expected: Tensor) -> None:
    """Run what was written on one ``window``: its last block must put out what the blocks that it was made of did.

    A layout of rows that is not what their names stand for, or a class that counts its blocks, shows here.
    """
    skeleton = Skeleton(Checkpoint(folder), job.dtype, job.recipe.trust_remote_code)
    stream = BlockStream(skeleton, window, job.dtype, job.device)
    try:
        for block in stream:
            block.run()
        found, expected = stream.hidden.read(range(1)).double(), expected.to(job.device).double()
    finally:
        stream.close()
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= (ALIKE if job.dtype == torch.float32 else ALIKE_16):
        raise UserError(
            f"{skeleton.config.model_type} cannot be made smaller: the model that was written computes something else than "
            f"was meant (it is {apart:.2g} of its outputs away)"
        )
