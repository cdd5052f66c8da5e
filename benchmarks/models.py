"""The models whose quality is measured: dense, and pruned by each method to each pattern.

A method is a solver, and after each + an option of prune, or of --set where its name has a dot: ``refit:wanda``,
``alps+targets=dense+reconstruct=1``, ``refit:wanda+refit.steps=5``.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import rows
from llmsparse.checkpoint import Checkpoint
from llmsparse.plan import prepare
from llmsparse.prune import prune
from llmsparse.recipe import Recipe

PEER = "llm-compressor"  # the method that is its SparseGPT

IDENTITY = (
    "model",
    "model_sha256",
    "solver",
    "pattern",
    "calibration_sha256",
    "samples",
    "sequence_length",
    "seed",
)
AS_ASKED = (
    "solver",
    "pattern",
    "samples",
    "sequence_length",
    "seed",
)  # what the report of a kept model must agree in

TIMES = {"prune_seconds", "solve_seconds", "peak_memory"}
BESIDE = "measured beside other cells on the same device, so without its times"

Wanted = Callable[[str, Path, str, str, str, Any], list[dict[str, Any]]]

_hashes: dict[Path, str] = {}


def add_options(parser: argparse.ArgumentParser, patterns: list[str]) -> None:
    """What every measurement of pruned models asks for."""
    parser.add_argument("models", nargs="+", help="folders, or NAME=FOLDER")
    parser.add_argument("--solvers", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="*", default=patterns)
    parser.add_argument(
        "--calibration", help="default: text/c4/calib.jsonl below $LLMSPARSE_DATA, else builtin"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="float32", help="of forward passes, in pruning too (default float32)"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing: print the rows that are there")
    parser.add_argument(
        "--beside", type=int, default=1, help="cells that are measured at once, without times (default 1)"
    )
    parser.add_argument("--keep", help="a folder where pruned models stay, and are looked for")


def named(argument: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder that is its own name."""
    name, equals, folder = argument.rpartition("=")
    return (name, Path(folder)) if equals else (Path(folder).name, Path(folder))


def methods(options: Any) -> list[tuple[str, str]]:
    """(solver, pattern) in the order of the README: dense, then pattern by pattern."""
    return [("dense", ""), *((solver, pattern) for pattern in options.patterns for solver in options.solvers)]


def measure(
    options: Any,
    wanted: Wanted,
    find: Callable[..., Any],
    figures: Callable[..., Any],
    table: Callable[..., str],
) -> None:
    """Measure what ``find`` does not find in the results, row by row, and print each model's ``table``.

    ``wanted(name, folder, solver, pattern, source, options)``: what identifies each row of one pruned model.
    """
    file, source = Path(options.results), options.calibration or rows.calibration_text()
    for name, folder in map(named, options.models):
        cells = []
        for solver, pattern in [] if options.show else methods(options):
            asked = wanted(name, folder, solver, pattern, source, options)
            cells.append([row for row in asked if find(rows.read(file), row) is None])
        for row in _measured(figures, folder, source, list(filter(None, cells)), options):
            rows.append(file, row)
        print(f"\n{name}\n\n{table(rows.read(file), name, folder, source, options)}")


def _measured(
    figures: Callable[..., Any], folder: Path, source: str, cells: list[list[dict[str, Any]]], options: Any
) -> Iterator[dict[str, Any]]:
    """The rows of the cells, one after the other; or as they end, of --beside cells at once, without times."""
    if options.beside < 2:
        for missing in cells:
            yield from figures(folder, source, missing, options)
        return
    here = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.beside, here, torch.set_num_threads, (1,)) as pool:
        running = {
            pool.submit(_cell, figures, folder, source, missing, options): missing for missing in cells
        }
        failed = []
        for done in as_completed(running):
            if error := done.exception():
                row = running[done][0]
                failed.append(f"{row['solver']} {row['pattern']}: {rows.reason(error)}")
            else:
                yield from done.result()
    if failed:
        raise SystemExit("\n".join(["error: cells that failed", *failed]))


def _cell(
    figures: Callable[..., Any], folder: Path, source: str, missing: list[dict[str, Any]], options: Any
) -> list[dict[str, Any]]:
    return [
        {**row, **dict.fromkeys(row.keys() & TIMES), "note": BESIDE}
        for row in figures(folder, source, missing, options)
    ]


def identity(name: str, folder: Path, solver: str, pattern: str, source: str, options: Any) -> dict[str, Any]:
    """What tells one pruned model from another."""
    return {
        "model": name,
        "model_sha256": _model_hash(folder),
        "solver": solver,
        "pattern": pattern,
        "calibration": rows.public(source),
        "calibration_sha256": rows.sha256(Path(source)) if Path(source).is_file() else rows.public(source),
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "seed": options.seed if pattern else 0,  # the dense model is the same for each
    }


def _model_hash(folder: Path) -> str:
    """sha256 of the model's only weight file; of several, of their names and sha256 together."""
    if folder not in _hashes:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        each = [(file.name, rows.sha256(file)) for file in files]
        _hashes[folder] = each[0][1] if len(each) == 1 else rows.sha256_of_text(repr(each))
    return _hashes[folder]


def method(text: str) -> tuple[str, dict[str, Any]]:
    """The solver of a method, and its other options as ``prune`` takes them."""
    solver, *pairs = text.split("+")
    given = dict(pair.split("=", 1) for pair in pairs if "." not in pair.split("=")[0])
    options: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    settings = [pair for pair in pairs if "." in pair.split("=")[0]]
    return solver, options | ({"set": settings} if settings else {})


@contextlib.contextmanager
def pruned(
    folder: Path, source: str, wanted: dict[str, Any], options: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model that ``wanted`` identifies and facts of its pruning, made now or found below ``--keep``."""
    if wanted["solver"] == "dense":
        yield folder, {}
        return
    with contextlib.ExitStack() as stack:
        place = options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="llmsparse-bench-"))
        pattern = wanted["pattern"].replace("%", "pc").replace(":", "of")
        solver, given = method(wanted["solver"])
        name = wanted["solver"].replace(":", "-").replace("=", "-")
        out = Path(
            place, f"{folder.name}-{name}-{pattern}" + (f"-seed{wanted['seed']}" if wanted["seed"] else "")
        )
        if solver == PEER:
            yield out, _by_llm_compressor(folder, out, source, wanted, options)
            return
        report = _kept(folder, out, wanted)
        if report is None:
            say(wanted, "pruning")
            report = prune(
                folder, out, solver=solver, pattern=(wanted["pattern"],), calibration=source,
                samples=options.samples, sequence_length=options.sequence_length, seed=options.seed,
                device=options.device, dtype=options.dtype, **given,
            )  # fmt: skip
        yield (
            out,
            {
                "prune_seconds": round(sum(report["seconds"].values()), 1),
                "solve_seconds": report["seconds"].get("solve"),
                "peak_memory": max(report["peak_memory"].values()),
                "coverage": report["coverage"],
                "tokens_sha256": (report["calibration"] or {}).get("tokens_sha256"),
                "prune_dtype": report["options"]["dtype"],
                "warnings": report["warnings"],
            },
        )


def _by_llm_compressor(
    folder: Path, out: Path, source: str, wanted: dict[str, Any], options: Any
) -> dict[str, Any]:
    """Prune by ``benchmarks/llm_compressor.py`` on the tokens that ``prune`` would take; facts as those of ``pruned``."""
    python = os.environ.get("LLM_COMPRESSOR_PYTHON")
    if not python:
        raise SystemExit(f"error: {PEER} needs LLM_COMPRESSOR_PYTHON, a Python that has llmcompressor")
    say(wanted, f"pruning by {python}")
    asked = {"calibration": source, "samples": options.samples, "sequence_length": options.sequence_length}
    text = prepare(folder, Recipe.of(None, {**asked, "seed": options.seed})).calibrate()
    assert text is not None
    with tempfile.TemporaryDirectory() as place:
        ids = Path(place, "ids.npy")
        np.save(ids, text.windows.numpy())
        script = Path(__file__).with_name("llm_compressor.py")
        command = [python, str(script), str(folder), str(ids), str(out), wanted["pattern"]]
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=own)
        told = json.loads(done.stdout.splitlines()[-1])
    for file in folder.glob("*.json"):
        shutil.copyfile(file, out / file.name)  # the tokenizer, and a config that says nothing of sparsity
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        loss = float(model(text.windows[:1], labels=text.windows[:1]).loss)
    if abs(loss - told.pop("dense_loss")) > 1e-3:
        raise SystemExit(f"error: {PEER} reads {folder} as another model")
    return {**told, "tokens_sha256": text.sha256, "prune_dtype": "float32"}


def _kept(folder: Path, out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the model that lies in ``out``, if it is the one wanted."""
    if not (out / "report.json").exists():
        return None
    report = json.loads((out / "report.json").read_text())
    options = report["options"]
    solver, given = method(wanted["solver"])
    asked = {**wanted, "solver": solver, "pattern": [wanted["pattern"]], **given}
    same = all(options[key] == asked[key] for key in (*AS_ASKED, *given))
    calibrated = report["calibration"] is None or rows.public(options["calibration"]) == wanted["calibration"]
    if same and calibrated and report["source_files"] == Checkpoint.open(folder).sha256():
        return report
    raise SystemExit(
        f"error: {out} is another model than the one asked for; name another --keep, or remove it"
    )


def say(row: dict[str, Any], doing: str) -> None:
    print(
        f"{time.strftime('%H:%M:%S')} {row['model']} {row['solver']} {row['pattern']}: {doing}",
        file=sys.stderr,
    )
