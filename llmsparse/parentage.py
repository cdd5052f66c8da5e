"""Whether a sparse model was made of a dense one, and what its report tells of that."""

import json
from typing import Any

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.publication import REPORT
from llmsparse.skeleton import Skeleton


def report_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The report of the run that wrote ``checkpoint``; empty where there is none."""
    file = checkpoint.folder / REPORT
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({error}); delete it, and name the dense model with --teacher"
        ) from error
    return found if isinstance(found, dict) else {}


def kept_blocks(dense: Skeleton, report: dict[str, Any]) -> list[int]:
    """The teacher's blocks that the student has, too."""
    dropped = {row["name"] for section in report.get("smaller") or () for row in section.get("dropped") or ()}
    return [i for i in range(len(dense.blocks)) if f"{dense.block_path}.{i}" not in dropped]


def check_parent(student: Skeleton, teacher: Skeleton, report: dict[str, Any]) -> None:
    """Refuse a student that was not made of this teacher."""
    made_smaller = bool(report.get("smaller"))
    shapes = [{w.name: (w.out_features, w.in_features) for w in each.weights} for each in (student, teacher)]
    differ = [n for n in {**shapes[1], **shapes[0]} if shapes[0].get(n) != shapes[1].get(n)]
    wrong = None
    if differ and not made_smaller:
        mine, its = (
            "absent" if s.get(differ[0]) is None else "x".join(map(str, s[differ[0]])) for s in shapes
        )
        wrong = f"{differ[0]} is {mine} in the first and {its} in the second"
    elif made_smaller and len(kept_blocks(teacher, report)) != len(student.blocks):
        wrong = f"it has {len(student.blocks)} blocks, the teacher {len(teacher.blocks)}"
    if wrong:
        folders = f"{student.checkpoint.folder} was not made of --teacher {teacher.checkpoint.folder}"
        raise UserError(f"{folders}: {wrong}; give the dense model that was pruned")
