"""A GGUF file, which llama.cpp and what is built on it run: F16, BF16, Q8_0, Q4_0."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llmsparse import gguf_file
from llmsparse.atomic import whole_folder
from llmsparse.checkpoint import Checkpoint
from llmsparse.export_report import NAME as REPORT
from llmsparse.extras import Extra
from llmsparse.gguf_file import Entry, Header
from llmsparse.gguf_layout import differences, family_of
from llmsparse.gguf_tokenizer import vocabulary
from llmsparse.packing import Numbers
from llmsparse.report import finite
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
    numbers = Numbers(checkpoint, values, embeddings)
    entries = gguf_file.plan(numbers, config, family)
    name = gguf_file.file_name(checkpoint.folder, entries)
    header = Header(name.removesuffix(".gguf").rpartition("-")[0], family, config, words)
    progress.start("writing", len(entries))
    with disk_errors(out), whole_folder(out.expanduser().absolute()) as work:
        gguf_file.write(work / name, entries, numbers, header, progress)
        warnings = [*_rows_left(entries), *numbers.warnings, *differences(config)]
        result = {
            "file": name,
            **_sizes(entries, checkpoint),
            "values": numbers.describe(),
            "warnings": warnings,
        }
        result["bytes"] = {
            "before": sum(file.stat().st_size for file in checkpoint.files),
            "after": (work / name).stat().st_size,
        }
        result["seconds"] = round(time.perf_counter() - begun, 2)
        (work / REPORT).write_text(json.dumps(finite({"format": "gguf", **result}), indent=1) + "\n", "utf-8")
    return result


def check(checkpoint: Checkpoint, out: Path, result: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the file is worth: see ``llmsparse.gguf_check``."""
    from llmsparse.gguf_check import check

    return check(checkpoint, out / result["file"], result, **options)


def _rows_left(entries: list[Entry]) -> list[str]:
    left = [e for e in entries if e.codes is not None and e.type not in ("Q8_0", "Q4_0")]
    if not left:
        return []
    return [
        f"{len(left)} matrices stay {left[0].type}: their rows are no multiple of 32; the first is "
        f"{left[0].place.source} with {left[0].shape[1]}"
    ]


def _sizes(entries: list[Entry], checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes before and after: of linear weights, of the embedding and output tables."""
    matrices = [entry for entry in entries if len(entry.shape) == 2]
    tables = [entry for entry in matrices if entry.place.table or entry.place.head]
    linear = [entry for entry in matrices if entry not in tables]
    parameters = sum(entry.shape[0] * entry.shape[1] for entry in linear)
    sizes: dict[str, Any] = {
        key: {
            "before": sum(checkpoint.bytes(e.place.source) for e in part),
            "after": sum(e.bytes for e in part),
        }
        for key, part in (("linear", linear), ("embeddings", tables))
    }
    return {
        **sizes,
        "linear_parameters": parameters,
        "bits_per_weight": 8 * sizes["linear"]["after"] / max(parameters, 1),
        "layouts": dict(Counter(entry.type for entry in entries)),
    }
