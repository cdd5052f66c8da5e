"""What of a folder may be published: its files, without local paths, and only as a run left them."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from llmsparse.errors import UserError
from llmsparse.export_report import NAME as EXPORT
from llmsparse.local_paths import without_local_paths
from llmsparse.runs import OWN
from llmsparse.sha256 import file_sha256

REPORT, CARD, JOURNAL = "report.json", "README.md", "journal.jsonl"
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
TEXT_BYTES = 16 << 20  # larger files are weights or vocabularies, not notes with a token in them


class Publication(NamedTuple):
    """``files``: path in the repository -> the file, or its cleaned text as bytes. ``report``, ``export``: cleaned."""

    folder: Path
    files: dict[str, Path | bytes]
    report: dict[str, Any]
    export: dict[str, Any]
    card: str | None  # README.md as it lies there

    @property
    def mark(self) -> str:
        """What a card of these very files carries: a folder that is made of this one copies its card, too."""
        hashes = self.export.get("files") or self.report.get("files") or {}
        return f"<!-- llmsparse card of {sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]} -->"


def collect(folder: str | Path) -> Publication:
    """Everything of a folder that llmsparse wrote, but hidden files, and the card, which is made anew.

    Raises:
        UserError: no such folder, none that llmsparse wrote, one whose run was cut off, weights that are not those
            of its report, a file with a hub token in it.
    """
    place = Path(folder).expanduser()
    _refuse_unfinished(place)
    if not place.is_dir():
        raise UserError(f"{folder} is not a folder; name one that llmsparse prune, quantize or export wrote")
    report, export = _read(place / REPORT), _read(place / EXPORT)
    if not report and not export:
        raise UserError(
            f"{folder} holds neither {REPORT} nor {EXPORT}; name a folder that llmsparse prune, quantize or export wrote"
        )
    export = export or report.get("export") or {}
    _refuse_changed(place, export.get("files") or report.get("files") or {})
    files = {name: _content(file, name) for name, file in _files(place)}
    card = place / CARD
    if card.is_file():
        _refuse_token(card)
    text = card.read_text("utf-8") if card.is_file() else None
    return Publication(place, files, without_local_paths(report), without_local_paths(export), text)


def _refuse_unfinished(place: Path) -> None:
    work = place.absolute().with_name(f".{place.name}.llmsparse-work")  # it grows there until it is whole
    begun = (place / JOURNAL).exists() or (work.exists() and not place.exists())
    if begun or re.fullmatch(r"\..*\.llmsparse-(work|new|spool|width|depth)", place.resolve().name):
        raise UserError(
            f"{place} belongs to a run that was cut off; finish it with the same command and --resume, then push"
        )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); write the folder again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no report of llmsparse; write the folder again")
    return found


def _refuse_changed(place: Path, hashes: dict[str, str]) -> None:
    """Each weight file must be the one that was hashed when it was written."""
    if not hashes:
        raise UserError(f"the report in {place} has no hashes of its files; write the folder again")
    for name, expected in hashes.items():
        if not (place / name).is_file():
            raise UserError(f"{place / name} is gone; its report lists it. Write the folder again")
        if (found := file_sha256(place / name)) != expected:
            raise UserError(
                f"{place / name} is not the file that its report describes (sha256 {found[:12]}..., reported "
                f"{expected[:12]}...); write the folder again, or put the file back"
            )


def _files(place: Path) -> list[tuple[str, Path]]:
    """Name in the repository and file; nothing hidden, nothing half-written."""
    found = []
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place)
        hidden = any(part.startswith(".") for part in name.parts) or file.suffix == ".tmp"
        if file.is_file() and not hidden and str(name) != CARD:
            found.append((name.as_posix(), file))
    return found


def _refuse_token(file: Path) -> None:
    if file.stat().st_size <= TEXT_BYTES and TOKEN.search(file.read_bytes()):
        raise UserError(f"{file} holds a hub token; remove it there, and revoke it if it was shared")


def _content(file: Path, name: str) -> Path | bytes:
    """The file; or its text where local paths are taken out."""
    _refuse_token(file)
    if OWN.fullmatch(name):
        return (json.dumps(without_local_paths(_read(file)), indent=1, ensure_ascii=False) + "\n").encode()
    if name == "config.json" and (config := _read(file)).get("_name_or_path"):
        cleaned = {**config, "_name_or_path": without_local_paths(config["_name_or_path"])}
        return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    return file
