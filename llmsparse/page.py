"""Runs on one page: HTML that needs nothing but itself, or markdown."""

import html as escaping
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmsparse import __version__
from llmsparse.atomic import check_place, write_whole
from llmsparse.blocks import Block, Cell, Facts, Figures, Note, Samples, Section, Table
from llmsparse.compare import differences
from llmsparse.errors import UserError
from llmsparse.figures import percent, with_error
from llmsparse.measures import measures
from llmsparse.plots import own_ids, swatch
from llmsparse.runs import Run, load_runs
from llmsparse.sections import View, sections


def report(
    runs: tuple[str, ...], *, html: str | Path | None = None, markdown: str | Path | None = None
) -> dict[str, Any]:
    """Write what the runs (see ``load_runs``) did and are worth to one page, ``html``, ``markdown`` or both.

    A file appears whole or stays as it was. Returns ``runs`` (their names), ``html``, ``markdown`` (where
    they were written) and ``warnings``: what must not be compared, and what pruning warned of. Raises
    UserError without a file to write or a run to read, and for HTML without matplotlib.
    """
    if html is None and markdown is None:
        raise UserError("report was given no file to write; add --html report.html or --markdown report.md")
    if not runs:
        raise UserError("report was given no run; name a pruned folder or a file that llmsparse eval wrote")
    loaded = load_runs(runs)
    targets = [(html, html_of), (markdown, markdown_of)]
    for file, _ in targets:
        check_place(file)
    written = [(Path(file), make(loaded)) for file, make in targets if file is not None]
    for path, text in written:
        write_whole(path, text)
    return {
        "runs": [run.name for run in loaded],
        "html": None if html is None else str(html),
        "markdown": None if markdown is None else str(markdown),
        "warnings": [*differences(loaded), *(f"{r.name}: {text}" for r in loaded for text in _warnings(r))],
    }


def _warnings(run: Run) -> list[str]:
    return (run.report or {}).get("warnings") or []


# ---- HTML


def html_of(runs: list[Run]) -> str:
    """The whole page; raises UserError without matplotlib."""
    return laid_out(
        title=_title(runs),
        subtitle=_subtitle(runs),
        tiles=_tiles(runs),
        warnings=differences(runs),
        sections=sections(runs),
    )


def laid_out(
    *, title: str, subtitle: str, warnings: Sequence[str], sections: Sequence[Section],
    tiles: Sequence[tuple[str, str, str]] = (),
) -> str:  # fmt: skip
    """One page of sections, self-contained."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    numbers = iter(range(1, 1 << 30))

    def drawn(figure: Any) -> Markup:
        return Markup(own_ids(figure.draw(), f"plot{next(numbers)}-"))

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"drawn": drawn, "swatch": lambda look: Markup(swatch(look))}
    template = environment.from_string((files("llmsparse") / "page.html.jinja").read_text("utf-8"))
    parts = {"title": title, "subtitle": subtitle, "tiles": tiles, "warnings": warnings, "sections": sections}
    return template.render(**parts, version=__version__)


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return "Pruned language models: what was done to each, and what each is still worth."
    run = runs[0]
    if run.report is None:
        return f"An evaluation of {run.model or run.name}."
    solver, pattern = run.solver or "an unnamed solver", run.pattern or "its pattern"
    return f"{run.report.get('model')}, pruned by {solver} to {pattern}: what was done, and what is left."


def _tiles(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The few figures that one run is about: (name, figure, beside it)."""
    if len(runs) > 1:
        return []
    run, view, tiles = runs[0], View.of(list(runs)), []
    if run.sparsity is not None:
        tiles.append(("zeros", percent(run.sparsity), "of the pruned weights"))
    for key, measure in list(measures(run).items())[:1]:
        dense = view.beside(run, key, measure)
        kind = measure.row.get("metric") or "right, %" if measure.is_task else "perplexity"
        beside = f"dense {dense}" if dense else "no dense model beside"
        tiles.append((f"{view.labels[key]} {kind}", str(measure), beside))
    for row in [row for row in run.sources if "kl" in row][:1]:
        agreement = percent(row.get("top1_agreement"))
        figure = with_error(row["kl"], row.get("kl_standard_error"))
        tiles.append(("KL, nats a token", figure, f"top-1 agreement {agreement}" if agreement else ""))
    if run.lost_most:
        kept = run.capabilities[run.lost_most].get("ability_kept")
        tiles.append(("lost most", run.lost_most, f"{percent(kept, 0)} of the ability kept"))
    return tiles


# ---- markdown


def markdown_of(runs: list[Run]) -> str:
    """The tables, samples and hashes as markdown; plots are left to HTML."""
    parts = [f"# {_plain(_title(runs))}", _plain(_subtitle(runs))]
    if differs := differences(runs):
        parts += ["**These figures must not be compared:**", "\n".join(f"- {_plain(d)}" for d in differs)]
    for section in sections(runs):
        if any(isinstance(block, Figures) for block in section.blocks) and not any(
            map(_block, section.blocks)
        ):
            continue  # it has plots only
        parts += [f"## {_plain(section.title)}", *_section(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    return [_plain(section.lead), *map(_block, section.blocks)]


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return "\n\n".join(filter(None, [_heading(block.title), _markdown_table(block)]))
    if isinstance(block, Facts):
        rows = [[Cell(name), Cell(value)] for name, value in block.rows]
        table = _markdown_table(Table("", [Cell(""), Cell("")], rows, words=2))
        return "\n\n".join(
            filter(None, [_heading(block.title), block.command and _fenced(block.command), table])
        )
    if isinstance(block, Samples):
        texts = [part for s in block.samples for part in _sample(s.prompt, s.texts)]
        return "\n\n".join([_heading(block.title), *texts])
    return _plain(block.text) if isinstance(block, Note) else ""


def _heading(title: str) -> str:
    return f"### {_plain(title)}" if title else ""


def _sample(prompt: str, texts: Sequence[tuple[str, str]]) -> list[str]:
    parts = ["Text:", _fenced(prompt)]
    for who, text in texts:
        parts += [f"{_plain(who)}:", _fenced(text)]
    return parts


def _fenced(text: str) -> str:
    """In a fence that is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}text\n{text}\n{fence}"


def _markdown_table(table: Table) -> str:
    sides = ["---" if i < table.words else "---:" for i in range(len(table.headings))]
    lines = [[_cell(cell) for cell in table.headings], sides]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    note = f" ({_plain(cell.note)})" if cell.note else ""
    mark = f" **{_plain(cell.mark)}**" if cell.mark else ""
    return _plain(cell.text) + note + mark


def _plain(text: str) -> str:
    """Text that is nothing but text in markdown, in one line."""
    text = escaping.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
