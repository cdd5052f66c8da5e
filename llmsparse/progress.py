"""Progress of a long run: a bar on a terminal, silence elsewhere."""

from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


class Progress(Protocol):
    """What a long run tells while it works; any object with these methods will do."""

    def start(self, phase: str, total: int) -> None:
        """A phase of ``total`` steps begins; a phase of that name that ran before begins anew."""

    def advance(self, phase: str, detail: str = "") -> None:
        """One step of ``phase`` is done; ``detail`` says something of it."""

    def tell(self, phase: str, detail: str) -> None:
        """Something of ``phase`` between two steps, for example the latest error."""

    def now(self, activity: str) -> None:
        """What is being done at this moment, in the phase that began last."""

    def message(self, text: str) -> None:
        """Something to read that is no step."""


class Quiet:
    """Progress that says nothing."""

    def start(self, phase: str, total: int) -> None:
        """Nothing."""

    def advance(self, phase: str, detail: str = "") -> None:
        """Nothing."""

    def tell(self, phase: str, detail: str) -> None:
        """Nothing."""

    def now(self, activity: str) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Bar:
    """A line for each phase on ``stream``: its bar, count, time passed and left, activity and latest detail.

    A context manager: leaving it gives the terminal back.
    """

    def __init__(self, stream: TextIO) -> None:
        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[activity]}", markup=False, style="dim"),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(file=stream),
        )
        self._task: dict[str, int] = {}  # phase -> rich's number of its line

    def start(self, phase: str, total: int) -> None:
        """Show a line for ``phase``, or start its line again."""
        if phase in self._task:
            self._rich.remove_task(self._task.pop(phase))  # type: ignore[arg-type]
        self._add(phase, total)

    def advance(self, phase: str, detail: str = "") -> None:
        """Count one step of ``phase``."""
        if phase not in self._task:
            self._add(phase, None)
        told = {"detail": detail} if detail else {}
        self._rich.update(self._task[phase], advance=1, activity="", **told)  # type: ignore[arg-type]

    def tell(self, phase: str, detail: str) -> None:
        """Show ``detail`` in the line of ``phase``."""
        if phase in self._task:
            self._rich.update(self._task[phase], detail=detail)  # type: ignore[arg-type]

    def now(self, activity: str) -> None:
        """Show ``activity`` in the newest line."""
        if self._task:
            self._rich.update(list(self._task.values())[-1], activity=activity)  # type: ignore[arg-type]

    def _add(self, phase: str, total: int | None) -> None:
        self._task[phase] = self._rich.add_task(phase, total=total, activity="", detail="")

    def message(self, text: str) -> None:
        """Print ``text`` above the lines."""
        self._rich.console.print(Text(text))

    def __enter__(self) -> "Bar":
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()


def progress_for(stream: TextIO, json: bool = False) -> Quiet | Bar:
    """A bar when ``stream`` is a terminal and no machine reads along (``json``), else silence."""
    return Bar(stream) if stream.isatty() and not json else Quiet()
