"""Models with fewer numbers beside models with zeros, all in int4: bytes, perplexity, and tokens a second.

    python -m benchmarks.smaller "NAME=FOLDER" --keep FOLDER [--methods 2:4 width:25% depth:7] [--samples 128]

A method is what ``prune --values int4:32`` takes as patterns, joined by +. Each model is exported twice: to a GGUF file
(Q4_0, which stores zeros like any other value) for llama.cpp (package xllamacpp), and packed for llmsparse's CPU kernels.
Perplexity is the pruned folder's. A quality row that is there is not measured again; then all files are decoded in turn,
round after round, in one process, which adds a row of speeds for each method.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llmsparse
from benchmarks import models, rows
from benchmarks.cpu_decode import PROMPT, seconds_a_token
from benchmarks.llama_cpp import LlamaCpp
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.evaluate import evaluate
from llmsparse.eval.models import weight_bytes
from llmsparse.export import export
from llmsparse.prune import prune

KEY = (*models.IDENTITY, "values", "context", "windows_asked", "data")
VALUES = "int4:32"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, or NAME=FOLDER")
    parser.add_argument("--keep", type=Path, required=True, help="a folder where the models stay")
    parser.add_argument("--methods", nargs="+", default=["as-is", "2:4", "width:25%", "depth:7"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=rows.RESULTS / "smaller.json")
    options = parser.parse_args()
    options.seed = 0
    name, folder = models.named(options.model)
    found = []
    for method in options.methods:
        wanted = _wanted(name, folder, method, options)
        row = _find(rows.read(options.results), wanted)
        if row is None:
            row = _quality(folder, wanted, options)
            rows.append(options.results, row)
        found.append(row)
    speeds = _speeds(options)
    for method, speed in zip(options.methods, speeds, strict=True):
        rows.append(options.results, {**rows.provenance(), "model": name, "pattern": method, **speed})
    print(table(found, speeds))


def _wanted(name: str, folder: Path, method: str, options: Any) -> dict[str, Any]:
    identity = models.identity(name, folder, "sparsegpt", method, rows.calibration_text(), options)
    asked = {"context": options.context, "windows_asked": options.windows, "data": "wikitext2"}
    return {**identity, "values": VALUES, **asked}


def _find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in reversed(measured) if all(row.get(k) == wanted[k] for k in KEY)), None)


def _places(method: str, keep: Path) -> tuple[Path, Path, Path]:
    """The pruned folder, the folder of its GGUF file, and its packed folder."""
    stem = method.replace("%", "pc").replace(":", "of")
    return keep / stem, keep / f"{stem}-gguf", keep / f"{stem}-packed"


def _quality(folder: Path, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    pruned, gguf, packed = _places(wanted["pattern"], options.keep)
    models.say(wanted, "pruning")
    report = prune(
        folder, pruned, solver="sparsegpt", pattern=tuple(wanted["pattern"].split("+")), values=VALUES,
        calibration=rows.calibration_text(), samples=options.samples, sequence_length=options.sequence_length,
        seed=options.seed, dtype="float32", overwrite=True,
    )  # fmt: skip
    file = export(pruned, gguf, format="gguf", overwrite=True)["file"]
    export(pruned, packed, overwrite=True)
    models.say(wanted, "perplexity")
    found = evaluate(pruned, "wikitext2", context=options.context, windows=options.windows, dtype="float32")
    score = found["sources"][0]
    return {
        **wanted, "perplexity": score["perplexity"], "standard_error": score["standard_error"],
        "gguf_bytes": (gguf / file).stat().st_size, "packed_bytes": weight_bytes(Checkpoint.open(packed)),
        "prune_seconds": round(sum(report["seconds"].values()), 1), **rows.provenance(rows.calibration_text()),
    }  # fmt: skip


def _speeds(options: Any) -> list[dict[str, Any]]:
    """Tokens a second of every method, by llama.cpp on its GGUF file and by llmsparse on its packed folder, in turn."""
    torch.set_num_threads(options.threads)
    runs: list[tuple[Callable[[], float], Callable[[], float]]] = []
    for method in options.methods:
        _, gguf, packed = _places(method, options.keep)
        server = LlamaCpp(next(gguf.glob("*.gguf")), options.threads)
        model = llmsparse.load(packed, dtype=torch.bfloat16)
        ids = Checkpoint.open(packed).tokenizer()(PROMPT, return_tensors="pt").input_ids
        runs.append(
            (
                lambda server=server: server.tokens_per_second(PROMPT, options.tokens),
                lambda model=model, ids=ids: 1 / seconds_a_token(model, ids, options.tokens),
            )
        )
    rates = [[[run() for run in pair] for pair in runs] for _ in range(options.rounds + 1)][1:]
    return [
        {
            "threads": options.threads,
            "tokens": options.tokens,
            "rounds": options.rounds,
            "llama_cpp": _spread([turn[number][0] for turn in rates]),
            "llmsparse": _spread([turn[number][1] for turn in rates]),
        }
        for number in range(len(runs))
    ]


def _spread(rates: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def table(quality: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method; speeds are medians, lowest and highest."""
    lines = [
        "| pattern, int4:32 | GGUF | packed | WikiText-2 | llama.cpp, tokens/s | llmsparse, tokens/s |",
        "|" + "---|" * 6,
    ]
    for row, speed in zip(quality, speeds, strict=True):
        sizes = f"{row['gguf_bytes'] / 1e6:.1f} MB | {row['packed_bytes'] / 1e6:.1f} MB"
        score = f"{row['perplexity']:.2f} ± {row['standard_error']:.2f}"
        rates = " | ".join(
            "{median:.1f} ({lowest:.1f} to {highest:.1f})".format(**speed[k])
            for k in ("llama_cpp", "llmsparse")
        )
        lines.append(f"| {row['pattern']} | {sizes} | {score} | {rates} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
