"""The zero-shot figures of the README: local tasks, each solver at each pattern, beside the dense model.

    python -m benchmarks.zeroshot "NAME=FOLDER" ... [--limit 500] [--tasks ...] [--keep FOLDER]

Models are pruned as ``benchmarks.quality`` prunes them. A row a task is written as soon as it is known; one that
is there already is not measured again.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import models, rows
from llmsparse.eval.ability import beside, capabilities, lost_most
from llmsparse.eval.evaluate import evaluate
from llmsparse.figures import with_error

KEY = (*models.IDENTITY, "limit", "task")
TASKS = ["arc_easy", "hellaswag", "lambada_openai", "winogrande", "copa"]
FACTS = ("dtype", "device", "shared_prefixes")


def main() -> None:
    models.measure(_parse(), _wanted, find, _measure, table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser, patterns=["50%", "2:4"])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, help="first items of each task (default: all)")
    parser.add_argument("--results", default=rows.RESULTS / "zeroshot.json")
    return parser.parse_args()


def _wanted(
    name: str, folder: Path, solver: str, pattern: str, source: str, options: Any
) -> list[dict[str, Any]]:
    """What identifies each row, a task each."""
    model = models.identity(name, folder, solver, pattern, source, options) | {"limit": options.limit}
    return [{**model, "task": task} for task in options.tasks]


def find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The latest row that ``wanted`` identifies."""
    return next((r for r in reversed(measured) if all(r.get(k) == wanted[k] for k in KEY)), None)


def _measure(
    folder: Path, source: str, missing: list[dict[str, Any]], options: Any
) -> Iterator[dict[str, Any]]:
    tasks = ",".join(row["task"] for row in missing)
    with models.pruned(folder, source, missing[0], options) as (model, facts):
        models.say(missing[0], f"scoring {tasks}")
        found = evaluate(model, tasks=tasks, limit=options.limit, device=options.device, dtype=options.dtype)
    facts |= {key: found[key] for key in FACTS} | {"seconds_all_tasks": found["seconds"]["tasks"]}
    for wanted, row in zip(missing, found["tasks"], strict=True):
        yield {**wanted, **row, **facts, **rows.provenance(source)}


def table(measured: list[dict[str, Any]], name: str, folder: Path, source: str, options: Any) -> str:
    """The model's rows as the README's markdown: scores ± standard error, then the ability kept."""
    scores, kept = [_head(options.tasks)], [_head([*options.tasks, "lost most"])]
    dense: list[dict[str, Any] | None] = []
    for solver, pattern in models.methods(options):
        found = [find(measured, row) for row in _wanted(name, folder, solver, pattern, source, options)]
        dense = dense or found
        scores.append(_line(solver, pattern, map(_score, found)))
        pairs = [beside(row, other) for row, other in zip(found, dense, strict=True) if row and other]
        if solver != "dense" and len(pairs) == len(options.tasks):
            most = lost_most(capabilities(pairs)) or "nothing"
            kept.append(_line(solver, pattern, [*(row["ability"] for row in pairs), most]))
    return "\n".join(
        [*scores, "", "Share of the dense model's ability above chance that is kept:", "", *kept]
    )


def _head(columns: list[str]) -> str:
    return f"| solver | pattern | {' | '.join(columns)} |\n" + "|---" * (2 + len(columns)) + "|"


def _line(solver: str, pattern: str, cells: Iterable[str]) -> str:
    return f"| {solver} | {pattern} | {' | '.join(cells)} |"


def _score(row: dict[str, Any] | None) -> str:
    return with_error(row["value"], row["standard_error"], 100) if row else "not yet measured"


if __name__ == "__main__":
    main()
