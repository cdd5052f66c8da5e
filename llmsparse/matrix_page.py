"""The exports of one model on one page: a table, and perplexity against bytes and against speed."""

import functools
from typing import Any

from llmsparse.blocks import Cell, Figure, Figures, Note, Section, Table
from llmsparse.figures import byte_size, duration, percent, plain
from llmsparse.plots import Look, Point, looks, scatter

Row = dict[str, Any]
HEADINGS = (
    "bytes", "bits a weight", "perplexity", "off the source's", "zeros kept", "tokens/s, 1 thread", "2 threads", "check",
)  # fmt: skip
MORE = ("zipped", "loads in")  # where there is room
HONEST = (
    "Of these runtimes llmsparse's own gains from zeros, in bytes and in speed. The others store and multiply every "
    "weight: a zipped download is smaller, and that is all."
)


def html_of(result: Row) -> str:
    """The whole page; raises UserError without matplotlib."""
    from llmsparse.page import laid_out

    most = measure([row for row in result["rows"] if "bytes" in row])
    return laid_out(
        title=f"{result['model']}: its exports",
        subtitle=f"Each measured in its own runtime on {most['tokens']:,} tokens of {most['text']}.",
        warnings=(),
        sections=sections(result),
    )


def sections(result: Row) -> list[Section]:
    written = [row for row in result["rows"] if "bytes" in row]
    drawn = dict(zip([row["name"] for row in written], looks(1, len(written))[1:], strict=True))
    left = [row for row in result["rows"] if row["why"]]
    blocks: list[Table | Note] = [
        Table("", [*map(Cell, ("target", *HEADINGS, *MORE))], [_cells(r, drawn[r["name"]]) for r in written])
    ]
    blocks += map(Note, fewer(written))
    made = [Section("exports", "Exports", HONEST, blocks), _plots(written, drawn)]
    if left:
        notes = [Note(f"{row['name']}: {row['why']}") for row in left]
        made.append(Section("left", "Not written, or failed", "What stood in the way.", notes))
    return made


def measure(rows: list[Row]) -> Row:
    """The row that was measured on the most tokens; the others' perplexities are of a part of its text."""
    return max(rows, key=lambda row: row["tokens"])


def fewer(rows: list[Row]) -> list[str]:
    """Of each row that was measured on fewer tokens than others: how many, and what the source has on them."""
    most = measure(rows)["tokens"]
    return [
        f"{row['name']}: perplexity of {row['tokens']:,} tokens, the source's there is "
        f"{plain(row['perplexity']['source'])}; figures show it where the same change puts it on the whole text"
        for row in rows
        if row["tokens"] < most
    ]


def texts(row: Row) -> list[str]:
    """One row of the table, under ``HEADINGS``."""
    found, speeds = row["perplexity"], row["tokens_per_second"]
    return [
        byte_size(row["bytes"]),
        f"{row['bits_per_weight']:.2f}",
        plain(found["export"]),
        percent(found["change"], 2),
        percent(row["zeros"]["kept"]),
        *(plain(speeds[n]) if n in speeds else "" for n in ("1", "2")),
        "failed" if row["failed"] else "fine",
    ]


def _cells(row: Row, look: Look) -> list[Cell]:
    more = [byte_size(row["zipped_bytes"]), duration(row["load_seconds"])]
    target = Cell(row["name"], note=row["runtime"] or "not run in a runtime", look=look)
    return [target, *map(Cell, [*texts(row), *more])]


def _plots(rows: list[Row], drawn: dict[str, Look]) -> Section:
    source, dense = measure(rows)["perplexity"]["source"], looks(1, 0)[0]
    size = {row["name"]: row["bytes"] / (1 << 20) for row in rows}
    value = {row["name"]: source * (1 + row["perplexity"]["change"]) for row in rows}
    against_bytes = [Point(drawn[name], size[name], value[name]) for name in size]
    against_bytes.insert(0, Point(dense, rows[0]["source_bytes"] / (1 << 20), source))
    figures = [_figure("Against bytes", against_bytes, "weight files, MiB", value, size)]
    for threads, words in (("1", "1 thread"), ("2", "2 threads")):
        fast = {r["name"]: r["tokens_per_second"][threads] for r in rows if threads in r["tokens_per_second"]}
        points = [Point(drawn[name], speed, value[name]) for name, speed in fast.items()]
        if points:
            figures.append(_figure(f"Against speed, {words}", points, "tokens a second", value, fast, source))
    legend = [(dense, "the source"), *((look, name) for name, look in drawn.items())]
    lead = "Perplexity (less is better); speed in each runtime, of one prompt's greedy continuation."
    return Section("plots", "Perplexity against bytes and speed", lead, [Figures("", figures, legend)])


def _figure(
    title: str, points: list[Point], x: str, value: dict[str, float], place: dict[str, float],
    level: float | None = None,
) -> Figure:  # fmt: skip
    """``level``: the source's perplexity, drawn across; bytes have a line that joins what no other beats."""
    said = ", ".join(f"{name} {plain(value[name])} at {plain(place[name])}" for name in place)
    options = {"x": x, "y": "perplexity", "lower": True if level is None else None, "level": level}
    return Figure(title, functools.partial(scatter, points, alt=f"Perplexity by {x}: {said}", **options))
