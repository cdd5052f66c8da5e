"""Rows of benchmarks/results/*.json: a list of figures, each with where it comes from."""

import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmsparse.atomic import write_whole
from llmsparse.device import processor
from llmsparse.errors import first_line
from llmsparse.report import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def append(file: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to ``file``, which is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps([*read(file), row], indent=1, ensure_ascii=False) + "\n")


def provenance(*files: str | Path) -> dict[str, Any]:
    """Versions, machine, commit, date and command; sha256 of the data ``files`` that were read."""
    return {
        "versions": versions() | _triton(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "data_sha256": {public(file): sha256(Path(file)) for file in files if Path(file).is_file()},
        "command": _command(),
    }


def _triton() -> dict[str, str]:
    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {}


def _command() -> str:
    given = [f'"{part}"' if " " in part else part for part in map(public, sys.argv[1:])]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *given])


def public(argument: str | Path) -> str:
    """``argument`` without a machine's folders: named from $LLMSPARSE_DATA on, or by its last part alone.

    Of sources with weights (a=0.5,b=0.5) each is named so.
    """
    text = str(argument)
    if re.fullmatch(r"[^,]+=[\d.]+(,[^,]+=[\d.]+)+", text):
        pairs = [part.rpartition("=") for part in text.split(",")]
        return ",".join(f"{public(path)}={weight}" for path, _, weight in pairs)
    name, equals, path = text.rpartition("=")
    folder = os.environ.get("LLMSPARSE_DATA")
    if folder and path.startswith(folder):
        return f"{name}{equals}$LLMSPARSE_DATA{path.removeprefix(folder.rstrip('/'))}"
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else text


def calibration_text() -> str:
    """text/c4/calib.jsonl below the folder that LLMSPARSE_DATA names, else ``builtin``."""
    folder = os.environ.get("LLMSPARSE_DATA")
    found = Path(folder, "text", "c4", "calib.jsonl") if folder else None
    return str(found) if found and found.exists() else "builtin"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reason(error: BaseException) -> str:
    """Why a row has no figure, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def commit() -> str:
    """The commit of this repository, with ``+changes`` when the sources differ from it.

    A copy of the sources without git has the one that $LLMSPARSE_COMMIT names, else "unknown".
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    sources = ("llmsparse", "eval", "kernels", "benchmarks/*.py")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LLMSPARSE_COMMIT") or "unknown"
