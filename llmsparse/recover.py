"""Recover what pruning cost: train a sparse model on its dense parent's distributions, its zeros held."""

import re
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmsparse import gridfile, heap, recovered
from llmsparse.apart import Text, held_apart, held_of
from llmsparse.calibration import SELF, Calibration, calibrate, parse_sources
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError
from llmsparse.eval.models import check_same_vocabulary, load_model
from llmsparse.extent import Extent, extent_of
from llmsparse.extras import Extra, require
from llmsparse.grid import Grid
from llmsparse.parentage import Ancestry, ancestry, between, kept_blocks
from llmsparse.plan import check_length
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.recipe import with_options
from llmsparse.recovery import FREE, Recovery
from llmsparse.report import Phases, versions
from llmsparse.sampling import Sampler, Sampling
from llmsparse.skeleton import Skeleton
from llmsparse.student import MASTERS, Student
from llmsparse.teacher import Beside, Teacher, Written
from llmsparse.training import NotFinite, Setting, Training
from llmsparse.writer import Writer, disk_errors

TORCHAO = Extra("train", {"torchao": "0.18"})
WRITTEN = 32  # windows that a teacher writes at once
TEXT, NOTES = (
    "text.pt",
    "teacher",
)  # in the work folder: what the teacher wrote, and what it says of every window


def recover(
    sparse: str | Path, out: str | Path, *, resume: bool = False, overwrite: bool = False, progress: Any = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train the kept weights of ``sparse`` (hub id or folder) towards its dense parent; write the new folder ``out``.

    Distillation: the loss is the KL divergence from the teacher's next-token distribution, so that any text will do.
    ``out`` holds the weights that were the best on text that was held out; it is an ordinary folder with the zeros of
    ``sparse`` (or, spliced, as many), and its report has the course of the run under ``recovery``. Returns the report.

    Raises:
        UserError: anything that the user can mend, before a weight is loaded where possible.
    """
    return Run.prepare(str(sparse), Recovery.of(options), progress or Quiet()).go(out, resume, overwrite)


recover.__signature__ = with_options(recover, (), Recovery)  # type: ignore[attr-defined]


@dataclass
class Run:
    """A checked recovery of the model ``name``, of the checkpoint ``sparse``, with ``teacher``."""

    name: str
    options: Recovery
    sparse: Checkpoint
    teacher: Checkpoint
    ancestry: Ancestry
    device: torch.device
    dtype: torch.dtype  # of matrix products
    processes: Processes
    phases: Phases
    progress: Any
    between: list[dict[str, Any]] = field(
        default_factory=list
    )  # what made the student smaller than the teacher

    @classmethod
    def prepare(cls, name: str, options: Recovery, progress: Any) -> "Run":
        """Everything that needs no weight and no text is decided and refused here."""
        trust, device = options.trust_remote_code, pick_device(options.device)
        if options.values is not None and Grid.parse(options.values).bits == 3:
            raise UserError(
                f"--values {options.values} is there to compare with; use int8, int4:32 or int4:64"
            )
        if options.optimizer == "adamw8bit":
            require("--optimizer adamw8bit", TORCHAO, TORCHAO.packages)
        sparse = Checkpoint.open(name, None, options.token, options.cache_dir)
        if sparse.is_packed:
            raise UserError(f"{name} is packed; recover the folder that it was exported from")
        found = ancestry(sparse.folder)
        teacher = _teacher(name, options, found)
        check_same_vocabulary(sparse, teacher, sparse.tokenizer(trust), trust, "--teacher")
        processes = Processes(options.device)
        if options.batch % processes.count:
            raise UserError(f"--batch {options.batch} does not divide among {processes.count} processes")
        device = processes.device(device)
        dtype = dtype_of_products(options, sparse.stored_dtype, device)
        check_length(options.sequence_length, sparse.config(trust))
        options = replace(options, teacher=options.teacher or found.model)
        run = cls(
            name,
            options,
            sparse,
            teacher,
            found,
            device,
            dtype,
            processes,
            Phases(device, progress.now),
            progress,
        )
        run.between = between(run.skeleton, run.dense, found.smaller)
        return run

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(self.sparse, MASTERS[self.options.master], self.options.trust_remote_code)

    @cached_property
    def dense(self) -> Skeleton:
        return Skeleton(self.teacher, self.dtype, self.options.trust_remote_code)

    def go(self, out: str | Path, resume: bool, overwrite: bool) -> dict[str, Any]:
        """Read the text, train, and write."""
        Writer(self.sparse, out, overwrite).refuse_interrupted(resume)
        Writer.check_target(out, overwrite, self.teacher.folder)
        processes, main = self.processes, self.processes.is_main
        with self.phases("read"):
            extent = extent_of(self.skeleton, self.options, self.ancestry.report, bool(self.between))
        writer = Writer(self.sparse, out, overwrite, gridfile.beside(extent.quantised()))
        recovered.check_room(writer, extent, self.options)
        kept = writer.work / TEXT
        with self.phases("text"):
            text = processes.first(processes.together(lambda: self._text(kept, resume) if main else None))
        with self.phases("hash"):
            fingerprint = processes.first(
                processes.together(lambda: self._fingerprint(text) if main else None)
            )
        windows = held_apart(text.windows, text.source_of)
        recovered.check_room(writer, extent, self.options, windows.windows.numel())
        processes.together(lambda: self._begin(writer, fingerprint, text, resume) if main else None)
        teacher = self._teacher(writer.work / NOTES, windows)
        training = self._training(extent, teacher, windows, writer.work)
        with self.phases("train"), heap.kept():
            try:
                course = training.run()
            except NotFinite:
                if main:
                    shutil.rmtree(writer.work)  # it would not be otherwise the next time
                raise
        with self.phases("write"):
            report = recovered.report_of(self, writer, fingerprint, text, windows, course)
            processes.together(lambda: recovered.write(writer, training, report) if main else None)
        processes.together(lambda: self._end(writer, training, report) if main else None)
        processes.close()
        return report

    def _text(self, kept: Path, resume: bool) -> Calibration:
        """Windows to train on, and those that are held out besides; what the teacher wrote before is taken as it is."""
        if resume and kept.exists():
            return Calibration(**torch.load(kept, weights_only=True))
        options, trust = self.options, self.options.trust_remote_code
        count = options.windows + held_of(options.windows)
        sampler = Sampler(self.teacher, Sampling(), self.dtype, self.device, trust, WRITTEN, self.progress)
        try:
            return calibrate(
                options.data, self.sparse.tokenizer(trust), samples=count, sequence_length=options.sequence_length,
                seed=options.seed, token=options.token, cache_dir=options.cache_dir,
                vocab_size=self.skeleton.config.get_text_config().vocab_size, sampler=sampler,
                least=2,
            )  # fmt: skip
        except UserError as error:
            told = str(error).replace("--calibration", "--data").replace("raise --samples", "raise --tokens")
            raise UserError(
                re.sub(r"the largest --samples is (\d+)", r"it fills \1, and 2 is the least", told)
            ) from error

    def _begin(self, writer: Writer, fingerprint: dict[str, Any], text: Calibration, resume: bool) -> None:
        writer.begin(fingerprint, resume)
        kept = writer.work / TEXT
        if SELF in parse_sources(self.options.data) and not kept.exists():
            with disk_errors(kept):
                torch.save(text._asdict(), new := kept.with_suffix(".new"))
                new.rename(kept)

    def _fingerprint(self, text: Calibration) -> dict[str, Any]:
        options = {key: value for key, value in self.options.as_dict().items() if key not in FREE}
        return {
            **options,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.processes.count,
            "source": self.sparse.sha256(),
            "teacher_files": self.teacher.sha256(),
            "tokens_sha256": text.sha256,
            "versions": versions(),
        }

    def _teacher(self, notes: Path, text: Text) -> Teacher:
        """Beside the student, or as what it says of every window was written down in ``notes``."""

        def model() -> Any:
            return load_model(self.teacher, self.dtype, self.device, self.options.trust_remote_code)

        with self.phases("teacher"):
            if not self.options.top_k:
                loaded = model()
                blocks = loaded.get_submodule(self.dense.block_path)
                wanted = kept_blocks(self.dense, self.between) if self.options.hidden else []
                return Beside(loaded, text.windows, [blocks[i] for i in wanted])
            count = min(self.options.top_k, self.skeleton.config.get_text_config().vocab_size)
            written = Written(notes, text.windows, count, self.device, self.processes)
            if not written.is_whole:
                written.write(model(), self.progress)
            self.processes.gather(None)  # every process has written its part
            return written

    def _training(self, extent: Extent, teacher: Teacher, windows: Text, folder: Path) -> Training:
        with self.phases("read"):
            student = Student(extent, self.options, self.device)
            if self.options.checkpointing:
                recompute(student.model)
        return Training(student, teacher, windows, Setting(self.dtype, self.processes, folder, self.progress))

    def _end(self, writer: Writer, training: Training, report: dict[str, Any]) -> None:
        """What only the run needed goes, and OUT appears."""
        training.clean()
        (writer.work / TEXT).unlink(missing_ok=True)
        shutil.rmtree(writer.work / NOTES, ignore_errors=True)
        writer.finish(report)


def _teacher(name: str, options: Recovery, found: Ancestry) -> Checkpoint:
    """What --teacher names, else the dense model that the reports lead to."""
    if options.teacher is not None:
        return Checkpoint.open(options.teacher, None, options.token, options.cache_dir)
    if not found.model:
        raise UserError(f"{name} has no report that names its dense model; give it with --teacher")
    try:
        return Checkpoint.open(found.model, found.commit, options.token, options.cache_dir)
    except UserError as error:
        raise UserError(
            f"the report of {name} names {found.model}: {error}; give it with --teacher"
        ) from error


def recompute(model: Any) -> None:
    """Let blocks forget their activations and compute them again; what else training mode would do is turned off."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # transformers 5.17 has the second name alone
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, float) and "drop" in name:
                    setattr(holder, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def dtype_of_products(options: Recovery, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """As for forward passes, the masters' where those are 16 bits wide; float16, whose gradients vanish, is none.

    Raises:
        UserError: it was asked for and cannot be had.
    """
    asked, native = options.dtype, device.type != "cuda" or torch.cuda.is_bf16_supported()
    if asked == "float16":
        raise UserError("--dtype float16: gradients vanish in it; use auto, bfloat16 or float32")
    if options.master == "bfloat16" and asked not in ("auto", "bfloat16"):
        raise UserError(f"--dtype {asked}: --master bfloat16 multiplies in bfloat16; use auto")
    if "bfloat16" in (asked, options.master):
        if not native:
            raise UserError("this GPU does not multiply in bfloat16; use --dtype float32 --master float32")
        return torch.bfloat16
    found = forward_dtype(asked, torch.bfloat16 if stored == torch.float16 else stored, device)
    return found if native else torch.float32
