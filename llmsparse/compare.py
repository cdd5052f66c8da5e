"""Runs side by side: a row for each, what must not be compared, and which answers changed."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmsparse.errors import UserError
from llmsparse.eval.ability import flips as count_flips
from llmsparse.figures import byte_size, percent, with_error
from llmsparse.measures import Key, Measure, labels, measures
from llmsparse.runs import Run, load_runs

Row = dict[str, Any]
ACROSS = 5  # runs in one table on a terminal; more make another table, which begins with the first run again
CONDITIONS = {  # what must be alike wherever the same text or task was measured, as a warning calls it
    "context": "contexts",
    "stride": "strides",
    "tokens": "numbers of tokens scored",
    "metric": "metrics",
    "items": "numbers of items",
    "bos": "BOS rules",
    "sha256": "data hashes (the name is the same, the data is not)",
    "dtype": "number formats of the forward pass",
}
UNITS = ("word", "byte")  # what perplexity is also given by, so that different tokenizers compare
MUST_AGREE = {
    "perplexity": ("context", "stride", "tokens", "bos", "sha256", "dtype"),
    "task": ("metric", "items", "bos", "sha256", "dtype"),
}


def compare(runs: tuple[str, ...]) -> dict[str, Any]:
    """Read each of ``runs`` (see ``load_runs``) and lay their figures side by side.

    Returns ``rows``: run, solver, pattern, sparsity, weight_bytes and ``measures``, which gives perplexity or
    accuracy with its standard error by name; ``columns``, those names in order; ``warnings``, a line for each
    way in which figures must not be compared; and ``flips``, for each task and each run after the first, the
    answers that were right in the first run and are wrong now (``lost``) and the reverse (``gained``), where
    both kept their answers to the same items. Raises UserError for fewer than two runs.
    """
    if len(runs) < 2:
        raise UserError(f"compare takes two runs or more and was given {len(runs)}; name another RUN")
    loaded = load_runs(runs)
    names = labels(loaded)
    rows = [_row(run, names) for run in loaded]
    shown = {name for row in rows for name in row["measures"]}
    return {
        "runs": [run.name for run in loaded],
        "columns": [column for name in names.values() for column in _columns(name) if column in shown],
        "rows": rows,
        "flips": [flip for run in loaded[1:] for flip in flips(loaded[0], run, names)],
        "warnings": differences(loaded),
    }


def _columns(name: str) -> list[str]:
    return [name, *(f"{name}, per {unit}" for unit in UNITS)]


def _row(run: Run, names: dict[Key, str]) -> Row:
    found: dict[str, Row] = {}
    for key, measure in measures(run).items():
        about: Row = {
            k: measure.row[k] for k in ("metric", "items", "tokens", "context", "unit") if k in measure.row
        }
        figure = {"value": measure.value, "standard_error": measure.error}
        found[names[key]] = {"kind": key[0], **figure, **about}
        for unit in UNITS if key[0] == "perplexity" else ():
            if (value := measure.row.get(f"{unit}_perplexity")) is not None:
                error = measure.row.get(f"{unit}_standard_error")
                figure = {"value": value, "standard_error": error}
                found[f"{names[key]}, per {unit}"] = {"kind": key[0], **figure}
    made = {"solver": run.solver, "pattern": run.pattern, "sparsity": run.sparsity}
    return {"run": run.name, **made, "weight_bytes": run.weight_bytes, "measures": found}


def flips(first: Run, run: Run, names: dict[Key, str]) -> Iterator[Row]:
    """For each task whose items both runs answered: how many answers flipped, each way."""
    others = measures(first)
    for key, measure in measures(run).items():
        if key not in others or not _same_items(others[key].row, measure.row):
            continue
        before, after = others[key].row["answers"], measure.row["answers"]
        lost, gained = count_flips(after, before)
        both = {"run": run.name, "against": first.name, "task": names[key]}
        yield {**both, "lost": lost, "gained": gained, "items": len(after)}


def _same_items(one: Row, other: Row) -> bool:
    """A hub dataset has no hash: there the name must do."""
    if not one.get("answers") or not other.get("answers") or len(one["answers"]) != len(other["answers"]):
        return False
    key = "data" if one.get("sha256") is None and other.get("sha256") is None else "sha256"
    return one.get(key) is not None and one[key] == other.get(key)


# ---- what must not be compared


def differences(runs: Sequence[Run]) -> list[str]:
    """A line for each way in which the runs' figures of the same text or task were measured differently."""
    lines: dict[tuple[str, str], list[str]] = {}  # (what differs, who has which) -> texts and tasks
    for kind, name in dict.fromkeys(key[:2] for run in runs for key in measures(run)):
        rows = _comparable(runs, kind, name)
        values = {
            condition: {run: _values(condition, found) for run, found in rows.items() if found}
            for condition in MUST_AGREE[kind]
        }
        differing = [condition for condition, found in values.items() if len(set(found.values())) > 1]
        if "context" in differing and "tokens" in differing:
            differing.remove("tokens")  # follows from the other
        for condition in differing:
            lines.setdefault((CONDITIONS[condition], _who(values[condition])), []).append(name)
    return [f"{', '.join(names)}: {what} differ: {who}" for (what, who), names in lines.items()]


def _comparable(runs: Sequence[Run], kind: str, name: str) -> dict[str, list[Measure]]:
    """Each run's figures of one text or task: those under conditions that all have, else all of them."""
    found = {r.name: {k: m for k, m in measures(r).items() if k[:2] == (kind, name)} for r in runs}
    having = [set(figures) for figures in found.values() if figures]
    common = set.intersection(*having) if having else set()
    return {
        run: [m for key, m in figures.items() if key in common or not common]
        for run, figures in found.items()
    }


def _values(key: str, rows: Sequence[Measure]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(measure.row.get(key) for measure in rows))


def _who(values: dict[str, tuple[Any, ...]]) -> str:
    """Each value with the runs that have it."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for run, value in values.items():
        groups.setdefault(value, []).append(run)
    return "; ".join(f"{_say(value)} ({', '.join(members)})" for value, members in groups.items())


def _say(value: tuple[Any, ...]) -> str:
    texts = ["none" if v is None else v if isinstance(v, str) else f"{v:,}" for v in value]
    return " and ".join(text[:12] if len(text) == 64 else f"{text:.100}" for text in texts)


# ---- on a terminal


def show(result: dict[str, Any]) -> Group:
    """What ``compare`` returned, for a terminal: a column a run, a line a figure, then flips and warnings."""
    first, *others = result["rows"]
    step = ACROSS - 1
    parts: list[RenderableType] = [
        _table(result["columns"], [first, *others[i : i + step]]) for i in range(0, len(others), step)
    ]
    parts.append(Text("± is one standard error; perplexity: less is better; tasks: % of items right"))
    if result["flips"]:
        parts.append(_flip_table(result["flips"]))
    parts += [Text(f"warning: {line}", style="yellow") for line in result["warnings"]]
    return Group(*parts)


def _table(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(Text(row["run"]), justify="right", overflow="fold")
    table.add_row("solver", *(Text(row["solver"] or "") for row in rows))
    table.add_row("pattern", *(Text(row["pattern"] or "") for row in rows))
    table.add_row("zeros", *(percent(row["sparsity"]) for row in rows))
    table.add_row("weight files", *(byte_size(row["weight_bytes"]) for row in rows), end_section=True)
    for name in columns:
        found = [row["measures"].get(name) for row in rows]
        table.add_row(_named(name, found), *map(_figure, found))
    return table


def _named(name: str, found: Sequence[Row | None]) -> Text:
    """The figure's name, and quieter what kind of figure it is."""
    kind, metric = next(((m["kind"], m.get("metric")) for m in found if m), ("", None))
    return Text(name).append(f" {metric or 'accuracy' if kind == 'task' else kind}", style="dim")


def _figure(measure: Row | None) -> str:
    if measure is None:
        return ""
    share = measure["kind"] == "task" and measure.get("unit") != "score"
    return with_error(measure["value"], measure["standard_error"], 100.0 if share else 1.0)


def _flip_table(flips: Sequence[Row]) -> Table:
    table = Table(title=Text(f"Answers that changed against {flips[0]['against']}"), title_justify="left")
    for heading in ("run", "task", *FLIPPED):
        table.add_column(heading, justify="right" if heading in FLIPPED else "left", overflow="fold")
    for flip in flips:
        counts = (f"{flip[key]:,}" for key in ("lost", "gained", "items"))
        table.add_row(Text(flip["run"]), Text(flip["task"]), *counts)
    return table


FLIPPED = ("right, now wrong", "wrong, now right", "items")
