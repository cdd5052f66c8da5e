"""What a report is made of, before it is laid out: sections of tables, plots, samples, facts and notes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmsparse.plots import Look


class Cell(NamedTuple):
    """What stands in a table: text, and a quieter line under it."""

    text: str
    note: str = ""
    mark: str = ""  # a word in a frame, such as "lost most"
    look: Look | None = None  # a marker in front


class Table(NamedTuple):
    title: str
    headings: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    words: int = 1  # the first so many columns hold words, the others figures
    kind: str = "table"


class Figure(NamedTuple):
    """A plot with its title; it is drawn only where plots are shown."""

    title: str
    draw: Callable[[], str]
    look: Look | None = None


class Figures(NamedTuple):
    title: str
    figures: Sequence[Figure]
    legend: Sequence[tuple[Look, str]] = ()
    kind: str = "figures"


class Sample(NamedTuple):
    prompt: str
    texts: Sequence[tuple[str, str]]  # (whose, continuation)


class Samples(NamedTuple):
    title: str
    samples: Sequence[Sample]
    is_open: bool
    kind: str = "samples"


class Facts(NamedTuple):
    """Names and values, folded away on a page."""

    title: str
    rows: Sequence[tuple[str, str]]
    command: str = ""
    kind: str = "facts"


class Note(NamedTuple):
    text: str
    kind: str = "note"


Block = Table | Figures | Samples | Facts | Note


class Section(NamedTuple):
    anchor: str
    title: str
    lead: str
    blocks: Sequence[Block]
