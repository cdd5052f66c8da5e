"""Bits against perplexity: dense and sparse weights, rounded in the sweep and to the nearest, and embeddings.

    python -m benchmarks.values "NAME=FOLDER" --keep FOLDER [--windows 64]

"nearest" rounds a pruned (or dense) model's weights with fitted scales; "sweep" is `prune --values` or `quantize`.
Bits are those of a linear weight in the packed format: a bit of mask where it is sparse, the kept values, the scales.
Every figure is a row of the results file, written as soon as it is known; a row that is there is not measured again.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import models, rows
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.evaluate import evaluate
from llmsparse.grid import Grid
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.skeleton import Skeleton

SPARSE = ("50%", "2:4")
GRIDS = (Grid(8), Grid(4, 32))
KEY = (*models.IDENTITY, "values", "how", "embeddings", "context", "windows_asked", "data")


class Method(NamedTuple):
    """A row of the table; ``values`` None: the checkpoint's own dtype."""

    pattern: str
    values: Grid | None = None
    how: str = ""
    embeddings: str = "keep"


def methods() -> Iterator[Method]:
    """The dense model and its grids, then each pattern's, with what the tables cost, then wider groups.

    A "sweep" of bf16 prunes with the first token counted as the others do with values.
    """
    for pattern in ("", *SPARSE):
        yield Method(pattern)
        for grid in GRIDS + ((Grid(3, 32),) if not pattern else ()):
            yield Method(pattern, grid, "nearest")
            yield Method(pattern, grid, "sweep")
        if pattern:
            yield Method(pattern, None, "sweep")
        if pattern == "50%":
            yield Method(pattern, Grid(8), "sweep", "int8")
            yield Method(pattern, Grid(4, 32), "sweep", "int4:32")
    for pattern in ("", "50%"):
        yield Method(pattern, Grid(4, 64), "nearest")
        yield Method(pattern, Grid(4, 64), "sweep")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders, or NAME=FOLDER")
    parser.add_argument("--keep", required=True, help="a folder where the models stay, and are looked for")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--results", default=rows.RESULTS / "values.json")
    options = parser.parse_args()
    options.seed, options.device, options.dtype = 0, "auto", "float32"
    for name, folder in map(models.named, options.models):
        for method in methods():
            wanted = _wanted(name, folder, method, options)
            if _find(rows.read(Path(options.results)), wanted) is None:
                rows.append(Path(options.results), _measure(folder, method, wanted, options))
        print(f"\n{name}\n\n{table(rows.read(Path(options.results)), name, folder, options)}")


def _wanted(name: str, folder: Path, method: Method, options: Any) -> dict[str, Any]:
    solver = "sparsegpt" if method.pattern or method.how == "sweep" else "dense"
    identity = models.identity(name, folder, solver, method.pattern, rows.calibration_text(), options)
    return {
        **identity,
        "values": str(method.values or "bf16"),
        "how": method.how,
        "embeddings": method.embeddings,
        "context": options.context,
        "windows_asked": options.windows,
        "data": "wikitext2",
    }


def _find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in reversed(measured) if all(row.get(k) == wanted[k] for k in KEY)), None)


def _measure(folder: Path, method: Method, wanted: dict[str, Any], options: Any) -> dict[str, Any]:
    models.say(wanted, f"{wanted['values']} {method.how}, tables {method.embeddings}")
    place = made(folder, method, wanted, options)
    found = evaluate(
        place, "wikitext2", context=options.context, windows=options.windows, dtype=options.dtype
    )
    known = found | found["sources"][0]
    figures = {k: known[k] for k in ("perplexity", "standard_error", "tokens", "windows", "dtype")}
    row = {**wanted, **figures, "bits": bits(place, method), "evaluation_sha256": known["sha256"]}
    return {**row, **rows.provenance(rows.calibration_text())}


def made(folder: Path, method: Method, wanted: dict[str, Any], options: Any) -> Path:
    """The model of ``method``, made now or found below ``--keep``; nothing large stays that is easily made again."""
    if method.how != "sweep":
        with models.pruned(folder, rows.calibration_text(), wanted, options) as (model, _):
            if method.values is None:
                return model
            out = Path(options.keep, "nearest")
            shutil.rmtree(out, ignore_errors=True)
            quantize(model, out, solver="magnitude", values=method.values, embeddings="keep")
            return out
    tables = "" if method.embeddings == "keep" else f"-tables-{method.embeddings}"
    name = f"{folder.name}-{method.pattern or 'dense'}-{method.values or 'first-token'}{tables}"
    out = Path(options.keep, name.replace("%", "pc").replace(":", "of"))
    if not (out / "report.json").exists():
        prune(
            folder, out, pattern=method.pattern or "as-is", values=method.values, embeddings=method.embeddings,
            set=() if method.values else (f"first_token={options.sequence_length / 2}",),
            calibration=rows.calibration_text(), samples=options.samples,
            sequence_length=options.sequence_length, seed=options.seed, dtype=options.dtype, resume=True,
        )  # fmt: skip
    return out


def bits(folder: Path, method: Method) -> float:
    """Bits of a linear weight, from what is not zero on the disk."""
    checkpoint = Checkpoint.open(folder)
    total = count = 0.0
    for weight in Skeleton(checkpoint).weights:
        if weight.block is None:
            continue
        kept = int(weight.stored(checkpoint.tensor(weight.source)).count_nonzero())
        size = weight.out_features * weight.in_features
        each = method.values.bits if method.values else 16
        scales = 16 * weight.out_features * method.values.groups(weight.in_features) if method.values else 0
        total += (size + kept * each if method.pattern else size * each) + scales
        count += size
    return round(total / count, 3)


def table(measured: list[dict[str, Any]], name: str, folder: Path, options: Any) -> str:
    """Markdown: a line for each pattern and grid, nearest beside sweep."""
    lines = [
        "| weights | values | tables | bits a linear weight | nearest | sweep |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for method in methods():
        if row := _find(measured, _wanted(name, folder, method, options)):
            key = method.pattern or "dense", str(method.values or "bf16"), method.embeddings
            found.setdefault(key, {})[method.how] = row
    for (pattern, values, tables), by in found.items():
        shown = [by.get("nearest") or by.get(""), by.get("sweep")]
        cells = [f"{row['perplexity']:.2f} ± {row['standard_error']:.2f}" if row else "" for row in shown]
        lines.append(
            f"| {pattern} | {values} | {tables} | {max(r['bits'] for r in by.values()):.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
