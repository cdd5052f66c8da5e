"""What a pruned model still can: answers lost and won, ability above chance kept, by capability."""

from functools import cache
from typing import Any

import numpy as np
import yaml

from llmsparse.eval.tasksource import DEFINITIONS

RESAMPLES = 10_000
UNGROUPED = "ungrouped"


@cache
def _beginnings() -> dict[str, str]:
    """The beginning of a task's name -> the capability that it measures."""
    groups = yaml.safe_load((DEFINITIONS / "capabilities.yaml").read_text("utf-8"))
    return {start: capability for capability, starts in groups.items() for start in starts}


def capability_of(task: str) -> str:
    """language, knowledge, reasoning, code, other languages, or ``ungrouped``."""
    known = _beginnings()
    fitting = [start for start in known if task == start or task.startswith(f"{start}_")]
    return known[max(fitting, key=len)] if fitting else UNGROUPED


def flips(answers: str, dense: str) -> tuple[int, int]:
    """Items that the dense model had right and the sparse one has not, and the reverse."""
    pairs = list(zip(answers, dense, strict=True))
    return pairs.count(("0", "1")), pairs.count(("1", "0"))


def ability_kept(answers: str, dense: str, chance: float) -> dict[str, float] | None:
    """(accuracy - chance) / (dense accuracy - chance), with a 95 % paired bootstrap interval over items.

    None where it cannot be measured: the dense model is within two standard errors of chance. Resampling
    items with both of their answers is drawing how many were right in both, in one or in neither.
    """
    n = len(dense)
    lost, gained = flips(answers, dense)
    both = dense.count("1") - lost
    accuracy = dense.count("1") / n
    if n < 2 or accuracy - chance <= 2 * np.sqrt(accuracy * (1 - accuracy) / (n - 1)):
        return None
    shares = np.array([both, lost, gained, n - both - lost - gained]) / n
    drawn = np.random.default_rng(0).multinomial(n, shares, size=RESAMPLES) / n
    above, dense_above = drawn[:, 0] + drawn[:, 2] - chance, drawn[:, 0] + drawn[:, 1] - chance
    ratios = np.divide(above, dense_above, out=np.full(RESAMPLES, np.inf), where=dense_above > 0)
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    value = (both + gained - chance * n) / (both + lost - chance * n)
    return {"value": float(value), "low": float(low), "high": float(high)}


def beside(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A task's ``row`` with the dense model's row of the same items: flips and the ability kept."""
    found = row | {"dense_value": dense["value"], "dense_standard_error": dense["standard_error"]}
    if row["answers"] is None or dense["answers"] is None:
        return found | {"ability_kept": None, "ability": "not counted by items"}
    lost, gained = flips(row["answers"], dense["answers"])
    kept = ability_kept(row["answers"], dense["answers"], row["chance"])
    return found | {
        "lost": lost,
        "gained": gained,
        "dense_answers": dense["answers"],
        "ability_kept": kept,
        "ability": "not measurable" if kept is None else _said(kept),
    }


def _said(kept: dict[str, float]) -> str:
    """``71 % (60 to 83)``; an interval has no end where the dense model may be no better than chance."""
    low, high = (
        f"{100 * kept[end]:.0f}" if np.isfinite(kept[end]) else "unbounded" for end in ("low", "high")
    )
    return f"{kept['value']:.0%} ({low} to {high})".replace("%", " %").replace("-", "−")


def capabilities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each capability's tasks and the ability kept, the mean of its ``measurable`` ones weighted by items.

    ``status`` says what is known. ``not measured``: no task covers it, or there was no dense model to compare
    with; ``not measurable``: the dense model is not above chance on any of its tasks.
    """
    found = []
    tasks = [row for row in rows if not row.get("group")]
    for capability in dict.fromkeys([*_beginnings().values(), *(row["capability"] for row in tasks)]):
        members = [row for row in tasks if row["capability"] == capability]
        kept = [(row["ability_kept"]["value"], row["items"]) for row in members if row.get("ability_kept")]
        items = sum(size for _, size in kept)
        compared = any("dense_value" in row for row in members)
        found.append(
            {
                "capability": capability,
                "tasks": [row["task"] for row in members],
                "measurable": [row["task"] for row in members if row.get("ability_kept")],
                "ability_kept": sum(value * size for value, size in kept) / items if kept else None,
                "status": "measured" if kept else "not measurable" if compared else "not measured",
            }
        )
    return found


def lost_most(groups: list[dict[str, Any]]) -> str | None:
    """The capability that kept the least of what the dense model can; None when nothing measured was lost."""
    measured = [group for group in groups if group["ability_kept"] is not None and group["ability_kept"] < 1]
    return min(measured, key=lambda group: group["ability_kept"])["capability"] if measured else None
