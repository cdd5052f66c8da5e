"""Documents of text, from wherever they lie: inside Python, in files, on the hub."""

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from llmsparse.errors import UserError, first_line

SUFFIXES = (".txt", ".jsonl", ".parquet")
FORMS = (
    "builtin, a .txt, .jsonl or .parquet file, a folder of those, a hub dataset owner/name[:config][:split], "
    "or several of these with weights (a.jsonl=0.5,b.txt=0.5)"
)
HUB_ID = re.compile(r"([\w.-]+/)?[\w-][\w.-]*(:[^:]*){0,2}")
SPLITS = ("train", "validation", "test")
SHUFFLE_BUFFER = 1000  # rows of a stream read ahead, of which one is drawn at random

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation
Unit = tuple[
    Path, int, int
]  # a file, the place in it (byte offset, row group) and that place's number from 1


def builtin_documents(held_out: bool = False) -> list[str]:
    """The English documentation inside Python (pydoc's topics, sorted), the last fifth or what is before it.

    It differs between Python versions, so a figure measured on it names the version.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("builtin: this Python lacks pydoc's topics; give a file or a hub dataset") from error
    texts = [topics[name] for name in sorted(topics)]
    cut = len(texts) - len(texts) // 5
    return texts[cut:] if held_out else texts[:cut]


def documents(
    source: str, *, seed: int | None = None, token: str | None = None, cache_dir: str | None = None
) -> Iterator[Document]:
    """The documents of one source, read as they are asked for; shuffled if ``seed`` is given.

    Files are shuffled document by document (parquet: row groups, and rows inside each); a stream from the
    hub through a buffer of 1,000 rows.
    """
    path = Path(source).expanduser()
    if source == "builtin":
        texts = builtin_documents()
        if seed is not None:
            Random(seed).shuffle(texts)
        yield from texts
    elif path.exists():
        yield from _local(path, seed)
    elif path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise UserError(f"{source} does not exist; sources are {FORMS}")
    elif HUB_ID.fullmatch(source):
        yield from _hub(source, seed, token, cache_dir)
    else:
        raise UserError(f"{source!r} is not a source of text; sources are {FORMS}")


def _local(path: Path, seed: int | None) -> Iterator[Document]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    units = [unit for file in files for unit in _units(file)]
    random = None if seed is None else Random(seed)
    if random:
        random.shuffle(units)
    for unit in units:
        found = _read(unit)
        if random:
            random.shuffle(found)
        yield from found


def _units(file: Path) -> list[Unit]:
    """What can be read alone: a .txt whole, a line of .jsonl, a row group of .parquet."""
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty")
    if file.suffix == ".txt":
        return [(file, 0, 1)]
    if file.suffix == ".parquet":
        return [(file, group, group + 1) for group in range(_parquet(file).num_row_groups)]
    if file.suffix != ".jsonl":
        raise UserError(f"{file} is of no known kind; sources are {FORMS}")
    with file.open("rb") as stream:
        lines = [(len(line), line.isspace()) for line in stream]
    offsets = [0, *accumulate(length for length, _ in lines)]
    return [(file, offsets[i], i + 1) for i, (_, blank) in enumerate(lines) if not blank]


def _read(unit: Unit) -> list[Document]:
    file, place, number = unit
    if file.suffix == ".parquet":
        return _read_group(file, place)
    try:
        if file.suffix == ".txt":
            return [file.read_bytes().decode()]  # line ends as they are
        with file.open("rb") as lines:
            lines.seek(place)
            row = json.loads(lines.readline())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}, byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {number} is not JSON: {error.msg}") from error
    return [_document(row, f"{file} line {number}")]


def _parquet(file: Path) -> Any:
    reader = _package("pyarrow.parquet", f"{file} is parquet, and reading it")
    try:
        return reader.ParquetFile(file)
    except (_package("pyarrow", str(file)).ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable parquet file ({first_line(error)})") from error


def _read_group(file: Path, group: int) -> list[Document]:
    parquet = _parquet(file)
    column = _column(parquet.schema_arrow.names, str(file))
    try:
        rows = parquet.read_row_group(group, columns=[column]).to_pylist()
    except (OSError, ValueError) as error:  # Arrow's errors are either
        raise UserError(f"{file} cannot be read ({first_line(error)})") from error
    return [_document(row, f"{file} row group {group + 1} row {i}") for i, row in enumerate(rows, 1)]


def _hub(source: str, seed: int | None, token: str | None, cache_dir: str | None) -> Iterator[Document]:
    rows = enumerate(_hub_rows(source, seed, token, cache_dir), 1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:  # of datasets, the hub's client or its HTTP library, whichever that is
            raise UserError(
                f"{source} is no file or folder here, and reading it as a hub dataset failed "
                f"({type(error).__name__}: {first_line(error)}); check its name, the connection and --token"
            ) from error
        yield _document(row, f"{source} row {number}")


def _hub_rows(source: str, seed: int | None, token: str | None, cache_dir: str | None) -> Iterator[Any]:
    datasets = _package("datasets", f"{source} is no file or folder here, and reading it as a hub dataset")
    name, *rest = source.split(":")
    if len(rest) == 1 and rest[0] in SPLITS:
        rest = ["", *rest]
    config, split = [part or None for part in [*rest, "", ""][:2]]
    options = {"streaming": True, "token": token, "cache_dir": cache_dir}
    rows = datasets.load_dataset(name, config, split=split or "train", **options)
    yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _column(columns: Iterable[str], where: str) -> str:
    for column in ("text", "messages"):
        if column in columns:
            return column
    raise UserError(f"{where} has no column text or messages; found: {', '.join(columns) or 'none'}")


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with a field text or messages")
    column = _column(row, where)
    value = row[column]
    if column == "text" and not isinstance(value, str):
        raise UserError(f"{where}: text is a {type(value).__name__}, not a string")
    messages = value if isinstance(value, list) and value else [None]
    if column == "messages" and not all(isinstance(m, dict) and "role" in m for m in messages):
        raise UserError(f"{where}: messages is not a list of objects with role and content")
    return value


def _package(module: str, what: str) -> Any:
    """A module that only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs the package {package}, which is not installed; pip install {package}, or give a .txt or "
            ".jsonl file"
        ) from error
