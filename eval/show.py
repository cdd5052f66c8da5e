"""An evaluation on a terminal: a table a question, and under them what they were measured on."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

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


def number(value: float | None, error: float | None = None, digits: int = 2) -> str:
    """A figure with its standard error; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def percent(value: float | None, error: float | None = None) -> str:
    """A share in percent with its standard error."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def _perplexities(sources: list[Row], against: bool) -> Table:
    headings = ["text", "perplexity", "per word", "per byte"]
    rows = [
        [
            s["name"],
            number(s["perplexity"], s["standard_error"]),
            number(s["word_perplexity"], s["word_standard_error"]),
            number(s["byte_perplexity"], s["byte_standard_error"], 4),
        ]
        for s in sources
    ]
    if against:
        headings += ["dense", "KL (nats)", "top-1 agreement", "top-5"]
        for row, s in zip(rows, sources, strict=True):
            row += [
                number(s["dense_perplexity"], s["dense_standard_error"]),
                number(s["kl"], s["kl_standard_error"], 4),
                percent(s["top1_agreement"]),
                percent(s["top5_agreement"]),
            ]
    return _table("Perplexity", headings, rows)


def _positions(source: Row) -> Table:
    headings = ["position in the window", "perplexity", "dense", "KL (nats)", "top-1 agreement", "top-5"]
    rows = [
        [
            f"{p['from']} to {p['to']}",
            number(p["perplexity"]),
            number(p["dense_perplexity"]),
            number(p["kl"], digits=4),
            percent(p["top1_agreement"]),
            percent(p["top5_agreement"]),
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
        row = [t["task"], t["metric"] or "-", percent(t["value"], t["standard_error"])]
        whole = t.get("items") is not None
        row += [percent(t["chance"]), f"{t['items']} of {t['of']}"] if whole else ["-", "-"]
        if against:
            row += [
                percent(t["dense_value"], t["dense_standard_error"]),
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
        covered = ", ".join(group["tasks"]) or "no task covers it"
        shown.append([group["capability"], kept, covered] if against else [group["capability"], covered])
    headings = ["capability", "ability", "tasks"] if against else ["capability", "tasks"]
    yield _table("Capabilities", headings, shown, left=len(headings))
    if result["lost_most"] is not None:
        yield Text(f"lost most: {result['lost_most']}")
    elif against:
        yield Text("lost most: not measurable; the dense model is not above chance on these items")


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
    rates = f"repeated 4-grams {percent(generation['repetition'])}, ended {percent(generation['terminated'])}"
    if against:
        rates += (
            f"; dense: {percent(generation['dense_repetition'])}, {percent(generation['dense_terminated'])}"
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
    for number_, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number_ < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
