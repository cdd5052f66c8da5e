"""Calibration text, from wherever it lies, packed into windows of token ids."""

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import UserError, first_line

SUFFIXES = (".txt", ".jsonl", ".parquet")
FORMS = (
    "builtin, a .txt, .jsonl or .parquet file, a folder of those, a hub dataset owner/name[:config][:split], "
    "or several of these with weights (a.jsonl=0.5,b.txt=0.5)"
)
HUB_ID = re.compile(r"([\w.-]+/)?[\w-][\w.-]*(:[^:]*){0,2}")
SPLITS = ("train", "validation", "test")
SHUFFLE_BUFFER = 1000  # rows of a stream read ahead, of which one is drawn at random
PIECE = 200_000  # characters tokenised at a time: a long document is cut at a line end near there

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation
Unit = tuple[
    Path, int, int
]  # a file, the place in it (byte offset, row group) and that place's number from 1


class Calibration(NamedTuple):
    """Windows of token ids and where they came from."""

    windows: Tensor  # (samples, sequence_length) int64
    sha256: str  # of the token ids: int32, little endian, row-major
    sources: list[dict[str, Any]]  # source, weight, and of the text used: documents, tokens, sha256


class Taken(NamedTuple):
    """The tokens taken from one source."""

    source: str
    ids: list[int]
    documents: int
    sha256: str  # of the documents used, joined by blank lines


def calibrate(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    token: str | None = None,
    cache_dir: str | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    """Pack the text of ``source`` into ``samples`` windows of ``sequence_length`` tokens, without padding.

    Documents are shuffled with ``seed``, tokenised without special tokens, joined by EOS if the tokenizer
    has one, and cut; what the tokenizer itself puts in front of a text (BOS) starts every window. Weighted
    sources are interleaved. Reading stops when there are tokens enough.

    Raises:
        UserError: unknown, unreachable, empty, unreadable or too short sources; ids beyond ``vocab_size``.
    """
    weights = parse_sources(source)
    prefix = window_prefix(tokenizer)
    length = sequence_length - len(prefix)  # text tokens in a window
    if samples < 1 or sequence_length < 2 or length < 1:
        raise UserError(f"{samples} windows of {sequence_length} tokens: the least is 1 of {len(prefix) + 2}")
    counts = shares(list(weights.values()), samples)
    taken = []
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if not count:
            raise UserError(f"{name} (weight {weight:g}) gets none of {samples} windows; raise --samples")
        texts = _texts(name, documents(name, seed=seed, token=token, cache_dir=cache_dir), tokenizer, prefix)
        taken.append(_take(name, texts, tokenizer, count * length))
        _check_vocabulary(name, [*prefix, *taken[-1].ids], vocab_size)
    _check_enough(taken, list(weights.values()), samples, length)
    windows = np.empty((samples, sequence_length), dtype=np.int64)
    windows[:, : len(prefix)] = prefix
    for row, (i, j) in enumerate(interleave(counts)):
        windows[row, len(prefix) :] = taken[i].ids[j * length : (j + 1) * length]
    digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
    records = [_record(part, weight) for part, weight in zip(taken, weights.values(), strict=True)]
    return Calibration(torch.from_numpy(windows), digest, records)


def _record(part: Taken, weight: float) -> dict[str, Any]:
    record = {"source": part.source, "weight": weight, "documents": part.documents, "tokens": len(part.ids)}
    python = {"python": platform.python_version()} if part.source == "builtin" else {}
    return record | {"sha256": part.sha256} | python


def parse_sources(source: str) -> dict[str, float]:
    """Source -> weight, which sum to 1: ``"a.jsonl=3,b.txt=1"`` is ``{"a.jsonl": 0.75, "b.txt": 0.25}``.

    Without weights every source weighs the same; a path that exists is taken whole, whatever it contains.
    """
    if Path(source).expanduser().exists():
        return {source: 1.0}
    parts = [part.strip() for part in source.split(",")]
    weighted = [bool(re.fullmatch(r".+=[^=/]*", part)) for part in parts]
    if any(weighted) and not all(weighted):
        raise UserError(f"--calibration {source}: give every source a weight (a.jsonl=0.5,b.txt=0.5) or none")
    weights: dict[str, float] = {}
    for part in parts:
        name, _, number = part.rpartition("=") if any(weighted) else (part, "", "1")
        if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number) or not float(number):
            raise UserError(f"--calibration {source}: the weight {number!r} is not a number above 0")
        if not name or name in weights:
            raise UserError(f"--calibration {source!r} names {name or 'nothing'} twice or between commas")
        weights[name] = float(number)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def shares(weights: list[float], samples: int) -> list[int]:
    """Split ``samples`` by ``weights`` into whole numbers of that exact total (largest remainders first)."""
    exact = [weight * samples for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def interleave(counts: list[int]) -> list[tuple[int, int]]:
    """(source, its window) in an order that spreads every source's windows evenly."""
    places = sorted(((j + 0.5) / count, i, j) for i, count in enumerate(counts) for j in range(count))
    return [(i, j) for _, i, j in places]


def window_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts in front of a text: [BOS], or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = (i for i in range(len(special)) if special[i : i + len(plain)] == plain)
    return list(special[: next(starts, 0)])


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
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"{file} is parquet, and reading it needs the package pyarrow, which is not installed; "
            "pip install pyarrow, or give a .txt or .jsonl file"
        ) from error
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
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
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source} is no file or folder here, and reading it as a hub dataset needs the package datasets, "
            "which is not installed; pip install datasets, or give a .txt or .jsonl file"
        ) from error

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


def _texts(source: str, found: Iterator[Document], tokenizer: Any, prefix: list[int]) -> Iterator[str]:
    for document in found:
        text = document if isinstance(document, str) else _conversation(source, document, tokenizer, prefix)
        if text.strip():
            yield text


def _conversation(source: str, messages: list[dict[str, Any]], tokenizer: Any, prefix: list[int]) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{source} holds conversations, and the model's tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: the chat template refuses one: {first_line(error)}") from error
    # A template writes BOS itself; where every window starts with it already, it would come twice.
    return text.removeprefix(tokenizer.bos_token) if prefix and tokenizer.bos_token else text


def _take(source: str, texts: Iterator[str], tokenizer: Any, need: int) -> Taken:
    """The first ``need`` tokens of the texts joined by EOS (fewer where they end before)."""
    ids: list[int] = []
    count, digest = 0, hashlib.sha256()
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(texts):
        encoded = _encode(source, tokenizer, [piece for piece, _ in batch])
        for (piece, starts), new in zip(batch, encoded, strict=True):
            if starts and count:
                digest.update(b"\n\n")
                ids += eos
            count += starts
            digest.update(piece.encode())
            ids += new
            if len(ids) >= need:
                return Taken(source, ids[:need], count, digest.hexdigest())
    if not count:
        raise UserError(f"{source} holds no text: every document is blank or there is none")
    return Taken(source, ids, count, digest.hexdigest())


def _encode(source: str, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} holds half a surrogate pair, which is not text") from error
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def _batches(texts: Iterator[str]) -> Iterator[list[tuple[str, bool]]]:
    """(piece, whether it starts a document) in lists of about ``PIECE`` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        for number, piece in enumerate(_pieces(text)):
            batch.append((piece, number == 0))
            size += len(piece)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        line_end = text.rfind("\n", start, start + PIECE) + 1
        end = line_end if line_end > start else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _check_vocabulary(source: str, ids: list[int], vocab_size: int | None) -> None:
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        found = f"{source} has token id {max(ids)}, but the model's vocabulary {vocab_size}"
        raise UserError(f"{found}; its tokenizer belongs to another model")


def _check_enough(taken: list[Taken], weights: list[float], samples: int, length: int) -> None:
    room = [len(part.ids) // length for part in taken]  # whole windows that each source can fill
    for part, count in zip(taken, shares(weights, samples), strict=True):
        if len(part.ids) < count * length:
            split = [(s, shares(weights, s)) for s in range(samples - 1, 0, -1)]
            fitting = (s for s, n in split if all(0 < x <= most for x, most in zip(n, room, strict=True)))
            largest = next(fitting, 0)
            advice = f"the largest --samples is {largest}" if largest else "not one window can be filled"
            raise UserError(
                f"{part.source} has {len(part.ids):,} tokens, and {count * length:,} are needed ({count} "
                f"windows of {length} text tokens); {advice}; give more text or a shorter --sequence-length"
            )
