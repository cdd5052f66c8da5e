"""What a RUN argument names: a pruned folder with its results, or one file of results."""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmsparse.errors import UserError, first_line

Row = dict[str, Any]
OWN = re.compile(
    r"(report|export|eval.*|matrix)\.json"
)  # what llmsparse wrote of one folder, and of no other
KIND = "llmsparse eval"  # how a file of results is recognised
CONDITIONS = ("context", "stride", "bos", "dtype", "device")  # of a whole evaluation, repeated in its rows
STATUSES = ("not measured", "not measurable", "measured")  # the later says more


@dataclass(frozen=True)
class Run:
    """A model's report.json, if it has one, and every evaluation of it."""

    name: str
    report: Row | None = None
    evals: tuple[Row, ...] = ()
    folder: Path | None = None

    @cached_property
    def model(self) -> str | None:
        """What was evaluated, as it was named then; else the folder."""
        named = [row["model"] for row in self.evals if row.get("model")]
        return named[0] if named else str(self.folder) if self.folder else None

    @cached_property
    def against(self) -> str | None:
        """The dense model that an evaluation compared with; else the model that was pruned."""
        named = [row["against"] for row in self.evals if row.get("against")]
        return named[0] if named else (self.report or {}).get("model")

    @cached_property
    def options(self) -> Row:
        return (self.report or {}).get("options") or {}

    @cached_property
    def solver(self) -> str | None:
        return self.options.get("solver")

    @cached_property
    def pattern(self) -> str | None:
        pattern = self.options.get("pattern")
        return ", ".join(map(str, pattern)) if isinstance(pattern, list) else pattern

    @cached_property
    def weights(self) -> list[Row]:
        return (self.report or {}).get("weights") or []

    @cached_property
    def recovery(self) -> Row:
        """How it was trained after pruning; empty where it was not."""
        return (self.report or {}).get("recovery") or {}

    @cached_property
    def sparsity(self) -> float | None:
        """The share of zeros in the pruned weights."""
        return sparsity(self.weights)

    @cached_property
    def weight_bytes(self) -> int | None:
        """Bytes of the weight files, as an evaluation found them or as they lie in the folder."""
        found = [row["model_bytes"] for row in self.evals if row.get("model_bytes")]
        if found:
            return found[0]
        files = [self.folder / name for name in (self.report or {}).get("files") or ()] if self.folder else []
        return sum(f.stat().st_size for f in files if f.is_file()) or None

    @cached_property
    def tokens_per_second(self) -> float | None:
        found = [row["tokens_per_second"] for row in self.evals if row.get("tokens_per_second")]
        return found[0] if found else None

    @cached_property
    def sources(self) -> list[Row]:
        return self._rows("sources")

    @cached_property
    def tasks(self) -> list[Row]:
        return self._rows("tasks")

    @cached_property
    def generation(self) -> Row | None:
        found = [row["generation"] for row in self.evals if row.get("generation")]
        return found[0] if found else None

    @cached_property
    def capabilities(self) -> dict[str, Row]:
        """By capability; of several evaluations the one that measured it on the most tasks."""
        best: dict[str, Row] = {}
        for row in self._rows("capabilities"):
            known = best.get(row["capability"])
            if known is None or _says(row) > _says(known):
                best[row["capability"]] = row
        return best

    @cached_property
    def lost_most(self) -> str | None:
        """The capability of which the least is left, where an evaluation names one."""
        named = [row["lost_most"] for row in self.evals if row.get("lost_most")]
        kept = {c: row["ability_kept"] for c, row in self.capabilities.items() if c in named}
        return min(kept, key=lambda c: math.inf if kept[c] is None else kept[c]) if kept else None

    def _rows(self, kind: str) -> list[Row]:
        """The rows of every evaluation, each with the conditions that it was measured under."""
        return [
            {**{key: found.get(key) for key in CONDITIONS}, **row}
            for found in self.evals
            for row in found.get(kind) or ()
        ]


def sparsity(weights: Iterable[Row]) -> float | None:
    """The share of zeros in rows of report.json's ``weights``; None without any."""
    sizes = [(math.prod(row["shape"]), row["sparsity"]) for row in weights]
    whole = sum(size for size, _ in sizes)
    return sum(size * share for size, share in sizes) / whole if whole else None


def load_runs(arguments: Iterable[str | Path]) -> list[Run]:
    """Read each RUN: a pruned folder or a file that ``llmsparse eval --out`` wrote, or ``NAME=`` and one.

    A folder gives its ``report.json`` and all its ``eval*.json``. Names are the given ones, else the folder's
    or the file's; they are made unique. UserError: nothing there, no JSON, JSON of another kind, a folder
    with neither.
    """
    runs, paths = [], []
    for argument in arguments:
        name, path = _split(str(argument))
        run = _folder(path) if path.is_dir() else _file(path)
        runs.append(replace(run, name=name) if name else run)
        paths.append(None if name else path.resolve())
    return _unique(runs, paths)


def _split(argument: str) -> tuple[str, Path]:
    """``NAME=path`` in two; a path that exists is a path, whatever it contains."""
    name, equals, path = argument.partition("=")
    if not equals or not name.strip() or Path(argument).exists():
        return "", Path(argument)
    return name.strip(), Path(path)


def _folder(folder: Path) -> Run:
    report, evals = folder / "report.json", sorted(folder.glob("eval*.json"))
    if not report.is_file() and not evals:
        raise UserError(
            f"{folder} holds neither report.json nor eval*.json; name a folder that llmsparse prune wrote, "
            f"or evaluate this model first: llmsparse eval {folder} --out {folder}/eval.json"
        )
    found = _report(report) if report.is_file() else None
    return Run(folder.resolve().name, found, tuple(map(_eval, evals)), folder)


def _file(file: Path) -> Run:
    if not file.is_file():
        raise UserError(
            f"there is no {file}; name a folder that llmsparse prune wrote, "
            "or a file that llmsparse eval --out wrote"
        )
    found = _eval(file)
    folder = Path(str(found.get("model") or ""))
    if not found.get("model") or not (folder / "report.json").is_file():
        return Run(file.stem, None, (found,))
    return Run(file.stem, _report(folder / "report.json"), (found,), folder)


def _eval(file: Path) -> Row:
    found = _json(file)
    if found.get("kind") != KIND:
        raise UserError(
            f'{file} is JSON without "kind": "{KIND}", so no evaluation; '
            "name a file that llmsparse eval --out wrote"
        )
    for key in ("sources", "tasks", "capabilities"):
        _check_rows(file, key, found.get(key) or [], ())
    return found


def _report(file: Path) -> Row:
    found = _json(file)
    _check_rows(file, "weights", found.get("weights"), ("name", "shape", "sparsity"))
    return found


def _check_rows(file: Path, key: str, rows: Any, needed: tuple[str, ...]) -> None:
    whole = isinstance(rows, list) and all(isinstance(r, dict) and r.keys() >= {*needed} for r in rows)
    if not whole:
        with_keys = f" with {', '.join(needed)}" if needed else ""
        raise UserError(
            f'{file} should hold "{key}", a list of objects{with_keys}, and does not; '
            "was it written by llmsparse and not changed since?"
        )


def _json(file: Path) -> Row:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {first_line(error)}; write it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is JSON but no object; name a file that llmsparse eval --out wrote")
    return found


def _unique(runs: list[Run], paths: list[Path | None]) -> list[Run]:
    """Names that several runs share take their folder's in front, and a number where that is not enough."""
    names = [run.name for run in runs]
    longer = [
        f"{path.parent.name}{os.sep}{name}" if path is not None and names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]
    taken: set[str] = set()
    for i, name in enumerate(longer):
        longer[i] = unused(name, taken)
        taken.add(longer[i])
    return [replace(run, name=name) for run, name in zip(runs, longer, strict=True)]


def unused(name: str, taken: Iterable[str]) -> str:
    """``name``, or with the first number that none of ``taken`` has."""
    taken, number, free = set(taken), 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _says(row: Row) -> tuple[int, int]:
    status = row.get("status")
    return STATUSES.index(status) if status in STATUSES else -1, len(row.get("tasks") or ())
