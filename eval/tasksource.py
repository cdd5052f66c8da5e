"""Where the items of a zero-shot task come from: a local .jsonl of a known schema, or lm-evaluation-harness."""

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmsparse.errors import UserError, first_line

DEFINITIONS = Path(__file__).parent / "tasks"
EXTRA = "zero-shot tasks need lm-evaluation-harness: pip install 'llmsparse[eval]'"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) and v for v in value)


def _choice_fits(row: dict[str, Any], choices: str) -> bool:
    gold = row["gold"]
    return _texts(row[choices]) and type(gold) is int and 0 <= gold < len(row[choices])


SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], bool], str]] = {
    # definition -> its fields, whether a row is one of it, and what a row must be
    "multiple_choice": (
        ("query", "choices", "gold"),
        lambda row: isinstance(row["query"], str) and _choice_fits(row, "choices"),
        "query is a text, choices are two or more texts, gold is the number of the right one from 0",
    ),
    "partial_evaluation": (
        ("context_options", "continuation", "gold"),
        lambda row: isinstance(row["continuation"], str) and _choice_fits(row, "context_options"),
        "context_options are two or more texts, continuation is a text, gold is the right option's number from 0",
    ),
    "last_word": (
        ("text",),
        lambda row: isinstance(row["text"], str) and all(row["text"].rpartition(" ")[::2]),
        "text is two words or more, with one blank before the last",
    ),
}


class TaskSource(NamedTuple):
    """A task by name: what the harness loads, and where that comes from."""

    name: str
    config: str | dict[str, Any]  # the harness's own name, or a definition with its rows
    label: str
    sha256: str | None  # of the local file


def find_tasks(names: str, folder: str | Path | None = None) -> list[TaskSource]:
    """The tasks that ``names`` (separated by commas) stand for.

    NAME.jsonl in ``folder`` (default: the folder zeroshot of $LLMSPARSE_DATA) comes first; every other name
    is one of the harness's, which reads its data from the hub.

    Raises:
        UserError: no harness installed, no such folder, an unknown name, a file that fits no schema.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(EXTRA) from error
    local = local_tasks(folder)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise UserError(f"--tasks {names!r} names no task; local ones: {', '.join(local) or 'none'}")
    others = [name for name in wanted if name not in local]
    if others:
        _check_known(others, local)
    return [_local(name, local[name]) if name in local else _remote(name) for name in wanted]


def local_tasks(folder: str | Path | None = None) -> dict[str, Path]:
    """The .jsonl files that can be tasks, by name."""
    root = os.environ.get("LLMSPARSE_DATA")
    if folder is None:
        default = Path(root, "zeroshot") if root else None
        return {} if default is None or not default.is_dir() else _files(default)
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--task-data {folder} is no folder; name one with NAME.jsonl files")
    return _files(Path(folder).expanduser())


def _files(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def _check_known(names: list[str], local: dict[str, Path]) -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*local, *sorted(known)], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}" if near else ""
            raise UserError(
                f"task {name!r} is unknown{hint}; local: {', '.join(local) or 'none (see --task-data)'}; "
                f"lm-evaluation-harness knows {len(known):,} more (lm_eval ls tasks lists them)"
            )


def _remote(name: str) -> TaskSource:
    return TaskSource(name, name, f"lm-evaluation-harness: {name}", None)


def _local(name: str, file: Path) -> TaskSource:
    data = file.read_bytes()
    rows = [
        (n, line) for n, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1) if line.strip()
    ]
    if not rows:
        raise UserError(f"{file} holds no items; a task needs at least one")
    items = [_item(file, number, line) for number, line in rows]
    schema = _schema(file, rows[0][0], items[0])
    fields, fits, must = SCHEMAS[schema]
    for (number, _), item in zip(rows, items, strict=True):
        if not set(fields) <= set(item) or not fits(item):
            raise UserError(f"{file} line {number} is no item of the schema {schema}: {must}")
    kept = [{field: item[field] for field in fields} for item in items]
    config = {**definition(schema), "task": name, "custom_dataset": _Rows(kept)}
    return TaskSource(name, config, file.name, hashlib.sha256(data).hexdigest())


def _item(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {number} is no JSON: {error}") from error
    if not isinstance(item, dict):
        raise UserError(f"{file} line {number} is no JSON object; an item is {{field: value}}")
    return item


def _schema(file: Path, number: int, item: dict[str, Any]) -> str:
    for schema, (fields, _, _) in SCHEMAS.items():
        if set(fields) <= set(item):
            return schema
    forms = "; ".join(f"{schema}: {', '.join(fields)}" for schema, (fields, _, _) in SCHEMAS.items())
    raise UserError(f"{file} line {number} has the fields {', '.join(item)}, which fit no schema ({forms})")


class _Rows:
    """A data set in memory, as the harness asks for one."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __call__(self, **_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(self.rows)}


def definition(schema: str) -> dict[str, Any]:
    """The harness's task configuration for items of ``schema``."""
    return yaml.safe_load((DEFINITIONS / f"{schema}.yaml").read_text("utf-8"))


def load_tasks(sources: list[TaskSource]) -> Any:
    """The harness's tasks and groups, their data read.

    Raises:
        UserError: the hub cannot be reached, or a task would run code that the model writes.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=any(isinstance(source.config, str) for source in sources))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for source in sources:
        try:
            found = manager.load([source.config])
        except Exception as error:  # datasets, huggingface_hub and the tasks' own code raise what they like
            raise UserError(
                f"task {source.name} could not be loaded: {first_line(error)}; its data comes from the hub: "
                f"check the connection, or put {source.name}.jsonl into the folder that --task-data names"
            ) from error
        for kind, entries in found.items():
            loaded[kind].update(entries)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs code that the model writes; run it in lm_eval itself, in a sandbox"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} needs more than text; causal language models read text alone")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own default
    return loaded
