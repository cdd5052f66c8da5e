"""Calibration text packed into windows of token ids."""

import hashlib
import math
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmsparse.documents import Document, documents
from llmsparse.errors import UserError, first_line

SELF = "self"  # the source that is the model's own writing
PIECE = 200_000  # characters tokenised at a time: a long document is cut at a line end near there


class Calibration(NamedTuple):
    """Windows of token ids and where they came from."""

    windows: Tensor  # (samples, sequence_length) int64
    sha256: str  # of the token ids: int32, little endian, row-major
    sources: list[dict[str, Any]]  # source, weight, tokens, and of a text documents, sha256

    @property
    def source_of(self) -> list[int]:
        """For each window the place of its source."""
        counts = shares([row["weight"] for row in self.sources], len(self.windows))
        return [source for source, _ in interleave(counts)]


class Taken(NamedTuple):
    """The tokens taken from one source."""

    source: str
    ids: list[int]
    facts: dict[
        str, Any
    ]  # of a text the count of documents used, and the sha256 of them joined by blank lines


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
    sampler: Any = None,
    least: int | None = None,
) -> Calibration:
    """Pack the text of ``source`` into ``samples`` windows of ``sequence_length`` tokens, without padding.

    A text that is too short is refused, or, where ``least`` says so, gives fewer windows, but not fewer than that.

    Documents are shuffled with ``seed``, tokenised without special tokens, joined by EOS if the tokenizer
    has one, and cut; what the tokenizer itself puts in front of a text (BOS) starts every window. Weighted
    sources are interleaved. Reading stops when there are tokens enough. The source ``self`` is written by
    ``sampler``, see ``llmsparse.sampling``.

    Raises:
        UserError: unknown, unreachable, empty, unreadable or too short sources; ids beyond ``vocab_size``.
    """
    weights = parse_sources(source)
    prefix = window_prefix(tokenizer)
    length = sequence_length - len(prefix)  # text tokens in a window
    if samples < 1 or sequence_length < 2 or length < 1:
        raise UserError(f"{samples} windows of {sequence_length} tokens: the least is 1 of {len(prefix) + 2}")
    counts = dict(zip(weights, shares(list(weights.values()), samples), strict=True))
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"{name} (weight {weights[name]:g}) gets none of {samples} windows; raise --samples"
            )
    taken = {}
    for name in [name for name in counts if name != SELF]:
        found = documents(name, seed=seed, token=token, cache_dir=cache_dir)
        taken[name] = _take(name, _texts(name, found, tokenizer, prefix), tokenizer, counts[name] * length)
        _check_vocabulary(name, [*prefix, *taken[name].ids], vocab_size)
    if (fitting := _check_enough(taken, weights, samples, length, least or samples)) < samples:
        samples = fitting
        counts = dict(zip(weights, shares(list(weights.values()), samples), strict=True))
    if SELF in counts:
        ids = sampler(tokenizer, prefix, counts[SELF], length, seed)
        taken[SELF] = Taken(SELF, ids.flatten().tolist(), {**asdict(sampler.options), "seed": seed})
    windows = np.empty((samples, sequence_length), dtype=np.int64)
    windows[:, : len(prefix)] = prefix
    for row, (i, j) in enumerate(interleave(list(counts.values()))):
        windows[row, len(prefix) :] = taken[list(counts)[i]].ids[j * length : (j + 1) * length]
    digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
    records = [
        {"source": name, "weight": weight, "tokens": len(taken[name].ids), **taken[name].facts}
        for name, weight in weights.items()
    ]
    return Calibration(torch.from_numpy(windows), digest, records)


def parse_sources(source: str) -> dict[str, float]:
    """Source -> weight, which sum to 1: ``"a.jsonl=3,b.txt=1"`` is ``{"a.jsonl": 0.75, "b.txt": 0.25}``.

    Without weights every source weighs the same; a path that exists is taken whole, whatever it contains (but
    ``builtin`` and ``self`` are never paths: a file of that name is ``./self``).
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
                return Taken(source, ids[:need], _facts(source, count, digest.hexdigest()))
    if not count:
        raise UserError(f"{source} holds no text: every document is blank or there is none")
    return Taken(source, ids, _facts(source, count, digest.hexdigest()))


def _facts(source: str, count: int, sha256: str) -> dict[str, Any]:
    python = {"python": platform.python_version()} if source == "builtin" else {}
    return {"documents": count, "sha256": sha256, **python}


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


def _check_enough(
    taken: dict[str, Taken], weights: dict[str, float], samples: int, length: int, least: int
) -> int:
    """How many windows there are of ``samples``; refuse texts that do not give ``least`` of them.

    The model's own writing is never too short.
    """
    shared = list(weights.values())
    # whole windows that each source can fill
    room = [len(taken[name].ids) // length if name in taken else samples for name in weights]
    split = ((s, shares(shared, s)) for s in range(samples, 0, -1))
    largest = next((s for s, n in split if all(0 < x <= y for x, y in zip(n, room, strict=True))), 0)
    if largest >= least:
        return largest
    for name, most, count in zip(weights, room, shares(shared, samples), strict=True):
        if most < count:
            advice = f"the largest --samples is {largest}" if largest else "not one window can be filled"
            raise UserError(
                f"{name} has {len(taken[name].ids):,} tokens, and {count * length:,} are needed ({count} "
                f"windows of {length} text tokens); {advice}; give more text or a shorter --sequence-length"
            )
    raise AssertionError("every source can fill its windows")
