"""A folder in the packed format, which transformers and llmsparse load: docs/format.md."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from llmsparse import pieces
from llmsparse.checkpoint import Checkpoint
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.heap import return_freed_memory
from llmsparse.packed import VERSION, Packed, smallest
from llmsparse.packing import Candidate, Numbers, candidates
from llmsparse.pieces import Piece
from llmsparse.skeleton import Skeleton
from llmsparse.writer import Writer, disk_errors

EXTRA = Extra()


class Made(NamedTuple):
    """A packed weight, and the piece of the output that it is."""

    candidate: Candidate
    packed: Packed
    piece: Piece


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
    spool = pieces.spool_of(out)
    pieces.clear(Writer(checkpoint, out, overwrite))
    progress.start("packing", len(found.packable))
    try:
        with disk_errors(out):
            spool.mkdir(parents=True)
        made: list[Made] = []
        for candidate in found.packable:
            made += _pack(candidate, checkpoint, numbers, spool / f"{len(made)}.safetensors", out)
            progress.advance("packing", candidate.path)
        result = _result(skeleton, made, [*found.warnings, *numbers.warnings])
        result |= {"values": numbers.describe(), "seconds": round(time.perf_counter() - begun, 2)}
        entries = {each.candidate.path: each.packed.entry() for each in made}
        config = {"quant_method": "llmsparse", "version": VERSION, "weights": entries}
        pieces.write(checkpoint, [each.piece for each in made], out, overwrite, config, result)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What transformers and llmsparse's kernels make of the files: see ``llmsparse.transformers_check``."""
    from llmsparse.transformers_check import check

    files = result["bytes"]
    gain = f"zeros are neither stored nor multiplied: {files['after'] / files['before']:.0%} of the source's bytes"
    faster = "`llmsparse bench` times its products beside dense ones"
    return check(checkpoint, out, result, gain, **options) | {"notes": [faster]}


def _pack(
    candidate: Candidate, checkpoint: Checkpoint, numbers: Numbers, file: Path, out: Path
) -> Iterator[Made]:
    """Nothing where an ordinary tensor is as small."""
    if (drawn := numbers.of(candidate)) is None:
        return
    checkpoint.close()  # the tensor itself may be as large as all else
    return_freed_memory()
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
    names = {f"{candidate.stem}.{name}": kind for name, kind in packed.tensors().items()}
    yield Made(candidate, packed, Piece(candidate.source, candidate.copies, names, file))


def _result(skeleton: Skeleton, made: list[Made], warnings: list[str]) -> dict[str, Any]:
    """Every weight's bytes; ``ordinary``: as it was."""
    packed = {each.candidate.source: each.packed for each in made}
    tables = {skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables}
    stored = []
    for name in dict.fromkeys([*(w.source for w in skeleton.weights), *sorted(tables)]):
        found = packed.get(name)
        layout, size = (found.layout, found.bytes) if found else ("ordinary", skeleton.checkpoint.bytes(name))
        stored.append(Stored(name, layout, size, name in tables))
    return {"format": "packed", **sizes(skeleton.checkpoint, stored), "warnings": warnings}
