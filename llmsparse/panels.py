"""Which plots a report shows, and the runs' figures that go into each."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmsparse.blocks import Figure
from llmsparse.figures import count, percent, plain
from llmsparse.measures import Key, measures, source_name
from llmsparse.plots import Bar, Line, Look, Point, bars, flat_bars, intervals, lines, scatter
from llmsparse.runs import Run, sparsity

Row = dict[str, Any]
Looks = dict[str, Look]


def against_bytes(runs: Sequence[Run], looks: Looks, labels: dict[Key, str]) -> list[Figure]:
    """One panel a task, or a text where there are no tasks (a mean over tasks would hide what was lost); speed."""
    kinds = {key[0] for key in labels}
    shown = [key for key in labels if key[0] == ("task" if "task" in kinds else "perplexity")]
    made = []
    sizes, unit = _sizes(runs)
    for key in shown:
        found = {run.name: measures(run).get(key) for run in runs}
        task = key[0] == "task"
        known = {name: m for name, m in found.items() if m and m.value is not None and name in sizes}
        if len(known) < 2 or task and any(m.scale == 1 for m in known.values()):
            continue
        points = [
            Point(looks[name], sizes[name], m.value * m.scale, m.error * m.scale if m.error else None)
            for name, m in known.items()
            if m.value is not None
        ]
        chance = next(iter(known.values())).row.get("chance") if task else None
        y = "items right, %" if task else "perplexity (less is better)"
        said = _said(f"{labels[key]}: {y}", {n: str(m) for n, m in known.items()})
        options = {"x": f"weight files, {unit}", "y": y, "lower": not task, "alt": said}
        level = 100 * chance if chance else None
        made.append(Figure(labels[key], functools.partial(scatter, points, level=level, **options)))
    return made + _speed(runs, looks, sizes, unit)


def _speed(runs: Sequence[Run], looks: Looks, sizes: dict[str, float], unit: str) -> list[Figure]:
    known = {run.name: run.tokens_per_second for run in runs if run.name in sizes}
    fast = {name: speed for name, speed in known.items() if speed}
    if not fast:
        return []
    points = [Point(looks[name], sizes[name], speed) for name, speed in fast.items()]
    said = _said("Speed in tokens a second", {name: plain(speed) for name, speed in fast.items()})
    options = {"x": f"weight files, {unit}", "y": "tokens a second", "lower": False, "alt": said}
    return [Figure("Speed", functools.partial(scatter, points, **options))]


def _sizes(runs: Sequence[Run]) -> tuple[dict[str, float], str]:
    known = {run.name: run.weight_bytes for run in runs if run.weight_bytes}
    power, unit = (30, "GiB") if max(known.values(), default=0) >= 2 << 30 else (20, "MiB")
    return {name: size / (1 << power) for name, size in known.items()}, unit


def ability(runs: Sequence[Run], looks: Looks, labels: dict[Key, str]) -> Figure | None:
    """What is left of each task's ability, with its interval."""
    rows, said = [], {}
    for key, label in labels.items():
        found = []
        for run in runs if key[0] == "task" else ():
            measure = measures(run).get(key)
            kept = measure.row.get("ability_kept") if measure else None
            if kept:
                ends = (
                    math.inf if kept[end] is None else 100 * kept[end] for end in ("value", "low", "high")
                )
                found.append((looks[run.name], *ends))
                said[f"{label}, {run.name}"] = percent(kept["value"], 0)
        if found:
            rows.append((label, found))
    if not rows:
        return None
    title = "Ability kept, by task, with 95 % intervals"
    options = {"x": "% of the dense model's", "level": 100.0}
    return Figure(title, functools.partial(intervals, rows, alt=_said(title, said), **options))


def positions(runs: Sequence[Run], looks: Looks) -> list[tuple[str, list[Run], list[Figure]]]:
    """For each text: its name, who was measured on it, divergence and agreement along the window."""
    sources: dict[str, list[tuple[Run, list[Row]]]] = {}
    for run in runs:
        for row in run.sources:
            if row.get("positions"):
                context = f", context {row['context']}" if row.get("context") else ""
                sources.setdefault(source_name(row) + context, []).append((run, row["positions"]))
    made = []
    for name, found in sources.items():
        known = {key for _, stretches in found for stretch in stretches for key in stretch}
        figures = [_positions(title, found, looks, key, axis) for key, title, axis in ALONG if key in known]
        made.append((name, [run for run, _ in found], figures))
    return made


ALONG = (  # what is drawn along the window: key, title, (axis, scale)
    ("kl", "KL divergence", ("nats a token", 1.0)),
    ("top1_agreement", "Top-1 agreement", ("tokens, %", 100.0)),
    ("top5_agreement", "Top-5 agreement", ("tokens, %", 100.0)),
)


def _positions(
    title: str, found: list[tuple[Run, list[Row]]], looks: Looks, key: str, axis: tuple[str, float]
) -> Figure:
    ends = sorted({int(stretch["to"]) for _, stretches in found for stretch in stretches})
    drawn, said = [], {}
    for run, stretches in found:
        at = {int(s["to"]): s.get(key) for s in stretches}
        values = [None if (v := at.get(end)) is None else axis[1] * v for end in ends]
        drawn.append(Line(looks[run.name], values))
        known = [v for v in values if v is not None]
        said[run.name] = f"{plain(known[0])} to {plain(known[-1])}" if known else "not finite"
    options = {"x": "position in the window, up to", "y": axis[0], "alt": _said(title, said)}
    return Figure(title, functools.partial(lines, drawn, [str(end) for end in ends], **options))


# ---- recovery


def recovery(runs: Sequence[Run], looks: Looks) -> Figure:
    """The divergence on the held-out text while the runs were trained."""
    curves = {run.name: {row["tokens"]: row["held_out"] for row in run.recovery["curve"]} for run in runs}
    ends = sorted({tokens for curve in curves.values() for tokens in curve})
    drawn = [Line(looks[name], [curve.get(end) for end in ends]) for name, curve in curves.items()]
    ticks = [count(end) for end in ends]
    found = {name: [value for value in curve.values() if value is not None] for name, curve in curves.items()}
    said = _said(
        "KL on held-out text", {n: f"{plain(v[0])} to {plain(v[-1])}" for n, v in found.items() if v}
    )
    options = {"x": "tokens trained on", "y": "nats a token", "alt": said}
    return Figure("KL divergence on held-out text", functools.partial(lines, drawn, ticks, **options))


# ---- layer by layer


def layers(runs: Sequence[Run], looks: Looks) -> list[tuple[Run, list[Figure]]]:
    """For each run: sparsity and error by block, error by kind of weight; errors on one scale for all runs."""
    by_block = [_bars(_by(run.weights, block_of)) for run in runs]
    by_kind = [_bars(_by(run.weights, kind_of(run.weights))) for run in runs]
    tops = [_top(bar for found in each for bar in found) for each in (by_block, by_kind)]
    made = []
    for run, blocks, kinds in zip(runs, by_block, by_kind, strict=True):
        figures, look = [_sparsity(run, looks[run.name])], looks[run.name]
        for title, found, top in zip(("block", "kind of weight"), (blocks, kinds), tops, strict=True):
            if found:
                figures.append(_error(f"Relative error by {title}", found, look, top))
        made.append((run, figures))
    return made


def _sparsity(run: Run, look: Look) -> Figure:
    found = [Bar(label, 100 * (sparsity(rows) or 0.0)) for label, rows in _by(run.weights, block_of).items()]
    said = _said("Sparsity by block", {bar.label: f"{bar.value:.1f} %" for bar in found})
    options = {"look": look, "x": "decoder block", "y": "zeros, %", "top": 100.0, "alt": said}
    return Figure("Sparsity by block", functools.partial(bars, found, **options))


def _error(title: str, found: list[Bar], look: Look, top: float) -> Figure:
    said = _said(title, {bar.label: f"{bar.value:.3g}, worst {bar.most:.3g}" for bar in found})
    options = {"look": look, "top": top, "alt": said}
    if title.endswith("block"):
        return Figure(title, functools.partial(bars, found, x="decoder block", y="relative error", **options))
    return Figure(title, functools.partial(flat_bars, found, x="relative error", **options))


def _bars(groups: dict[str, list[Row]]) -> list[Bar]:
    """The mean and the largest relative error of each group; a group without any is left out."""
    made = []
    for label, rows in groups.items():
        errors = [row["error"] for row in rows if row.get("error") is not None]
        if errors:
            made.append(Bar(label, sum(errors) / len(errors), max(errors)))
    return made


def _top(found: Iterable[Bar]) -> float:
    return 1.06 * max((bar.most or 0.0 for bar in found), default=0.0)


def _by(rows: Iterable[Row], label: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def block_of(weight: Row) -> str:
    """The first number in a weight's name; the name's last part where there is none, as for lm_head."""
    number = re.search(r"(?:^|\.)(\d+)\.", weight["name"])
    return number[1] if number else _stem(weight["name"])[-1]


def kind_of(weights: Iterable[Row]) -> Callable[[Row], str]:
    """Names weights by their last part, or by two parts where the last is not enough: GPT-2 has two c_proj."""
    parents: dict[str, set[str]] = {}
    for weight in weights:
        *above, last = ("", *_stem(weight["name"]))
        parents.setdefault(last, set()).add(above[-1])

    def kind(weight: Row) -> str:
        stem = _stem(weight["name"])
        return ".".join(stem[-2:] if len(parents[stem[-1]]) > 1 else stem[-1:])

    return kind


def _stem(name: str) -> list[str]:
    """``model.layers.0.mlp.up_proj.weight`` -> model, layers, mlp, up_proj."""
    return [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()] or [name]


def _said(title: str, values: dict[str, str], most: int = 12) -> str:
    """What a plot shows, for those who do not see it; of many values the first and the last."""
    said = [f"{name} {value}" for name, value in values.items()]
    if len(said) > most:
        said = [*said[: most - 1], "and so on to", said[-1]]
    return f"{title}. {'; '.join(said)}"
