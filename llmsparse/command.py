"""The command line that a report's options stand for."""

from typing import Any


def command_of(report: dict[str, Any]) -> list[str]:
    """The words of the ``llmsparse prune`` that wrote ``report``: every option with its value, but unset ones."""
    words = ["llmsparse", "prune", str(report.get("model")), str(report.get("out"))]
    for key, value in (report.get("options") or {}).items():
        if key == "processes" or value is None or value is False or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            words += [flag] if each is True else [flag, str(each)]
    return words
