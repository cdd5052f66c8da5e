"""The command lines that a report's options stand for."""

from collections.abc import Iterator
from typing import Any


def command_of(report: dict[str, Any]) -> list[str]:
    """The words of the ``llmsparse prune`` that wrote ``report``: every option with its value, but unset ones.

    Of a model that was recovered, of the one that was recovered.
    """
    recovery = report.get("recovery") or {}
    out = recovery.get("sparse") or report.get("out")
    return ["llmsparse", "prune", str(report.get("model")), str(out), *_options(report.get("options") or {})]


def command_of_recovery(report: dict[str, Any]) -> list[str]:
    """The words of the ``llmsparse recover`` that wrote ``report``."""
    recovery = report["recovery"]
    return [
        "llmsparse",
        "recover",
        recovery["sparse"],
        str(report.get("out")),
        *_options(recovery["options"]),
    ]


def _options(options: dict[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if key == "processes" or value is None or value is False or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            yield from [flag] if each is True else [flag, str(each)]
