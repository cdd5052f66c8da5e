"""Take what names this machine and its user out of what a run recorded, before it is published."""

import getpass
import os
import re
from pathlib import Path
from typing import Any

# A path from the root or a home, of Unix or Windows, up to what cannot be in one or ends a list of them.
_ABSOLUTE = re.compile(
    r"(?<![\w.~:/\\])(?:~[\w.-]*|[A-Za-z]:(?=[/\\]))?(?:[/\\][^/\\\s,;'\"<>|:()\[\]=]+)+[/\\]?"
)
_SHARED = ("root", "user", "admin", "ubuntu", "runner", "llmsparse")  # names of nobody, and words of English


def without_local_paths(value: Any, known: list[str] | None = None) -> Any:
    """``value`` (JSON: dicts, lists, text...) with each absolute path shortened to its last part.

    ``known``: folders of which names may have blanks; default: the home, the working folder, ``$LLMSPARSE_DATA``.
    A user's name that is left anywhere, as a word, becomes ``user``.
    """
    known = _known() if known is None else known
    if isinstance(value, dict):
        return {without_local_paths(k, known): without_local_paths(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item, known) for item in value]
    return _text(value, known) if isinstance(value, str) else value


def _text(text: str, known: list[str]) -> str:
    if _is_path(text):
        return _last(text)
    for folder in known:  # "/home/Jane Doe" ends at no blank
        text = text.replace(folder, "/llmsparse-local")
    text = _ABSOLUTE.sub(lambda found: _last(found.group()), text)
    return re.sub(rf"\b{re.escape(name)}\b", "user", text) if (name := _user()) else text


def _is_path(text: str) -> bool:
    """Whether all of it is one path of this machine: from a root, a home, or upwards."""
    alone = "\n" not in text and not re.search(r"[,=]", text)
    return (
        alone
        and re.match(r"(/|~[\w.-]*[/\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)", text) is not None
        and len(text) > 1
    )


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _known() -> list[str]:
    folders = [str(Path.home()), os.getcwd(), os.environ.get("LLMSPARSE_DATA", "")]
    return sorted((f for f in folders if len(f) > 1), key=len, reverse=True)


def _user() -> str | None:
    """The name that this process runs under, where it says who somebody is."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return None
    return name if len(name) > 2 and name.lower() not in _SHARED else None
