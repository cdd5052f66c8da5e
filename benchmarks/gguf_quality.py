"""Perplexity of GGUF's Q4_0: our codes, found in the sweep, beside ggml's rounding to the nearest, and F16.

    python -m benchmarks.gguf_quality "NAME=FOLDER" --keep FOLDER [--windows 64]

Of the dense model and of one pruned to 50 %. All three files have their tables in Q8_0, so that they differ in the
linear weights alone; each is read back, and its tensors are put into transformers in float32. "share" says how much of
the gap between the nearest and F16 our codes close. Every figure is a row of the results file; a row that is there is not
measured again.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import models, rows, values
from benchmarks.values import Method
from llmsparse import export_check, gguf_check
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.models import load_model
from llmsparse.eval.text import load_text
from llmsparse.eval.windows import Windows, cut_windows
from llmsparse.export import export
from llmsparse.grid import Grid
from llmsparse.progress import Quiet

CODES = Grid(4, 32)
TYPES = {
    "F16": {"values": "fp16", "embeddings": "int8"},
    "Q4_0, nearest": {"values": "q4_0"},
    "Q4_0, codes": {},
}
KEY = (*models.IDENTITY, "type", "context", "windows_asked")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders, or NAME=FOLDER")
    parser.add_argument("--keep", required=True, help="a folder where the models stay, and are looked for")
    parser.add_argument("--patterns", nargs="*", default=["", "50%"], help='"" is the dense model')
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--results", default=rows.RESULTS / "gguf_quality.json")
    options = parser.parse_args()
    options.seed, options.device = 0, "auto"
    for name, folder in map(models.named, options.models):
        for pattern in options.patterns:
            for type in TYPES:
                wanted = _wanted(name, folder, pattern, type, options)
                if _find(rows.read(Path(options.results)), wanted) is None:
                    rows.append(Path(options.results), _measure(folder, wanted, options))
        print(f"\n{name}\n\n{table(rows.read(Path(options.results)), name, folder, options)}")


def _wanted(name: str, folder: Path, pattern: str, type: str, options: Any) -> dict[str, Any]:
    solver = "sparsegpt" if pattern or type.endswith("codes") else "dense"
    identity = models.identity(name, folder, solver, pattern, rows.calibration_text(), options)
    return {**identity, "type": type, "context": options.context, "windows_asked": options.windows}


def _find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in reversed(measured) if all(row.get(k) == wanted[k] for k in KEY)), None)


def _measure(folder: Path, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    models.say(wanted, wanted["type"])
    grid = CODES if wanted["type"].endswith("codes") else None
    method = Method(
        wanted["pattern"], grid, "sweep" if grid or wanted["pattern"] else "", "int8" if grid else "keep"
    )
    source = values.made(folder, method, wanted, options)
    with tempfile.TemporaryDirectory(prefix="llmsparse-gguf-") as place:
        result = export(source, Path(place, "out"), format="gguf", **TYPES[wanted["type"]])
        figures = _score(Checkpoint.open(source), Path(place, "out", result["file"]), options)
    return {**wanted, **figures, "layouts": result["layouts"], **rows.provenance(rows.calibration_text())}


def _score(checkpoint: Checkpoint, file: Path, options: Any) -> dict[str, Any]:
    """Perplexity on WikiText-2 of the file's own tensors."""
    text, _, _ = load_text("wikitext2")
    cut = cut_windows(text, checkpoint.tokenizer(), options.context)
    windows = Windows(*(None if part is None else part[: options.windows] for part in cut))  # type: ignore[arg-type]
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), False)
    gguf_check.fill(model, checkpoint, file)
    found, error = export_check.score(model, windows, "perplexity", Quiet())
    return {
        "perplexity": found,
        "standard_error": error,
        "windows": len(windows.ids),
        "file_bytes": file.stat().st_size,
        "evaluation_sha256": rows.sha256_of_text(text),
    }


def table(measured: list[dict[str, Any]], name: str, folder: Path, options: Any) -> str:
    """Markdown: a line for each pattern."""
    lines = [
        "| weights | F16 | Q4_0, nearest (ggml) | Q4_0, our codes | share of the gap closed |",
        "|---|---|---|---|---|",
    ]
    for pattern in options.patterns:
        found = [_find(measured, _wanted(name, folder, pattern, type, options)) for type in TYPES]
        if None in found:
            continue
        floats, nearest, codes = (row["perplexity"] for row in found if row)
        cells = [f"{row['perplexity']:.2f} ± {row['standard_error']:.2f}" for row in found if row]
        share = (nearest - codes) / (nearest - floats)
        lines.append(f"| {pattern or 'dense'} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
