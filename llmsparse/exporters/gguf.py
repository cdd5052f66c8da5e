"""A GGUF file, which llama.cpp and what is built on it run: F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K."""

import time
from pathlib import Path
from typing import Any

from llmsparse import export_report, gguf_file
from llmsparse.atomic import whole_folder
from llmsparse.checkpoint import Checkpoint
from llmsparse.export_sizes import Stored, sizes
from llmsparse.extras import Extra
from llmsparse.gguf_file import Entry, Header
from llmsparse.gguf_layout import differences, family_of
from llmsparse.gguf_rounding import Rounding
from llmsparse.gguf_tokenizer import vocabulary
from llmsparse.packing import Numbers
from llmsparse.writer import disk_errors

EXTRA = Extra("gguf", {"gguf": "0.17"})  # xllamacpp, if it is there, runs the file in --check


def export(
    checkpoint: Checkpoint, out: Path, *, values: str | None, embeddings: str | None, overwrite: bool,
    trust_remote_code: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Refuse what cannot be written, then write tensor by tensor into a hidden folder that becomes ``out``."""
    begun = time.perf_counter()
    config = checkpoint.config(trust_remote_code)
    family = family_of(config)
    words = vocabulary(checkpoint.tokenizer(trust_remote_code), config.vocab_size)
    rounding = Rounding.asked(checkpoint, values, embeddings)
    numbers = Numbers(checkpoint, *rounding.left(values, embeddings))
    entries = gguf_file.plan(numbers, rounding, config, family)
    name = gguf_file.file_name(checkpoint.folder, entries)
    header = Header(name.removesuffix(".gguf").rpartition("-")[0], family, config, words)
    progress.start("writing", len(entries))
    with disk_errors(out), whole_folder(out.expanduser().absolute()) as work:
        gguf_file.write(work / name, entries, numbers, header, progress)
        warnings = [*_rows_left(entries), *rounding.warnings(), *numbers.warnings, *differences(config)]
        result = {
            "format": "gguf",
            "file": name,
            **sizes(checkpoint, [_stored(entry) for entry in entries if len(entry.shape) == 2]),
            "values": numbers.describe() | rounding.describe(),
            "warnings": warnings,
        }
        result["bytes"]["after"] = (work / name).stat().st_size
        result["seconds"] = round(time.perf_counter() - begun, 2)
        export_report.write(work, result)
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the file is worth: see ``llmsparse.gguf_check``."""
    from llmsparse.gguf_check import check

    return check(checkpoint, out / result["file"], result, **options)


def _rows_left(entries: list[Entry]) -> list[str]:
    left = [entry for entry in entries if entry.left]
    if not left:
        return []
    return [
        f"{len(left)} matrices stay {left[0].type}: their rows are no multiple of 32; the first is "
        f"{left[0].place.source} with {left[0].shape[1]}"
    ]


def _stored(entry: Entry) -> Stored:
    return Stored(entry.place.source, entry.type, entry.bytes, entry.place.table or entry.place.head)
