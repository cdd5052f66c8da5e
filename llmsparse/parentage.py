"""Of which dense model a sparse one was made, as the reports on the way tell, and whether it can have been."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsparse.errors import UserError
from llmsparse.publication import REPORT
from llmsparse.skeleton import Skeleton


@dataclass(frozen=True)
class Ancestry:
    """``report``: of the run that wrote the sparse model. ``model``, ``commit``: the dense one, if any is known.

    ``smaller``: what the runs between made smaller, the first one first.
    """

    report: dict[str, Any]
    model: str | None
    commit: str | None
    smaller: list[dict[str, Any]]


def ancestry(folder: Path) -> Ancestry:
    """From report to report, up to the model that no run wrote; where folders were renamed, it may not be known."""
    report = found = _report(folder)
    smaller, seen = list(found.get("smaller") or ()), {folder.resolve()}
    while (model := found.get("model")) and (above := _report(Path(model).expanduser())):
        if (place := Path(model).expanduser().resolve()) in seen:
            return Ancestry(report, None, None, smaller)
        seen.add(place)
        found = above
        smaller = [*(found.get("smaller") or ()), *smaller]
    return Ancestry(report, found.get("model"), found.get("commit"), smaller)


def _report(folder: Path) -> dict[str, Any]:
    """The report of the run that wrote ``folder``; empty where there is none."""
    file = folder / REPORT
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({error}); delete it, and name the dense model with --teacher"
        ) from error
    return found if isinstance(found, dict) else {}


def kept_blocks(dense: Skeleton, smaller: list[dict[str, Any]]) -> list[int]:
    """The dense model's blocks that the sparse one has, too."""
    kept = list(range(len(dense.blocks)))
    for section in smaller:
        gone = {int(row["name"].rpartition(".")[2]) for row in section.get("dropped") or ()}
        kept = [index for place, index in enumerate(kept) if place not in gone]
    return kept


def between(student: Skeleton, teacher: Skeleton, smaller: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of ``smaller`` lies between the two: nothing where all of their weights have the same shapes.

    Raises:
        UserError: the student cannot have been made of this teacher.
    """
    shapes = [{w.name: (w.out_features, w.in_features) for w in each.weights} for each in (student, teacher)]
    differ = [n for n in {**shapes[1], **shapes[0]} if shapes[0].get(n) != shapes[1].get(n)]
    if not differ:
        return []
    widths = [each.config.get_text_config().hidden_size for each in (student, teacher)]
    wrong = None
    if not smaller:
        mine, its = (
            "absent" if s.get(differ[0]) is None else "x".join(map(str, s[differ[0]])) for s in shapes
        )
        wrong = f"{differ[0]} is {mine} in the first and {its} in the second"
    elif len(kept_blocks(teacher, smaller)) != len(student.blocks):
        wrong = f"it has {len(student.blocks)} blocks, the teacher {len(teacher.blocks)}"
    elif widths[0] != widths[1]:
        wrong = f"its hidden states have {widths[0]} channels, the teacher's {widths[1]}"
    if wrong:
        folders = f"{student.checkpoint.folder} was not made of --teacher {teacher.checkpoint.folder}"
        raise UserError(f"{folders}: {wrong}; give the dense model that was pruned")
    return smaller
