"""An evaluation on a terminal: a table a question, and under them what they were measured on."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from llmsparse.figures import with_error

Row = dict[str, Any]


def show(result: Row) -> RenderableType:
    """What ``evaluate`` returned."""
    against = "against" in result
    parts: list[RenderableType] = [Text(f"model: {result['model']}")]
    if against:
        parts.append(Text(f"against: {result['against']}"))
    if result.get("sources"):
        parts += [_perplexities(result["sources"], against)]
        parts += [_positions(source) for source in result["sources"] if against]
    if result.get("tasks"):
        parts += [_tasks(result["tasks"], against), *_capabilities(result, against)]
    if "generation" in result:
        parts += list(_generation(result["generation"], against))
    return Group(*parts, *map(Text, _measured_on(result)))


def _share(value: float | None, error: float | None = None) -> str:
    """A share in percent with its standard error; a dash where it is not known."""
    return "-" if value is None else f"{with_error(value, error, 100)} %"


def _figure(value: float | None, error: float | None = None) -> str:
    return "-" if value is None else with_error(value, error)


def _perplexities(sources: list[Row], against: bool) -> Table:
    headings = ["text", "perplexity", "per word", "per byte"]
    rows = [
        [
            s["name"],
            _figure(s["perplexity"], s["standard_error"]),
            _figure(s["word_perplexity"], s["word_standard_error"]),
            _figure(s["byte_perplexity"], s["byte_standard_error"]),
        ]
        for s in sources
    ]
    if against:
        headings += ["dense", "KL (nats)", "top-1 agreement", "top-5"]
        for row, s in zip(rows, sources, strict=True):
            row += [
                _figure(s["dense_perplexity"], s["dense_standard_error"]),
                _figure(s["kl"], s["kl_standard_error"]),
                _share(s["top1_agreement"]),
                _share(s["top5_agreement"]),
            ]
    return _table("Perplexity", headings, rows)


def _positions(source: Row) -> Table:
    headings = ["position in the window", "perplexity", "dense", "KL (nats)", "top-1 agreement", "top-5"]
    rows = [
        [
            f"{p['from']} to {p['to']}",
            _figure(p["perplexity"]),
            _figure(p["dense_perplexity"]),
            _figure(p["kl"]),
            _share(p["top1_agreement"]),
            _share(p["top5_agreement"]),
        ]
        for p in source["positions"]
    ]
    return _table(f"Fidelity by position, {source['name']}", headings, rows)


def _tasks(tasks: list[Row], against: bool) -> Table:
    headings = ["task", "metric", "score", "guessing", "items"]
    if against:
        headings += ["dense", "lost / won", "of the dense ability kept (95 %)"]
    rows = []
    for t in tasks:
        score = _figure if t.get("unit") == "score" else _share
        row = [t["task"], t["metric"] or "-", score(t["value"], t["standard_error"])]
        whole = t.get("items") is not None
        row += [_share(t["chance"]) if score is _share else "-"] if whole else ["-"]
        row += [f"{t['items']} of {t['of']}" if whole else "-"]
        if against:
            row += [
                score(t["dense_value"], t["dense_standard_error"]),
                f"{t['lost']} / {t['gained']}" if "lost" in t else "-",
                t["ability"],
            ]
        rows.append(row)
    return _table("Zero-shot", headings, rows)


def _capabilities(result: Row, against: bool) -> Iterator[RenderableType]:
    groups = result["capabilities"]
    shown = []
    for group in groups:
        kept = f"{group['ability_kept']:.0%} kept" if group["status"] == "measured" else group["status"]
        marks = {
            t: "" if t in group["measurable"] or not against else " (not measurable)" for t in group["tasks"]
        }
        covered = ", ".join(task + mark for task, mark in marks.items()) or "no task covers it"
        shown.append([group["capability"], kept, covered] if against else [group["capability"], covered])
    headings = ["capability", "ability", "tasks"] if against else ["capability", "tasks"]
    yield _table("Capabilities", headings, shown, left=len(headings))
    if result["lost_most"] is not None:
        yield Text(f"lost most: {result['lost_most']}")
    elif against:
        known = any(group["status"] == "measured" for group in groups)
        yield Text(f"lost most: {'nothing was lost' if known else 'not measurable on these items'}")


def _generation(generation: Row, against: bool) -> Iterator[RenderableType]:
    yield Rule(Text(f"Greedy continuations, {generation['new_tokens']} tokens"))
    for sample in generation["samples"]:
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("text", Text(_line(sample["prompt"])))
        if against:
            table.add_row("dense", Text(_line(sample["dense_continuation"])))
        table.add_row("sparse" if against else "model", Text(_line(sample["continuation"])))
        yield table
        yield Text("")
    rates = f"repeated 4-grams {_share(generation['repetition'])}, ended {_share(generation['terminated'])}"
    if against:
        rates += (
            f"; dense: {_share(generation['dense_repetition'])}, {_share(generation['dense_terminated'])}"
        )
    yield Text(rates)


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _measured_on(result: Row) -> Iterator[str]:
    for source in result.get("sources", ()):
        yield (
            f"{source['name']}: {source['data']}, sha256 {source['sha256']}; {source['tokens']:,} tokens scored "
            f"in {source['windows']} windows"
        )
    if result.get("sources"):
        stride = f", one every {result['stride']} tokens" if result["stride"] else ", not overlapping"
        yield f"context {result['context']}{stride}; BOS: {result['bos']}; ± is the standard error over windows"
    for task in result.get("tasks", ()):
        if not task.get("group"):
            yield f"{task['task']}: {task['data']}" + (f", sha256 {task['sha256']}" if task["sha256"] else "")
    if result.get("tasks"):
        yield "zero-shot: no examples in the prompt unless the task has its own; ± is the standard error over items"
    yield f"dtype {result['dtype']}, device {result['device']}"


def _table(title: str, headings: list[str], rows: list[list[str]], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
