"""Zero-shot accuracy by lm-evaluation-harness: each task's scores, their standard errors, and every answer."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from llmsparse.eval.ability import capability_of
from llmsparse.eval.tasksource import TaskSource

PREFERRED = ("acc_norm", "acc", "exact_match")  # the metric that stands for a task that reports several
SHARES = {*PREFERRED, "acc_bytes", "acc_mutual_info", "acc_all", "em", "f1"}  # of the items, more is better
BOOTSTRAPS = 1000  # resamples for the metrics whose standard error has no formula


def zero_shot(
    model: Any, loaded: Any, sources: list[TaskSource], limit: int | None = None
) -> list[dict[str, Any]]:
    """Run the ``loaded`` tasks through ``model``, a harness model, on their first ``limit`` items (all).

    A row for each task, in the order asked: ``task``, ``metric`` and ``value`` with ``standard_error``;
    ``metrics``: all of them; ``chance``: what guessing would score; ``items`` scored ``of`` all; ``answers``:
    a digit an item, 1 where it was right (None where the metric is no yes or no); ``data``, its ``sha256`` and
    the ``capability`` that the task measures. A group (mmlu) adds a row after its tasks.
    """
    from lm_eval import evaluator

    with _no_bars():
        found = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    by_name = {source.name: source for source in sources}
    rows = [_row(name, found, by_name.get(name)) for name in loaded["tasks"]]
    return rows + [_group(name, found) for name in loaded["groups"] if found["results"].get(name)]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the harness's bars over the building of requests; the model's counts what takes time."""
    from lm_eval.api import task

    def plain(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items

    bar, task.tqdm = task.tqdm, plain
    try:
        yield
    finally:
        task.tqdm = bar


def _row(name: str, found: Any, source: TaskSource | None) -> dict[str, Any]:
    samples, sizes = found["samples"][name], found["n-samples"][name]
    metrics = _metrics(found["results"][name])
    metric = _preferred(metrics)
    right = [sample.get(metric) for sample in samples if sample["filter"] == samples[0]["filter"]]
    chances = [1 / len(sample["resps"]) if len(sample["resps"]) > 1 else 0.0 for sample in samples]
    return {
        "task": name,
        "metric": metric,
        "value": metrics[metric][0],
        "standard_error": metrics[metric][1],
        "unit": unit_of(metric),
        "metrics": metrics,
        "chance": sum(chances) / len(chances),
        "items": sizes["effective"],
        "of": sizes["original"],
        "answers": "".join(str(int(r)) for r in right) if all(r in (0, 1) for r in right) else None,
        "data": source.label if source else f"lm-evaluation-harness: {name}",
        "sha256": source.sha256 if source else None,
        "capability": capability_of(name),
    }


def unit_of(metric: str) -> str:
    """``share`` of the items, or a ``score`` on a scale of its own, where less may be better."""
    return "share" if metric.partition(" ")[0] in SHARES else "score"


def _group(name: str, found: Any) -> dict[str, Any]:
    metrics = _metrics(found["results"][name])
    metric = _preferred(metrics) if metrics else None
    value, error = metrics[metric] if metric else (None, None)
    return {
        "task": name,
        "metric": metric,
        "value": value,
        "standard_error": error,
        "unit": unit_of(metric or PREFERRED[0]),
        "metrics": metrics,
        "answers": None,
        "capability": capability_of(name),
        "group": True,
    }


def _preferred(metrics: dict[str, tuple[float, float | None]]) -> str:
    return next((metric for metric in PREFERRED if metric in metrics), next(iter(metrics)))


def _metrics(result: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metric -> its value and standard error, from the harness's ``acc,none`` and ``acc_stderr,none``.

    A task that filters its answers in several ways reports each: the first filter keeps the plain name.
    """
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in result.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{name}_stderr,{chosen}")
        known = isinstance(error, int | float) and math.isfinite(error)
        label = name if name not in found else f"{name} ({chosen})"
        found[label] = (float(value), float(error) if known else None)  # type: ignore[arg-type]
    return found
