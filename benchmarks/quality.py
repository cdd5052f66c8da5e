"""The quality figures of the README: perplexity of each method at each pattern, its time and its memory.

    python -m benchmarks.quality "NAME=FOLDER" ... [--solvers refit:wanda alps+targets=dense+reconstruct=1]

Each model is pruned, evaluated on every text at every context, and removed (or kept: --keep). Every figure is
a row of the results file, written as soon as it is known; a row that is there already is not measured again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import models, rows
from llmsparse.device import pick_device
from llmsparse.eval.evaluate import evaluate

KEY = (*models.IDENTITY, "context", "windows_asked", "data", "device", "dtype")
FIGURES = ("perplexity", "standard_error", "tokens", "windows", "bos")


def main() -> None:
    models.measure(_parse(), _wanted, find, _measure, table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser, patterns=["50%", "2:4", "4:8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], choices=[512, 2048])
    parser.add_argument("--data", nargs="+", default=["wikitext2"])
    parser.add_argument("--plot", help="a file for perplexity against seconds of pruning, SVG or PNG")
    parser.add_argument(
        "--windows-512", type=_windows, default=64, help="first windows at context 512, or all (default 64)"
    )
    parser.add_argument("--windows-2048", type=_windows, help="first windows at context 2048 (default all)")
    parser.add_argument("--results", default=rows.RESULTS / "quality.json")
    return parser.parse_args()


def _windows(text: str) -> int | None:
    return None if text == "all" else int(text)


def _wanted(
    name: str, folder: Path, solver: str, pattern: str, source: str, options: Any
) -> list[dict[str, Any]]:
    """What identifies each figure, a context each: a row that agrees in all of it is not measured again."""
    model = models.identity(name, folder, solver, pattern, source, options)
    model |= {"device": _device(options.device), "dtype": options.dtype}
    asked = {512: options.windows_512, 2048: options.windows_2048}
    return [
        {**model, "data": rows.public(data), "context": context, "windows_asked": asked[context]}
        for data in options.data
        for context in options.contexts
    ]


def _device(device: str) -> str:
    """Its type; a GPU that is asked for need not be here, as long as only its rows are shown."""
    return pick_device(device).type if device == "auto" else device.partition(":")[0]


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
            models.say(row, f"{row['data']}, context {row['context']}")
            found = evaluate(
                model,
                next(data for data in options.data if rows.public(data) == row["data"]),
                context=row["context"],
                windows=row["windows_asked"],
                device=options.device,
                dtype=options.dtype,
            )
            known = found | found["sources"][0]
            figures = {key: known[key] for key in FIGURES} | {"evaluation_sha256": known["sha256"]}
            yield {**row, **figures, **run, **rows.provenance(source)}


def table(measured: list[dict[str, Any]], name: str, folder: Path, source: str, options: Any) -> str:
    """The model's rows as markdown: perplexity ± standard error over windows, and what the first text says of each.

    ``damage removed`` is the share of sparsegpt's perplexity above the dense model's that a method does not add.
    """
    places = [(data, context) for data in options.data for context in options.contexts]
    headings = [_heading(data, context, options) for data, context in places]
    lines = [
        f"| solver | pattern | {' | '.join(headings)} | damage removed | seconds | of these solving | peak memory |",
        "|---|---|" + "---|" * (len(headings) + 4),
    ]
    found: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for solver, pattern in models.methods(options):
        wanted = _wanted(name, folder, solver, pattern, source, options)
        found[solver, pattern] = [find(measured, row) for row in wanted]
    for (solver, pattern), cells in found.items():
        shown = " | ".join(map(_cell, cells))
        dense, base = found["dense", ""][0], (found.get(("sparsegpt", pattern)) or [None])[0]
        lines.append(
            f"| {solver} | {pattern} | {shown} | {_removed(dense, base, cells[0])} | {_cost(cells[0])} |"
        )
    if options.plot:
        _plot(name, found, Path(options.plot))
    return "\n".join(lines)


def _removed(dense: dict[str, Any] | None, base: dict[str, Any] | None, row: dict[str, Any] | None) -> str:
    if dense is None or base is None or row is None or row is dense:
        return ""
    damage = base["perplexity"] - dense["perplexity"]
    return f"{(base['perplexity'] - row['perplexity']) / damage:.1%}"


def _cost(row: dict[str, Any] | None) -> str:
    if row is None or row.get("prune_seconds") is None:
        return " | | "
    solving, peak = row.get("solve_seconds"), row.get("peak_memory")
    shown = f"{solving:.0f} | {peak / 2**20:.0f} MiB" if solving is not None and peak is not None else " | "
    return f"{row['prune_seconds']:.0f} | {shown}"


def _plot(name: str, found: dict[tuple[str, str], list[dict[str, Any] | None]], file: Path) -> None:
    """Perplexity on the first text against seconds of pruning, a colour for each pattern."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    timed = [(solver, pattern, cells[0]) for (solver, pattern), cells in found.items() if cells[0]]
    points = [
        (p, row["prune_seconds"], row["perplexity"], s) for s, p, row in timed if row.get("prune_seconds")
    ]
    if not points:
        raise SystemExit(
            "error: no row has seconds of pruning to draw; rows measured beside others have none"
        )
    for number, pattern in enumerate(dict.fromkeys(point[0] for point in points)):
        shown = [point for point in points if point[0] == pattern]
        axes.scatter(*zip(*[point[1:3] for point in shown], strict=True), color=f"C{number}", label=pattern)
        for _, seconds, perplexity, solver in shown:
            axes.annotate(
                solver, (seconds, perplexity), (0, 5), textcoords="offset points", fontsize=7, ha="center"
            )
    axes.margins(0.2)
    axes.set(xlabel="seconds of pruning", ylabel="perplexity", title=name)
    for axis, values in (("x", [point[1] for point in points]), ("y", [point[2] for point in points])):
        axes.set(**{f"{axis}scale": "log" if max(values) > 10 * min(values) else "linear"})
    axes.legend()
    figure.savefig(file)


def _heading(data: str, context: int, options: Any) -> str:
    count = options.windows_512 if context == 512 else options.windows_2048
    place = f"{rows.public(data)}, context {context}" if len(options.data) > 1 else f"context {context}"
    return f"{place}, first {count} windows" if count else place


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not yet measured"
    error = row["standard_error"]
    return f"{row['perplexity']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


if __name__ == "__main__":
    main()
