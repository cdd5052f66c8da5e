"""The quality figures of the README: WikiText-2 perplexity of each solver at each pattern.

    python -m benchmarks.quality "NAME=FOLDER" ... [--windows-2048 N]

Each model is pruned into a temporary folder, evaluated at context 512 and 2048, and removed. Every figure is
a row of the results file, written as soon as it is known; a row that is there already is not measured again.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import rows
from llmsparse.eval.evaluate import evaluate
from llmsparse.prune import prune

KEY = (
    "model", "model_sha256", "solver", "pattern", "context", "windows_asked", "calibration_sha256",
    "samples", "sequence_length", "seed", "data",
)  # fmt: skip
FIGURES = ("perplexity", "standard_error", "tokens", "windows", "bos", "dtype", "device")


def main() -> None:
    options = _parse()
    file = Path(options.results)
    source = options.calibration or rows.calibration_text()
    for name, folder in map(_named, options.models):
        for solver, pattern in [("dense", ""), *((s, p) for p in options.patterns for s in options.solvers)]:
            wanted = [_wanted(name, folder, solver, pattern, source, c, options) for c in options.contexts]
            missing = [row for row in wanted if find(rows.read(file), row) is None]
            if missing:
                for row in _measure(folder, source, missing, options):
                    rows.append(file, row)
        print(f"\n{name}\n\n{table(rows.read(file), name, folder, source, options)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders, or NAME=FOLDER")
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4", "4:8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], choices=[512, 2048])
    parser.add_argument(
        "--calibration", help="default: text/c4/calib.jsonl below $LLMSPARSE_DATA, else builtin"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument(
        "--windows-512", type=int, default=64, help="first windows at context 512 (default 64)"
    )
    parser.add_argument("--windows-2048", type=int, help="first windows at context 2048 (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", default=rows.RESULTS / "quality.json")
    return parser.parse_args()


def _named(argument: str) -> tuple[str, Path]:
    name, equals, folder = argument.rpartition("=")
    return (name, Path(folder)) if equals else (Path(folder).name, Path(folder))


def _wanted(
    name: str, folder: Path, solver: str, pattern: str, source: str, context: int, options: Any
) -> dict[str, Any]:
    """What identifies a figure: a row that agrees in all of it is not measured again."""
    return {
        "model": name,
        "model_sha256": _model_hash(folder),
        "solver": solver,
        "pattern": pattern,
        "context": context,
        "windows_asked": options.windows_512 if context == 512 else options.windows_2048,
        "calibration": rows.public(source),
        "calibration_sha256": rows.sha256(Path(source)) if Path(source).is_file() else source,
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "seed": options.seed,
        "data": rows.public(options.data),
    }


_hashes: dict[Path, str] = {}


def _model_hash(folder: Path) -> str:
    """sha256 of the model's only weight file; of several, of their names and sha256 together."""
    if folder not in _hashes:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        each = [(file.name, rows.sha256(file)) for file in files]
        _hashes[folder] = each[0][1] if len(each) == 1 else rows.sha256_of_text(repr(each))
    return _hashes[folder]


def find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The latest row that ``wanted`` identifies."""
    for row in reversed(measured):
        if all(row.get(key) == wanted[key] for key in KEY):
            return row
    return None


def _measure(
    folder: Path, source: str, missing: list[dict[str, Any]], options: Any
) -> Iterator[dict[str, Any]]:
    """Prune once, then evaluate at each context that ``missing`` (of one solver and pattern) names."""
    first = missing[0]
    with tempfile.TemporaryDirectory(prefix="llmsparse-quality-") as work:
        model, run = folder, {}
        start = time.perf_counter()
        if first["solver"] != "dense":
            _say(first, "pruning")
            model = Path(work, "pruned")
            report = prune(
                folder, model, solver=first["solver"], pattern=(first["pattern"],), calibration=source,
                samples=options.samples, sequence_length=options.sequence_length, seed=options.seed,
                device=options.device,
            )  # fmt: skip
            run = {
                "prune_seconds": round(time.perf_counter() - start, 1),
                "coverage": report["coverage"],
                "tokens_sha256": (report["calibration"] or {}).get("tokens_sha256"),
                "prune_dtype": report["options"]["dtype"],
                "warnings": report["warnings"],
            }
        for row in missing:
            _say(row, f"context {row['context']}")
            found = evaluate(
                model,
                options.data,
                context=row["context"],
                windows=row["windows_asked"],
                device=options.device,
            )
            figures = {key: found[key] for key in FIGURES} | {"evaluation_sha256": found["data_sha256"]}
            yield {**row, **figures, **run, **rows.provenance(source)}


def _say(row: dict[str, Any], doing: str) -> None:
    print(
        f"{time.strftime('%H:%M:%S')} {row['model']} {row['solver']} {row['pattern']}: {doing}",
        file=sys.stderr,
    )


def table(measured: list[dict[str, Any]], name: str, folder: Path, source: str, options: Any) -> str:
    """The model's rows as the README's markdown, perplexity ± standard error over windows."""
    headings = [_heading(context, options) for context in options.contexts]
    lines = [f"| solver | pattern | {' | '.join(headings)} |", "|---|---|" + "---|" * len(headings)]
    for pattern in ("", *options.patterns):
        for solver in options.solvers if pattern else ("dense",):
            wanted = [_wanted(name, folder, solver, pattern, source, c, options) for c in options.contexts]
            cells = [_cell(find(measured, row)) for row in wanted]
            lines.append(f"| {solver} | {pattern} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _heading(context: int, options: Any) -> str:
    count = options.windows_512 if context == 512 else options.windows_2048
    return f"context {context}, first {count} windows" if count else f"context {context}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not yet measured"
    error = row["standard_error"]
    return f"{row['perplexity']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


if __name__ == "__main__":
    main()
