"""A recipe as a file: YAML of options, or the report of a run that had them; every error names its line."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmsparse.errors import UserError

Kinds = dict[str, str]  # option -> its type, as annotated
REPORT = "report.json"


def read(source: str | Path, kinds: Kinds) -> dict[str, Any]:
    """The options that ``source`` gives, each as its own type.

    Raises:
        UserError: no such file, no YAML, an unknown key (the known ones are listed), a value of another type.
    """
    file = Path(source).expanduser()
    if (file / REPORT).is_file():
        file /= REPORT
    if not file.is_file():
        raise UserError(f"recipe {source} does not exist")
    return _of_report(file, kinds) if file.suffix == ".json" else dict(_options(file, kinds))


def _of_report(file: Path, kinds: Kinds) -> dict[str, Any]:
    """What a run was asked for; what it found out besides (how many processes...) is no option."""
    try:
        options = json.loads(file.read_text("utf-8"))["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"recipe {file} is no report of a run: {error}") from error
    found = {key: value for key, value in options.items() if key in kinds}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _options(file: Path, kinds: Kinds) -> Iterator[tuple[str, Any]]:
    import yaml

    try:
        root = yaml.compose(
            file.read_text("utf-8"), yaml.BaseLoader
        )  # plain text: YAML would read 2:4 as 124
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {file}{where} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"recipe {file} must hold `option: value` lines")
    seen: dict[str, int] = {}
    for key, value in root.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        where = f"recipe {file}, line {line}"
        if name not in kinds:
            close = get_close_matches(name, kinds, n=1)
            meant = f"; did you mean {close[0]}" if close else ""
            raise UserError(f"{where}: key {name!r} is unknown{meant}; known: {', '.join(kinds)}")
        if name in seen:
            raise UserError(f"{where}: {name} was given in line {seen[name]} already")
        seen[name] = line
        yield name, _typed(where, name, _plain(value, yaml), kinds[name])


def _plain(node: Any, yaml: Any) -> Any:
    """Text, or a list of texts; anything else as it is."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, yaml) for each in node.value]
    return (
        node.value if isinstance(node, yaml.ScalarNode) else {k.value: _plain(v, yaml) for k, v in node.value}
    )


def _typed(where: str, key: str, value: Any, kind: str) -> Any:
    """A recipe's plain text as the option's own type."""
    if isinstance(value, list):
        if "tuple" in kind and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{where}: {key} takes one value, a list was given")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be plain text, found {value!r}")
    if value in ("", "null", "~") and "None" in kind:
        return None
    if "int" in kind:
        if not re.fullmatch(r"-?\d+", value):
            raise UserError(f"{where}: {key} must be a whole number, found {value!r}")
        return int(value)
    if "bool" in kind:
        if value.lower() not in ("true", "false"):
            raise UserError(f"{where}: {key} must be true or false, found {value!r}")
        return value.lower() == "true"
    return (value,) if "tuple" in kind else value
