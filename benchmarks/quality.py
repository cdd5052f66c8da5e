"""The quality figures of the README: WikiText-2 perplexity of each solver at each pattern.

    python -m benchmarks.quality "NAME=FOLDER" ... [--windows-2048 N]

Each model is pruned, evaluated at context 512 and 2048, and removed (or kept: --keep). Every figure is
a row of the results file, written as soon as it is known; a row that is there already is not measured again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import models, rows
from llmsparse.eval.evaluate import evaluate

KEY = (*models.IDENTITY, "context", "windows_asked", "data")
FIGURES = ("perplexity", "standard_error", "tokens", "windows", "bos", "dtype", "device")


def main() -> None:
    models.measure(_parse(), _wanted, find, _measure, table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser, patterns=["50%", "2:4", "4:8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], choices=[512, 2048])
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument(
        "--windows-512", type=int, default=64, help="first windows at context 512 (default 64)"
    )
    parser.add_argument("--windows-2048", type=int, help="first windows at context 2048 (default: all)")
    parser.add_argument("--results", default=rows.RESULTS / "quality.json")
    return parser.parse_args()


def _wanted(
    name: str, folder: Path, solver: str, pattern: str, source: str, options: Any
) -> list[dict[str, Any]]:
    """What identifies each figure, a context each: a row that agrees in all of it is not measured again."""
    model = models.identity(name, folder, solver, pattern, source, options) | {
        "data": rows.public(options.data)
    }
    asked = {512: options.windows_512, 2048: options.windows_2048}
    return [{**model, "context": context, "windows_asked": asked[context]} for context in options.contexts]


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
    with models.pruned(folder, source, missing[0], options) as (model, run):
        for row in missing:
            models.say(row, f"context {row['context']}")
            found = evaluate(
                model,
                options.data,
                context=row["context"],
                windows=row["windows_asked"],
                device=options.device,
            )
            known = found | found["sources"][0]
            figures = {key: known[key] for key in FIGURES} | {"evaluation_sha256": known["sha256"]}
            yield {**row, **figures, **run, **rows.provenance(source)}


def table(measured: list[dict[str, Any]], name: str, folder: Path, source: str, options: Any) -> str:
    """The model's rows as the README's markdown, perplexity ± standard error over windows."""
    headings = [_heading(context, options) for context in options.contexts]
    lines = [f"| solver | pattern | {' | '.join(headings)} |", "|---|---|" + "---|" * len(headings)]
    for solver, pattern in models.methods(options):
        wanted = _wanted(name, folder, solver, pattern, source, options)
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
