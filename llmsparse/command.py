"""The command lines that a report's options stand for."""

from collections.abc import Iterator
from typing import Any


def command_of(report: dict[str, Any]) -> list[str]:
    """The words of the ``llmsparse prune`` that wrote ``report``: every option with its value, but unset ones.

    Of a model that was recovered, of the one that was recovered.
    """
    out = next((found["sparse"] for found, _ in recoveries(report)), report.get("out"))
    return ["llmsparse", "prune", str(pruned_of(report)), str(out), *_options(report.get("options") or {})]


def commands_of_recovery(report: dict[str, Any]) -> list[list[str]]:
    """The words of each ``llmsparse recover`` on the way to ``report``, the first one first."""
    return [
        ["llmsparse", "recover", found["sparse"], out, *_options(found["options"])]
        for found, out in recoveries(report)
    ]


def pruned_of(report: dict[str, Any]) -> str | None:
    """What the last pruning began with: another one than the dense model after several runs."""
    return (report.get("recovery") or {}).get("pruned") or report.get("model")


def recoveries(report: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every recovery on the way to ``report``, the first one first, and the folder that it wrote."""
    last = report.get("recovery")
    if not last:
        return []
    found = [*last.get("earlier", ()), last]
    return list(zip(found, [*(each["sparse"] for each in found[1:]), str(report.get("out"))], strict=True))


def _options(options: dict[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if key == "processes" or value is None or value is False or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            yield from [flag] if each is True else [flag, str(each)]
