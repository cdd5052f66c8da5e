"""A folder in the packed format, which transformers and llmsparse load: docs/format.md."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from llmsparse.checkpoint import DTYPE_NAMES, Checkpoint
from llmsparse.errors import UserError
from llmsparse.heap import return_freed_memory
from llmsparse.packed import VERSION, Packed, smallest
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.skeleton import Skeleton
from llmsparse.writer import Writer, disk_errors


class Piece(NamedTuple):
    """A packed weight that waits on the disk for its place in the output."""

    candidate: Candidate
    packed: Packed
    file: Path


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Pack weight by weight into a hidden folder, then write the files, whose headers need all sizes, from it."""
    begun = time.perf_counter()
    skeleton = Skeleton(checkpoint, trust_remote_code=trust_remote_code)
    numbers = Numbers(checkpoint, values, embeddings)
    found = candidates(skeleton)
    out = out.expanduser().absolute()
    spool = out.with_name(f".{out.name}.llmsparse-spool")
    shutil.rmtree(spool, ignore_errors=True)  # of an export that was killed
    _clear(Writer(checkpoint, out, overwrite))
    progress.start("packing", len(found.packable))
    try:
        with disk_errors(out):
            spool.mkdir(parents=True)
        pieces: list[Piece] = []
        for candidate in found.packable:
            pieces += _pack(candidate, checkpoint, numbers, spool / f"{len(pieces)}.safetensors", out)
            progress.advance("packing", candidate.path)
        result = _result(skeleton, pieces, [*found.warnings, *numbers.warnings])
        report = _report(checkpoint)
        result |= {"values": numbers.describe(), "seconds": round(time.perf_counter() - begun, 2)}
        _write(checkpoint, pieces, out, overwrite, report, result)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return result


def _pack(
    candidate: Candidate, checkpoint: Checkpoint, numbers: Numbers, file: Path, out: Path
) -> Iterator[Piece]:
    """Nothing where an ordinary tensor is as small."""
    if (drawn := numbers.of(candidate)) is None:
        return
    kind, stored, scales = drawn
    shape = (stored.shape[0], stored.shape[1])
    packed = Packed("dense", kind.name, shape) if candidate.table else smallest(stored, kind)
    if packed is None:
        return
    packed = replace(packed, pattern=numbers.pattern(candidate), tied=candidate.tied)
    tensors = packed.format.pack(packed, stored)
    if scales is not None:
        tensors["scales"] = scales
    with disk_errors(out):
        save_file({f"{candidate.stem}.{name}": tensor for name, tensor in tensors.items()}, file)
    checkpoint.close()
    return_freed_memory()
    yield Piece(candidate, packed, file)


def _clear(writer: Writer) -> None:
    """Remove what a killed export left, and refuse what an interrupted prune left, before any work."""
    entries = writer._entries()
    if entries and "export" in entries[0]["fingerprint"]:
        shutil.rmtree(writer.work)
    elif entries and not writer.overwrite:
        raise UserError(
            f"an interrupted run for {writer.out} is here; finish it with `llmsparse prune ... --resume`, "
            "discard it with --overwrite, or choose another OUT"
        )


def _write(
    checkpoint: Checkpoint, pieces: list[Piece], out: Path, overwrite: bool,
    report: dict[str, Any] | None, result: dict[str, Any],
) -> None:  # fmt: skip
    """Fill the files of the output, each tensor in the file that the source has it in, and rename the whole."""
    target = Checkpoint(checkpoint.folder, _headers(checkpoint, pieces))
    writer = Writer(target, out, overwrite)
    writer.begin({"export": "packed"}, resume=False)
    try:
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
        result["bytes"]["after"] = sum(file.stat().st_size for file in writer.work.glob("*.safetensors"))
        hashes: dict[str, Any] = {}
        writer.prepare_to_finish(hashes)
        _write_config(writer.work / "config.json", pieces)
        whole = None if report is None else {**report, "export": {"format": "packed", **result, **hashes}}
        writer.finish(whole)
    except BaseException:
        shutil.rmtree(writer.work, ignore_errors=True)  # gone already when only the last clean-up failed
        raise


def _headers(checkpoint: Checkpoint, pieces: list[Piece]) -> dict[str, dict[str, Any]]:
    """Output file -> tensors, wider numbers first: each must begin at a multiple of its own size."""
    gone = {name for piece in pieces for name in (piece.candidate.source, *piece.candidate.copies)}
    headers: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names():
        if name not in gone:
            entry = {"dtype": DTYPE_NAMES[checkpoint.dtype(name)], "shape": list(checkpoint.shape(name))}
            headers.setdefault(checkpoint.location[name], {})[name] = entry
    for piece in pieces:
        file = headers.setdefault(checkpoint.location[piece.candidate.source], {})
        for name, (dtype, shape) in piece.packed.tensors().items():
            file[f"{piece.candidate.stem}.{name}"] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
    width = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    return {
        file: dict(sorted(tensors.items(), key=lambda pair: -width[pair[1]["dtype"]]))
        for file, tensors in headers.items()
    }


def _write_config(file: Path, pieces: list[Piece]) -> None:
    config = json.loads(file.read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "llmsparse",
        "version": VERSION,
        "weights": {piece.candidate.path: piece.packed.entry() for piece in pieces},
    }
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What prune recorded, which the packed folder goes on carrying."""
    file = checkpoint.folder / "report.json"
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); remove it, or prune again") from error


def _result(skeleton: Skeleton, pieces: list[Piece], warnings: list[str]) -> dict[str, Any]:
    """Bytes before and after: of everything, of linear weights, of the embedding and output tables."""
    checkpoint = skeleton.checkpoint
    packed = {piece.candidate.source: piece.packed for piece in pieces}
    tables = {skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables}
    linear = {w.source for w in skeleton.weights} - tables
    parameters = sum(w.out_features * w.in_features for w in skeleton.weights if w.source in linear)
    sizes = {}
    for key, names in (("linear", linear), ("embeddings", tables)):
        after = sum(packed[n].bytes if n in packed else checkpoint.bytes(n) for n in names)
        sizes[key] = {"before": sum(map(checkpoint.bytes, names)), "after": after}
    layouts = Counter(piece.packed.layout for piece in pieces)
    layouts["ordinary"] = len(linear | tables) - len(pieces)
    return {
        "bytes": {"before": sum(file.stat().st_size for file in checkpoint.files), "after": 0},
        **sizes,
        "linear_parameters": parameters,
        "bits_per_weight": 8 * sizes["linear"]["after"] / max(parameters, 1),
        "layouts": {name: count for name, count in layouts.items() if count},
        "warnings": warnings,
    }
