"""Write a checkpoint with the source's names and sharding, whole or not at all, resumable block by block."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.checkpoint import DTYPE_NAMES, Checkpoint
from llmsparse.errors import UserError
from llmsparse.report import finite
from llmsparse.runs import OWN
from llmsparse.sha256 import file_sha256

COPY_BYTES = 256 << 20  # copied tensors held in memory at most, besides the last
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape
Beside = dict[str, tuple[Tensors, dict[str, str]]]  # another file -> its tensors and metadata
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what a disk refuses into one clear error."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise UserError(
            f"{out} could not be written: {reason}; make room or choose another OUT, then --resume"
        ) from error


def interrupted(out: Path) -> UserError:
    """The error where a run would throw away what an interrupted one left."""
    return UserError(
        f"an interrupted run for {out} is here; continue it with --resume, or discard it with --overwrite"
    )


def refuse_another(before: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Refuse to go on with the run of the fingerprint ``before`` where this one is another."""
    now = json.loads(json.dumps(fingerprint))
    keys = {**before, **now}
    differ = [f"{k}: was {before.get(k)!r}, is {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]
    if differ:
        raise UserError(
            "--resume continues only the same run; these differ from the interrupted one: "
            f"{'; '.join(differ)}. Give the earlier options again, or start over with --overwrite"
        )


class Writer:
    """Fill a hidden work folder beside OUT, then rename it to OUT.

    Shard files get their header and full size first (a full disk shows at once); tensors go to their place in
    any order. ``journal.jsonl`` holds the fingerprint of the run and one line for each finished block, written
    after that block's bytes are on the disk.
    """

    def __init__(self, checkpoint: Checkpoint, out: str | Path, overwrite: bool = False,
                 beside: Beside | None = None) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.beside = beside or {}
        self.out = Path(out).expanduser().absolute()
        self.work = self.out.with_name(f".{self.out.name}.llmsparse-work")
        self.old = self.out.with_name(f".{self.out.name}.llmsparse-old")  # what is being replaced
        self.journal = self.work / "journal.jsonl"
        self.finished: dict[str, Any] = {}  # block name -> what its journal line recorded
        self.offsets: dict[str, tuple[Path, int]] = {}
        self._recover()
        self.check_target(self.out, overwrite, checkpoint.folder)
        self.overwrite = overwrite

    @staticmethod
    def check_target(out: str | Path, overwrite: bool, source: Path) -> None:
        """Refuse an OUT that holds something, or that is the source itself."""
        out = Path(out).expanduser().absolute()
        if out.resolve() == source.resolve() or source.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{out} is the source checkpoint; the source is never changed, choose another OUT"
            )
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
            raise UserError(
                f"{out} exists and is not empty; choose another OUT, or replace it with --overwrite"
            )

    def begin(self, fingerprint: dict[str, Any], resume: bool) -> None:
        """Open the work folder, or with ``resume`` the one that an interrupted run left (none: start afresh).

        Raises:
            UserError: an interrupted run is in the way, or differs (what, is said), or the disk is too small.
        """
        with disk_errors(self.out):
            entries = self._entries()
            if entries and resume:
                self._resume(entries, fingerprint)
            self.refuse_interrupted(resume)
            fresh = not (entries and resume)
            if fresh:
                shutil.rmtree(self.work, ignore_errors=True)
                self._check_space()
                self.work.mkdir(parents=True)
            for file, tensors in self._layout().items():
                self._prepare(file, tensors, {"format": "pt"}, fresh)
            for file, (tensors, metadata) in self.beside.items():
                self._prepare(file, tensors, {"format": "pt", **metadata}, fresh)
            if fresh:
                self._append({"fingerprint": fingerprint})

    def refuse_interrupted(self, resume: bool) -> None:
        """Raise UserError where an interrupted run is neither to be continued nor to be discarded."""
        if self._entries() and not resume and not self.overwrite:
            raise interrupted(self.out)

    def _entries(self) -> list[dict[str, Any]]:
        """The journal's whole lines; a killed run may leave half of one."""
        entries = []
        for line in self.journal.read_text().splitlines() if self.journal.is_file() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def _resume(self, entries: list[dict[str, Any]], fingerprint: dict[str, Any]) -> None:
        refuse_another(entries[0]["fingerprint"], fingerprint)
        self.finished = {entry["block"]: entry["record"] for entry in entries[1:]}
        whole = self.journal.with_suffix(".new")
        whole.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        os.replace(whole, self.journal)

    @property
    def bytes(self) -> int:
        """Of all tensors that OUT gets."""
        own = [described for tensors, _ in self.beside.values() for described in tensors.values()]
        beside = sum(dtype.itemsize * math.prod(shape) for dtype, shape in own)
        return beside + sum(self.checkpoint.bytes(name) for name in self.checkpoint.names())

    def _check_space(self) -> None:
        needed = self.bytes
        parent = next(p for p in self.work.parents if p.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UserError(
                f"the disk is full: {self.out} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {parent}"
            )

    def _layout(self) -> dict[str, Tensors]:
        """Output file -> its tensors: the source's sharding, under safetensors names."""
        layout: dict[str, Tensors] = {}
        for name in self.checkpoint.names():
            target = layout.setdefault(_target(self.checkpoint.location[name]), {})
            target[name] = self.checkpoint.dtype(name), self.checkpoint.shape(name)
        return layout

    def _prepare(self, file: str, tensors: Tensors, metadata: dict[str, str], new: bool) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format's 8-byte alignment
        for name in tensors:
            self.offsets[name] = (self.work / file, 8 + len(text) + header[name]["data_offsets"][0])
        if new:
            (self.work / file).parent.mkdir(exist_ok=True)
            with (self.work / file).open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + offset)
                else:
                    stream.truncate(8 + len(text) + offset)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors of the source's names, shapes and dtypes, or of the files beside it, in their place."""
        touched = set()
        with disk_errors(self.out):
            for name, tensor in tensors.items():
                path, offset = self.offsets[name]
                data = tensor.detach().to("cpu").contiguous()
                with path.open("r+b") as stream:
                    stream.seek(offset)
                    data.reshape(-1).view(torch.uint8).numpy().tofile(stream)
                touched.add(path)
            for path in touched:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())

    def copy(self, names: Iterable[str]) -> None:
        """Copy tensors as they are in the source."""
        chunk: dict[str, Tensor] = {}
        for name in names:
            chunk[name] = self.checkpoint.tensor(name)
            if sum(t.nbytes for t in chunk.values()) > COPY_BYTES:
                self.write(chunk)
                chunk = {}
        self.write(chunk)

    def finish_block(self, block: str, record: Any) -> None:
        """Note that every tensor of ``block`` is written."""
        self.finished[block] = record
        self._append({"block": block, "record": record})

    def _append(self, entry: dict[str, Any]) -> None:
        with disk_errors(self.out), self.journal.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def tensor(self, name: str) -> Tensor:
        """Read back a tensor that was written."""
        path, offset = self.offsets[name]
        dtype, shape = self.checkpoint.dtype(name), self.checkpoint.shape(name)
        with path.open("rb") as stream:
            stream.seek(offset)
            data = bytearray(stream.read(self.checkpoint.bytes(name)))
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    def prepare_to_finish(self, report: dict[str, Any]) -> None:
        """Copy the source's other files, write the index, and hash the weight files into ``report``."""
        with disk_errors(self.out):
            self._copy_other_files()
            self._write_index()
            files = [*self.checkpoint_files(), *self.beside]
            report["files"] = {name: file_sha256(self.work / name) for name in sorted(files)}

    def checkpoint_files(self) -> set[str]:
        """The weight files that are written, by name."""
        return {_target(file) for file in self.checkpoint.location.values()}

    def finish(self, report: dict[str, Any] | None) -> None:
        """Add ``report.json``, if any, and rename the work folder to OUT; the journal goes last: nothing is lost before."""
        with disk_errors(self.out):
            if report is not None:
                text = json.dumps(finite(report), indent=1, allow_nan=False)
                (self.work / "report.json").write_text(text + "\n")
            if self.out.is_dir() and any(self.out.iterdir()):
                self.out.rename(self.old)
            self.work.rename(self.out)
            (self.out / self.journal.name).unlink()
            shutil.rmtree(self.old, ignore_errors=True)

    def _recover(self) -> None:
        """Undo or complete a replacement that was killed between its two renames."""
        if self.old.exists() and not self.out.exists():
            self.old.rename(self.out)
        shutil.rmtree(self.old, ignore_errors=True)

    def _copy_other_files(self) -> None:
        for file in self.checkpoint.folder.iterdir():
            if (
                file.is_file()
                and file.suffix not in WEIGHTS
                and file.name not in INDEXES
                and not OWN.fullmatch(file.name)
                and not file.name.startswith(".")
            ):
                shutil.copyfile(file, self.work / file.name)

    def _write_index(self) -> None:
        location = {name: _target(file) for name, file in self.checkpoint.location.items()}
        if len(set(location.values())) > 1 or "model.safetensors" not in location.values():
            total = sum(self.checkpoint.bytes(name) for name in self.checkpoint.names())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(location.items()))}
            (self.work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _target(file: str) -> str:
    path = Path(file)
    return (
        file
        if path.suffix == ".safetensors"
        else path.stem.replace("pytorch_model", "model") + ".safetensors"
    )
