"""Recover what pruning cost: train a sparse model on its dense parent's distributions, its zeros held."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmsparse import gridfile
from llmsparse.apart import Text, held_apart, held_of
from llmsparse.calibration import Calibration, calibrate
from llmsparse.checkpoint import Checkpoint
from llmsparse.course import Course
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError
from llmsparse.eval.models import check_same_vocabulary, load_model
from llmsparse.extras import Extra, require
from llmsparse.parentage import check_parent, kept_blocks, report_of
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.recipe import with_options
from llmsparse.recovery import FREE, Recovery
from llmsparse.report import Phases, versions
from llmsparse.sampling import Sampler, Sampling
from llmsparse.skeleton import Skeleton
from llmsparse.student import TABLES, Student
from llmsparse.teacher import Beside, Teacher, Written
from llmsparse.training import Training
from llmsparse.writer import Writer

TORCHAO = Extra("train", {"torchao": "0.18"})
WRITTEN = 32  # windows that a teacher writes at once


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
    return Run.prepare(sparse, Recovery.of(options), progress or Quiet()).go(out, resume, overwrite)


recover.__signature__ = with_options(recover, (), Recovery)  # type: ignore[attr-defined]


@dataclass
class Run:
    """A checked recovery of ``sparse`` with ``teacher``."""

    options: Recovery
    sparse: Checkpoint
    teacher: Checkpoint
    skeleton: Skeleton
    dense: Skeleton  # of the teacher
    report: dict[str, Any]  # of the run that made SPARSE
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    phases: Phases
    progress: Any

    @classmethod
    def prepare(cls, sparse: str | Path, options: Recovery, progress: Any) -> "Run":
        """Everything that needs no weight and no text is decided and refused here."""
        trust, device = options.trust_remote_code, pick_device(options.device)
        if options.optimizer == "adamw8bit":
            require("--optimizer adamw8bit", TORCHAO, TORCHAO.packages)
        checkpoint = Checkpoint.open(sparse, None, options.token, options.cache_dir)
        if checkpoint.is_packed:
            raise UserError(f"{sparse} is packed; recover the folder that it was exported from")
        report = report_of(checkpoint)
        named, commit = (
            options.teacher or report.get("model"),
            None if options.teacher else report.get("commit"),
        )
        if not named:
            raise UserError(f"{sparse} has no report that names its dense model; give it with --teacher")
        teacher = Checkpoint.open(named, commit, options.token, options.cache_dir)
        check_same_vocabulary(checkpoint, teacher, checkpoint.tokenizer(trust), trust, "--teacher")
        processes = Processes(options.device)
        if options.batch % processes.count:
            raise UserError(f"--batch {options.batch} does not divide among {processes.count} processes")
        device = processes.device(device)
        dtype = _dtype_of_products(options.dtype, checkpoint.stored_dtype, device)
        skeleton, dense = (Skeleton(each, torch.float32, trust) for each in (checkpoint, teacher))
        _check_length(options, skeleton.config)
        check_parent(skeleton, dense, report)
        options = replace(options, teacher=str(named))
        phases = Phases(device, progress.now)
        return cls(
            options, checkpoint, teacher, skeleton, dense, report, device, dtype, processes, phases, progress
        )

    def go(self, out: str | Path, resume: bool, overwrite: bool) -> dict[str, Any]:
        """Read the text, train, and write."""
        Writer(self.sparse, out, overwrite).refuse_interrupted(resume)
        processes, main = self.processes, self.processes.is_main
        with self.phases("text"):
            text = processes.first(processes.together(lambda: self._text() if main else None))
        with self.phases("hash"):
            fingerprint = processes.first(self._fingerprint(text) if main else None)
        with self.phases("read"):
            student = self._student()
        writer = Writer(self.sparse, out, overwrite, gridfile.beside(student.quantised()))
        processes.together(lambda: writer.begin(fingerprint, resume) if main else None)
        windows = held_apart(text.windows)
        with self.phases("teacher"):
            teacher = self._teacher(writer.work / "teacher", windows)
        with self.phases("train"):
            blocks = [*self.skeleton.blocks] if self.options.hidden else []
            training = Training(
                student, teacher, windows, self.dtype, processes, writer.work, self.progress, blocks
            )
            course = training.run()
        with self.phases("write"):
            report = self._report(writer, fingerprint, text, windows, course)
            processes.together(lambda: self._write(writer, student, training, report) if main else None)
        processes.together(lambda: writer.finish(report) if main else None)
        processes.close()
        return report

    def _text(self) -> Calibration:
        """Windows to train on, and those that are held out besides."""
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
            told = str(error).replace("--calibration", "--data").replace("--samples", "number of windows")
            raise UserError(told) from error

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

    def _student(self) -> Student:
        patterns = {row["name"]: row.get("pattern") for row in self.report.get("weights") or ()}
        student = Student(self.skeleton, self.options, self.device, patterns)
        if not student.patterns and not self.report.get("smaller"):
            raise UserError(
                f"{self.sparse.folder} has no pruned weight (a fifth of zeros or more) and no fewer channels or blocks; "
                "prune it first, there is nothing to recover"
            )
        if self.options.checkpointing:
            recompute(student.model)
        return student

    def _teacher(self, notes: Path, text: Text) -> Teacher:
        """Beside the student, or as what it says of every window was written down in ``notes``."""

        def model() -> Any:
            return load_model(self.teacher, self.dtype, self.device, self.options.trust_remote_code)

        if not self.options.top_k:
            loaded = model()
            blocks = loaded.get_submodule(self.dense.block_path)
            watched = [blocks[i] for i in kept_blocks(self.dense, self.report)] if self.options.hidden else []
            return Beside(loaded, text.windows, watched)
        count = min(self.options.top_k, self.skeleton.config.get_text_config().vocab_size)
        written = Written(notes, text.windows, count, self.device, self.processes)
        if not written.is_whole:
            written.write(model(), self.progress)
        self.processes.gather(None)  # every process has written its part
        return written

    def _write(self, writer: Writer, student: Student, training: Training, report: dict[str, Any]) -> None:
        """The best weights, everything else as it is in SPARSE, and what the report says of them."""
        rows = student.write(writer, training.best())
        before = {row["name"]: row for row in report["weights"]}
        report["weights"] = [{**before.get(row["name"], {}), **row, "error": None} for row in rows]
        report["tables"] += student.write_tables(writer)
        if student.grid is not None:
            tables = report.get("grid", {}).get("tables") or str(TABLES)
            report["grid"] = gridfile.described(student.grid, tables, self.sparse.stored_dtype)
        writer.copy(sorted(set(self.sparse.names()) - student.written()))
        training.clean()
        shutil.rmtree(writer.work / "teacher", ignore_errors=True)
        writer.prepare_to_finish(report)

    def _report(
        self, writer: Writer, fingerprint: dict[str, Any], text: Calibration, windows: Text, course: Course
    ) -> dict[str, Any]:
        options, trained = self.options, windows.trained
        tokens = course.step * options.batch * options.sequence_length
        warnings = [*self.report.get("warnings", ())]
        if course.diverged:
            warnings.append(
                f"{course.diverged}; training stopped there, use a smaller --lr than {options.lr:g}"
            )
        if not course.best_step:
            warnings.append(
                "no step was better on the held-out text than none: the weights are those of SPARSE"
            )
        recovery = {
            "sparse": str(self.sparse.folder),
            "teacher": options.teacher,
            "options": {**options.as_dict(), **{k: fingerprint[k] for k in ("device", "dtype", "processes")}},
            "source_files": fingerprint["source"],
            "teacher_files": fingerprint["teacher_files"],
            "versions": fingerprint["versions"],
            "tokens_sha256": text.sha256,
            "sources": text.sources,
            "windows": {"trained": trained, "held_out": windows.held},
            "tokens": tokens,
            "epochs": tokens / (trained * options.sequence_length),
            "steps": course.step,
            "kl": {"before": course.before, "after": course.best, "step": course.best_step},
            "curve": course.curve,
            "diverged": course.diverged,
            "seconds": self.phases.seconds,
            "peak_memory": self.phases.peak,
        }
        base: dict[str, Any] = {
            "model": options.teacher,
            "options": {},
            "weights": [],
            "tables": [],
            "seconds": {},
            "peak_memory": {},
        }
        return {**base, **self.report, "out": str(writer.out), "warnings": warnings, "recovery": recovery}


def recompute(model: Any) -> None:
    """Let blocks forget their activations and compute them again; what else training mode would do stays off."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # transformers 5.17 has the second name alone
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _dtype_of_products(asked: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """As for forward passes; float16, whose gradients vanish, becomes bfloat16 or float32."""
    if asked == "float16":
        raise UserError("--dtype float16: gradients vanish in it; use auto, bfloat16 or float32")
    found = forward_dtype(asked, torch.bfloat16 if stored == torch.float16 else stored, device)
    native = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return found if native else torch.float32


def _check_length(options: Recovery, config: Any) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and options.sequence_length > most:
        raise UserError(
            f"--sequence-length {options.sequence_length} is more than the model's max_position_embeddings, {most}"
        )
