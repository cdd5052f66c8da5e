"""The plots of a report: inline SVG that takes its colours and its typeface from the page around it."""

import functools
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any, NamedTuple

from llmsparse.errors import UserError

WIDTH = 380  # CSS pixels; the text is this size on the page when the plot is as wide
FONT = 11
INK, QUIET, GRID = "#010101", "#010102", "#010103"  # stand for the page's colours until the SVG is written
COLOURS = tuple(f"#0102{i:02x}" for i in range(9))  # the first is the dense model's
VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--grid"} | {
    c: f"--series-{i}" for i, c in enumerate(COLOURS)
}
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    turns = [(math.pi * i / points, inner if i % 2 else 1.0) for i in range(2 * points)]
    return [(radius * math.sin(turn), radius * math.cos(turn)) for turn, radius in turns]


MARKERS: tuple[list[tuple[float, float]], ...] = (  # corners, y upwards; legends on the page draw them too
    [(0.8 * x, 0.8 * y) for x, y in _star(16, 1.0)],
    [(-0.75, -0.75), (-0.75, 0.75), (0.75, 0.75), (0.75, -0.75)],
    [(0, 1), (-0.95, -0.7), (0.95, -0.7)],
    [(0, 1.05), (0.75, 0), (0, -1.05), (-0.75, 0)],
    [(0, -1), (-0.95, 0.7), (0.95, 0.7)],
    _star(5, 0.45),
    [(0.95 * x, 0.95 * y) for x, y in _star(4, 0.4)],
    [(-1, 0), (0.7, 0.95), (0.7, -0.95)],
    [(1, 0), (-0.7, 0.95), (-0.7, -0.95)],
)


class Look(NamedTuple):
    """How one run is told from the others everywhere: by colour, by marker and by dashes."""

    colour: int
    marker: int

    @property
    def dashes(self) -> Any:
        return DASHES[(self.marker - 1) % len(DASHES)]  # the first beside a dense model: unbroken


class Point(NamedTuple):
    look: Look
    x: float
    y: float
    error: float | None = None


class Line(NamedTuple):
    look: Look
    values: Sequence[float | None]
    errors: Sequence[float | None] = ()


class Bar(NamedTuple):
    label: str
    value: float
    most: float | None = None  # drawn as a dot: the worst of what the bar is the mean of


def looks(dense: int, others: int) -> list[Look]:
    """The dense models' looks, then the other runs'; colours come again after eight, markers after nine."""
    return [Look(0 if i < dense else 1 + (i - dense) % 8, i % len(MARKERS)) for i in range(dense + others)]


def swatch(look: Look) -> str:
    """The marker alone, for a legend."""
    corners = " ".join(f"{x:.2f},{-y:.2f}" for x, y in MARKERS[look.marker])
    return (
        '<svg class="swatch" viewBox="-1.2 -1.2 2.4 2.4" aria-hidden="true">'
        f'<polygon points="{corners}" style="fill: var(--series-{look.colour})"/></svg>'
    )


def _drawn(draw: Callable[..., str]) -> Callable[..., str]:
    """Load matplotlib for a plot, under the settings that all of them share, whatever the user's are."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **options: Any) -> str:
        try:
            import matplotlib
        except ImportError as error:
            raise UserError(
                "the plots of an HTML report need matplotlib, which is not installed; "
                "pip install 'llmsparse[report]', or ask for --markdown alone"
            ) from error
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_settings())
            return draw(*args, **options)

    return wrapped


def _settings() -> Any:
    edges = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    ticks = {f"{axis}tick.{key}": value for axis in "xy" for key, value in TICKS.items()}
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "llmsparse",
        "font.family": "DejaVu Sans",  # ships with matplotlib; wider than what browsers put in its place
        "font.size": FONT,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": QUIET,
        "axes.labelsize": FONT,
        "axes.edgecolor": QUIET,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        **edges,
        **ticks,
    }


TICKS = {"color": GRID, "labelcolor": QUIET, "labelsize": FONT - 0.5, "major.size": 0, "minor.size": 0}


# ---- the plots


@_drawn
def bars(bars: Sequence[Bar], *, look: Look, x: str, y: str, top: float, alt: str) -> str:
    """Upright bars, one a block; their labels are thinned out where they are many."""
    figure, axes = _figure(190)
    places = range(len(bars))
    axes.bar(places, [b.value for b in bars], width=0.72, color=COLOURS[look.colour])
    dots = [(i, bar.most) for i, bar in enumerate(bars) if bar.most is not None]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=INK, markersize=2.6, linestyle="none")
    longest = max((len(bar.label) for bar in bars), default=1)
    step = max(math.ceil(len(bars) * (longest + 2) / 44), 1)
    axes.set_xticks(places[::step], [bar.label for bar in bars][::step])
    axes.set_xlim(-0.6, max(len(bars), 6) - 0.4)
    axes.set_ylim(0, top or 1)
    axes.grid(False, axis="x")
    return _svg(figure, axes, x, y, alt)


@_drawn
def flat_bars(bars: Sequence[Bar], *, look: Look, x: str, top: float, alt: str) -> str:
    """Lying bars, one a kind of weight, with their names beside them."""
    figure, axes = _figure(58 + 20 * len(bars))
    places = range(len(bars))
    axes.barh(places, [b.value for b in bars], height=0.66, color=COLOURS[look.colour])
    dots = [(bar.most, i) for i, bar in enumerate(bars) if bar.most is not None]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=INK, markersize=3.2, linestyle="none")
    axes.set_yticks(places, [_short(bar.label) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, top or 1)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, steps=STEPS))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    return _svg(figure, axes, x, "", alt)


@_drawn
def lines(lines: Sequence[Line], ticks: Sequence[str], *, x: str, y: str, alt: str) -> str:
    """One line a run over places in order, such as stretches of a window."""
    figure, axes = _figure(220)
    places = list(range(len(ticks)))
    for line in lines:
        style = {"color": COLOURS[line.look.colour], "linestyle": line.look.dashes, "linewidth": 1.6}
        values = [math.nan if v is None else v for v in line.values]
        axes.plot(places, values, marker=MARKERS[line.look.marker], markersize=7, clip_on=False, **style)
        errors = [math.nan if e is None else e for e in line.errors]
        if errors:
            axes.errorbar(places, values, errors, fmt="none", color=style["color"], elinewidth=1)
    longest = max(map(len, ticks), default=1)
    step = max(math.ceil(len(ticks) * (longest + 2) / 44), 1)
    axes.set_xticks(places[::step], ticks[::step])
    axes.set_xlim(-0.4, max(len(ticks) - 0.6, 0.4))
    _value_axis(axes.yaxis, [v for line in lines for v in line.values if v is not None])
    return _svg(figure, axes, x, y, alt)


@_drawn
def scatter(
    points: Sequence[Point], *, x: str, y: str, lower: bool | None, level: float | None = None, alt: str
) -> str:
    """One point a run; a line joins those that no other beats in both, where fewer x and ``lower`` y are better.

    ``lower`` None draws no such line; ``level`` is drawn across, such as what guessing reaches.
    """
    figure, axes = _figure(220)
    if lower is not None:
        front = frontier(points, lower)
        axes.plot(*zip(*front, strict=True), color=QUIET, linewidth=1, linestyle=(0, (3, 2)), zorder=1.5)
    if level is not None:
        axes.axhline(level, color=QUIET, linewidth=1, linestyle=(0, (1, 2)), zorder=1.2)
    for point in points:
        colour = COLOURS[point.look.colour]
        if point.error:
            axes.errorbar(point.x, point.y, point.error, fmt="none", color=colour, elinewidth=1.2, capsize=3)
        axes.plot(
            point.x, point.y, marker=MARKERS[point.look.marker], markersize=10, color=colour, clip_on=False
        )
    left, right = min(p.x for p in points), max(p.x for p in points)
    room = 0.12 * (right - left) or 0.25 * abs(right) or 1
    axes.set_xlim(left - room, right + room)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, steps=STEPS))
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(_number))
    _value_axis(axes.yaxis, [p.y for p in points])
    return _svg(figure, axes, x, y, alt)


@_drawn
def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[Look, float, float, float]]]], *, x: str, level: float, alt: str
) -> str:
    """For each row (such as a task) each run's value between its low and high end; a line at ``level``.

    An interval whose high end is infinite runs a little beyond all others, into an arrow.
    """
    known = [end for _, found in rows for _, *ends in found for end in ends if math.isfinite(end)]
    beyond = max([level, *known]) + 0.08 * (max([level, *known]) - min([level, *known]))
    most = max((len(found) for _, found in rows), default=1)
    pitch = 12 * most + 12
    figure, axes = _figure(58 + pitch * len(rows))
    for i, (_, found) in enumerate(rows):
        for j, (look, value, low, high) in enumerate(found):
            place = i + (j - (len(found) - 1) / 2) * 12 / pitch
            colour = COLOURS[look.colour]
            if not math.isfinite(high):
                high = beyond
                axes.plot(high, place, marker=">", markersize=6, color=colour)
            axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
            axes.plot(value, place, marker=MARKERS[look.marker], markersize=8, color=colour)
    axes.axvline(level, color=QUIET, linewidth=1, linestyle=(0, (3, 2)), zorder=1.2)
    axes.set_yticks(range(len(rows)), [_short(label) for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, steps=STEPS))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    return _svg(figure, axes, x, "", alt)


def frontier(points: Iterable[Point], lower: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising x."""
    best, front = math.inf, []
    for x, y in sorted((p.x, p.y if lower else -p.y) for p in points):
        if y < best:
            best = y
            front.append((x, y if lower else -y))
    return front


# ---- what they share


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.subplots()


def _ticker() -> Any:
    import matplotlib.ticker

    return matplotlib.ticker


def _value_axis(axis: Any, values: Sequence[float]) -> None:
    """Logarithmic where values are far apart, with the same plain numbers at its ticks."""
    ticker = _ticker()
    if values and min(values) > 0 and max(values) / min(values) > 8:
        axis.axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        axis.set_major_locator(ticker.MaxNLocator(5, steps=STEPS))
    axis.set_major_formatter(ticker.FuncFormatter(_number))


def _number(value: float, _: Any = None) -> str:
    return f"{value:.6g}".replace("-", "−")


def _short(label: str, most: int = 22) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"


def _svg(figure: Any, axes: Any, x: str, y: str, alt: str) -> str:
    """The figure as an SVG element without fixed colours, typeface or size."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)
    head = f'<svg class="plot" viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(alt)}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def own_ids(svg: str, prefix: str) -> str:
    """The plot with ``prefix`` before each of its ids, which several plots on one page must not share."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
