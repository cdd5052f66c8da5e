"""What runs can be compared in: perplexity on a text and accuracy on a task, beside the dense model's."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llmsparse.figures import plain, with_error
from llmsparse.runs import CONDITIONS, Run, unused

Row = dict[str, Any]
Key = tuple[str, str, Any]  # ("perplexity", text, (context, stride)) or ("task", task, metric)
ABOUT = {"name", "data", "sha256", "tokens", "task", "metric", "items", "of", "chance", "capability", "unit"}


class Measure(NamedTuple):
    """One figure of one run: a perplexity, or the share of a task's items that were right."""

    value: float | None
    error: float | None
    row: Row

    @property
    def is_task(self) -> bool:
        return "task" in self.row

    @property
    def scale(self) -> float:
        """What the figure is shown in: percent for a share of items."""
        return 100.0 if self.is_task and self.row.get("unit") != "score" else 1.0

    @property
    def dense(self) -> "Measure | None":
        """The dense model's, where the same evaluation measured it too."""
        value = "dense_value" if self.is_task else "dense_perplexity"
        if value not in self.row:
            return None
        about = {k: v for k, v in self.row.items() if k in ABOUT or k in CONDITIONS}
        figure = {value.removeprefix("dense_"): self.row[value]}
        error = self.row.get("dense_standard_error")
        return Measure(self.row[value], error, about | figure | {"standard_error": error})

    def __str__(self) -> str:
        return with_error(self.value, self.error, self.scale)


def measures(run: Run) -> dict[Key, Measure]:
    """Each figure once: of two evaluations of the same thing the one over more tokens or items."""
    found: dict[Key, Measure] = {}
    key: Key
    for row in run.sources:
        key = ("perplexity", source_name(row), (row.get("context"), row.get("stride")))
        _keep_larger(found, key, Measure(row.get("perplexity"), row.get("standard_error"), row), "tokens")
    for row in run.tasks:
        if row.get("group") and row.get("value") is None:
            continue  # a heading over other tasks, without a figure of its own
        key = ("task", str(row.get("task")), row.get("metric"))
        _keep_larger(found, key, Measure(row.get("value"), row.get("standard_error"), row), "items")
    return found


def same_data(one: Measure, other: Measure) -> bool:
    """Whether both figures are of the same text or items, under the same rule for BOS."""
    return all(one.row.get(key) == other.row.get(key) for key in ("sha256", "tokens", "items", "bos"))


def _keep_larger(found: dict[Key, Measure], key: Key, measure: Measure, size: str) -> None:
    if key not in found or (measure.row.get(size) or 0) > (found[key].row.get(size) or 0):
        found[key] = measure


def source_name(row: Row) -> str:
    return str(row.get("name") or row.get("data") or "text")


def labels(runs: Iterable[Run]) -> dict[Key, str]:
    """A name for each figure of any run; its context or metric is part of it only where names would be alike."""
    keys = list(dict.fromkeys(key for run in runs for key in measures(run)))
    keys.sort(key=lambda key: key[0] == "task")  # stable: texts first, each in the order found
    names = [key[:2] for key in keys]
    return {key: key[1] + (_detail(key) if names.count(key[:2]) > 1 else "") for key in keys}


def _detail(key: Key) -> str:
    if key[0] == "task":
        return f", {key[2]}"
    context, stride = key[2]
    return f", context {context}" + ("" if stride is None else f", stride {stride}")


def change(measure: Measure, dense: Measure | None) -> str:
    """Against the dense figure: ``× 1.45`` for a perplexity; points for a task, with an error where pairs are known."""
    if dense is None or measure.value is None or not dense.value:
        return ""
    if not measure.is_task:
        times = measure.value / dense.value
        return f"× {times:.2f}" if times < 10 else f"× {plain(round(times, 1))}"
    row = measure.row
    points = f"{measure.scale * (measure.value - dense.value):+.1f}".replace("-", "−")
    error = paired_error(row.get("lost"), row.get("gained"), row.get("items"))
    return points + ("" if error is None else f" ± {measure.scale * error:.1f}")


def paired_error(lost: int | None, gained: int | None, items: int | None) -> float | None:
    """Standard error of a change in accuracy on the same items, of which some flipped to wrong and to right."""
    if lost is None or gained is None or not items or items < 2:
        return None
    mean = (gained - lost) / items
    return (max((lost + gained) / items - mean**2, 0.0) / (items - 1)) ** 0.5


# ---- dense models


def with_dense(runs: list[Run]) -> tuple[list[Run], dict[str, Run]]:
    """The runs, dense models first, and the dense model of each pruned run by that run's name.

    A dense model is one of the runs (it was compared with or pruned, or it has no report), or is made of
    what evaluations with ``--against`` say of it.
    """
    given = {_place(run.model): run for run in reversed(runs) if run.model}
    unpruned = {Path(str(run.model)).name: run for run in runs if run.report is None and run.against is None}
    made: dict[str, Run] = {}
    for place in dict.fromkeys(_place(run.against) for run in runs if run.against):
        evaluation = _dense_evaluation([run for run in runs if run.against and _place(run.against) == place])
        if evaluation and place not in given:
            made[place] = Run("dense", evals=(evaluation,))
    made = dict(zip(made, _named(list(made.values()), runs), strict=True))
    found: dict[str, Run] = {}
    for run in runs:
        dense = (given | made).get(_place(run.against)) if run.against else None
        dense = dense or unpruned.get(Path(str(run.against)).name)
        if dense is not None and dense is not run:
            found[run.name] = dense
    first = [*made.values(), *(run for run in runs if run in found.values())]
    return [*first, *(run for run in runs if run not in first)], found


def _place(model: str | None) -> str:
    """A local folder's full path, so that two ways of writing it are one; anything else as it is."""
    return str(Path(model).resolve()) if model and os.path.exists(model) else str(model)


def _named(made: list[Run], runs: list[Run]) -> list[Run]:
    """``dense``, or ``dense (MODEL)`` where there are several."""
    taken = {run.name for run in runs}
    for i, run in enumerate(made):
        name = "dense" if len(made) == 1 else f"dense ({Path(str(run.model)).name})"
        made[i] = Run(unused(name, taken), evals=run.evals)
        taken.add(made[i].name)
    return made


def _dense_evaluation(runs: list[Run]) -> Row | None:
    """What the evaluations of ``runs`` say of their dense model, as if it had been evaluated itself."""
    rows: dict[Key, Row] = {}
    for run in runs:
        for key, measure in measures(run).items():
            if measure.dense is not None:
                rows.setdefault(key, measure.dense.row)
    if not rows:
        return None
    sizes = [row["against_bytes"] for run in runs for row in run.evals if row.get("against_bytes")]
    return {
        "model": runs[0].against,
        "model_bytes": sizes[0] if sizes else None,
        "sources": [row for key, row in rows.items() if key[0] == "perplexity"],
        "tasks": [row for key, row in rows.items() if key[0] == "task"],
    }
