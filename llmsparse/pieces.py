"""A checkpoint in which some weights are stored as other tensors: written file by file, whole or not at all."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from llmsparse import export_report, gridfile
from llmsparse.checkpoint import DTYPE_NAMES, Checkpoint
from llmsparse.errors import UserError
from llmsparse.writer import Writer


class Piece(NamedTuple):
    """What takes the place of one weight, and waits on the disk for its place in the output."""

    source: str  # the tensor that it replaces
    copies: tuple[str, ...]  # tensors that hold the same once more
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by their names in the output
    file: Path


def write(
    checkpoint: Checkpoint, pieces: list[Piece], out: Path, overwrite: bool, quantization: dict[str, Any],
    result: dict[str, Any],
) -> None:  # fmt: skip
    """Fill the files of the output, each tensor in the file that the source has it in, and rename the whole."""
    target = Checkpoint(checkpoint.folder, _headers(checkpoint, pieces))
    writer = Writer(target, out, overwrite)
    with filling(checkpoint, writer, result, {"quantization_config": quantization}):
        written: set[str] = set()
        for piece in pieces:
            tensors = load_file(piece.file)
            writer.write(tensors)
            written |= set(tensors)
            piece.file.unlink()
        for name in target.names():
            if name not in written:
                writer.write({name: checkpoint.tensor(name)})
                checkpoint.close()


@contextmanager
def filling(
    checkpoint: Checkpoint, writer: Writer, result: dict[str, Any], changes: dict[str, Any]
) -> Iterator[None]:
    """A folder to fill through ``writer``: at the end it is renamed to its place, or gone where something failed.

    ``changes`` go into config.json (None: the key goes), ``result`` into the report that prune wrote, if it is there.
    """
    report = _report(checkpoint)
    writer.begin({"export": result["format"]}, resume=False)
    try:
        yield
        files = [file for file in writer.work.glob("*.safetensors") if file.name != gridfile.NAME]
        result["bytes"]["after"] = sum(file.stat().st_size for file in files)
        hashes: dict[str, Any] = {}
        writer.prepare_to_finish(hashes)
        _change_config(writer.work / "config.json", changes)
        result |= hashes
        if report is None:  # nothing else says what the folder is
            export_report.write(writer.work, result)
        writer.finish(None if report is None else {**report, "export": result})
    except BaseException:
        shutil.rmtree(writer.work, ignore_errors=True)  # gone already when only the last clean-up failed
        raise


def _headers(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> dict[str, dict[str, Any]]:
    """Output file -> tensors, wider numbers first: each must begin at a multiple of its own size."""
    gone = {name for piece in pieces for name in (piece.source, *piece.copies)}
    headers: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names():
        if name not in gone:
            entry = {"dtype": DTYPE_NAMES[checkpoint.dtype(name)], "shape": list(checkpoint.shape(name))}
            headers.setdefault(checkpoint.location[name], {})[name] = entry
    for piece in pieces:
        file = headers.setdefault(checkpoint.location[piece.source], {})
        for name, (dtype, shape) in piece.tensors.items():
            file[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
    width = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    return {
        file: dict(sorted(tensors.items(), key=lambda pair: -width[pair[1]["dtype"]]))
        for file, tensors in headers.items()
    }


def _change_config(file: Path, changes: dict[str, Any]) -> None:
    config = {**json.loads(file.read_text("utf-8")), **changes}
    whole = {key: value for key, value in config.items() if value is not None or key not in changes}
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What prune recorded, which the output goes on carrying."""
    file = checkpoint.folder / "report.json"
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); remove it, or prune again") from error


def clear(writer: Writer) -> None:
    """Remove what a killed export left, and refuse what an interrupted prune left, before any work."""
    entries = writer._entries()
    if entries and "export" in entries[0]["fingerprint"]:
        shutil.rmtree(writer.work)
    elif entries and not writer.overwrite:
        raise UserError(
            f"an interrupted run for {writer.out} is here; finish it with `llmsparse prune ... --resume`, "
            "discard it with --overwrite, or choose another OUT"
        )


def spool_of(out: Path) -> Path:
    """An empty place beside ``out`` for pieces that wait; what an export that was killed left there is removed."""
    spool = out.with_name(f".{out.name}.llmsparse-spool")
    shutil.rmtree(spool, ignore_errors=True)
    return spool
