"""Every export of one model, each checked, side by side: what it weighs, what it is worth, how fast it is."""

import json
from pathlib import Path
from typing import Any

from llmsparse import export_report, matrix_page, plugins
from llmsparse.atomic import write_whole
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from llmsparse.progress import Quiet
from llmsparse.report import finite
from llmsparse.values import Values

ROUNDED = ("int8", "int4:32")  # of a model without codes
FLOATS_ALONE = ("dense",)
PAGE, TABLE = "matrix.html", "matrix.json"


def export_matrix(
    model: str | Path,
    *,
    out: str | Path | None = None,
    formats: str | None = None,
    values: str | None = None,
    embeddings: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """Export ``model`` to each format, check each in its own runtime, and draw them on one page.

    ``out``: a folder with one for each target, ``matrix.json`` and ``matrix.html``; default: ``NAME-exports`` here.
    Targets that lie there already are kept, so that a run that was cut off goes on; ``overwrite`` writes them again.
    ``formats``, ``values``: separated by commas; default: all, and the codes beside the model (none: int8, int4:32).
    Returns ``rows`` (one a target, with ``why`` where it was not written), ``failed`` (checks that failed), ``page``.

    Raises:
        UserError: no such format or values, or ``out`` holds the exports of another model.
    """
    checkpoint = Checkpoint.open(model, revision, token, cache_dir)
    targets = _targets(checkpoint, formats, values)
    folder = Path(out or f"{checkpoint.folder.resolve().name}-exports").expanduser().absolute()
    _check_folder(folder, model)
    progress = progress or Quiet()
    options = {
        "embeddings": embeddings, "revision": revision, "token": token, "cache_dir": cache_dir,
        "trust_remote_code": trust_remote_code, "progress": progress,
    }  # fmt: skip
    rows = []
    for format, kind in targets:
        place = folder / "-".join(filter(None, (format, kind and kind.replace(":", "-"))))
        progress.message(f"{place.name}:")
        rows.append(_row(model, place, format, kind, overwrite, options))
        progress.message(f"{place.name}: {rows[-1]['why'] or 'checked'}")
    return _told(model, folder, rows)


def _targets(checkpoint: Checkpoint, formats: str | None, values: str | None) -> list[tuple[str, str | None]]:
    """(format, values) of each export."""
    known = plugins.names("exporters")
    asked = known if formats is None else _listed(formats)
    for name in asked:
        if name not in known:
            raise UserError(f"format {name!r} is unknown; known: {', '.join(known)}")
    kinds: list[str | None] = [None]
    if values is not None:
        kinds = [Values.parse(text).name for text in _listed(values)]
    elif GridFile.open(checkpoint.folder) is None:
        kinds = [*ROUNDED]
    return [(name, kind) for name in asked for kind in ([None] if name in FLOATS_ALONE else kinds)]


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _check_folder(folder: Path, model: str | Path) -> None:
    """Refuse a folder that holds anything but exports of this model."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder with --out")
    for entry in sorted(folder.iterdir()):
        if entry.name in (PAGE, TABLE):
            continue
        found = _read(entry)
        if found is None:
            raise UserError(f"{folder} holds {entry.name}, which is no export; choose another --out")
        if found.get("model") != str(model):
            raise UserError(
                f"{folder} holds an export of {found.get('model')}, and {model} was asked for; choose another --out"
            )


def _read(place: Path) -> dict[str, Any] | None:
    """What export and check said of a folder that an export wrote."""
    for file in (place / export_report.NAME, place / "report.json"):
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return found.get("export", found) if isinstance(found, dict) else None
    return None


def _row(
    model: str | Path, place: Path, format: str, kind: str | None, overwrite: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Export and check one target, unless it lies there already; what stopped it is ``why``."""
    why, found = None, None if overwrite else _read(place)
    if found is None or "check" not in found:
        found = None
        try:
            found = export(model, place, format=format, values=kind, check=True, overwrite=True, **options)
        except UserError as error:
            why, found = str(error), _checked(place)
    row: dict[str, Any] = {
        "name": place.name,
        "format": format,
        "values": kind,
        "folder": str(place),
        "why": why,
        "failed": [],
    }
    return row if found is None else row | _figures(found)


def _checked(place: Path) -> dict[str, Any] | None:
    """What was written although its check failed."""
    found = _read(place)
    return found if found is not None and "check" in found else None


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    check, runtime = found["check"], found["check"]["runtime"] or {}
    return {
        "source_bytes": found["bytes"]["before"],
        "bytes": check["file_bytes"],
        "zipped_bytes": round(check["file_bytes"] * check["zipped_share"]),
        "bits_per_weight": check["bits_per_weight"],
        "perplexity": check["perplexity"],
        "text": check["text"],
        "tokens": check["tokens"],
        "zeros": check["zeros"],
        "runtime": runtime.get("name"),
        "load_seconds": runtime.get("load_seconds"),
        "tokens_per_second": runtime.get("tokens_per_second", {}),
        "seconds": found["seconds"],
        "failed": check["failed"],
    }


def _told(model: str | Path, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not any("bytes" in row for row in rows):
        raise UserError("nothing was exported: " + "; ".join(f"{row['name']}: {row['why']}" for row in rows))
    result: dict[str, Any] = {
        "model": str(model),
        "out": str(folder),
        "rows": rows,
        "failed": [f"{row['name']}: {text}" for row in rows for text in row["failed"]],
        "page": None,
        "warnings": [],
    }
    write_whole(folder / TABLE, json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    try:
        write_whole(folder / PAGE, matrix_page.html_of(result))
        result["page"] = str(folder / PAGE)
    except UserError as error:  # without matplotlib the table is all there is, and that is said
        result["warnings"].append(str(error))
    return result
