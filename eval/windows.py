"""A text as windows of token ids, with the words and bytes that each token stands for."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmsparse.calibration import window_prefix
from llmsparse.errors import UserError


class Windows(NamedTuple):
    """Windows to score. Prediction p of a window is of its token p + 1; those before ``first`` are not scored."""

    ids: Tensor  # (count, context) int64
    first: Tensor  # (count,) int64
    bytes: Tensor | None  # (count, context - 1) int64, UTF-8 bytes of each predicted token; None: unknown
    words: Tensor | None  # the same in words, each counted where it begins

    @property
    def scored(self) -> Tensor:
        """Which predictions count: bool (count, context - 1)."""
        return torch.arange(self.ids.shape[1] - 1) >= self.first[:, None]


def cut_windows(
    text: str, tokenizer: Any, context: int, windows: int | None = None, stride: int | None = None
) -> Windows:
    """Tokenise ``text`` once and cut it into windows of ``context`` tokens, ``stride`` tokens apart.

    Without ``stride`` the windows do not overlap, and of each every prediction is scored, as GPTQ
    (arXiv:2210.17323), SparseGPT and Wanda do. With it every window after the first scores its last ``stride``
    tokens. A tokenizer that adds BOS itself gets it at the start of every window. What is left of the text
    after the last whole window is not scored.

    Raises:
        UserError: the text is shorter than one window, or has fewer windows than asked for, or the stride
            is longer than a window.
    """
    prefix = window_prefix(tokenizer)
    length = context - len(prefix)
    if length < 1 or context < 2:
        raise UserError(f"--context {context} leaves nothing to predict; use at least {len(prefix) + 2}")
    if stride is not None and not 1 <= stride <= length:
        raise UserError(
            f"--stride {stride} must be from 1 to the {length} text tokens of a window; larger ones skip text"
        )
    step = stride or length
    ids, sizes = _tokens(text, tokenizer)
    count = (len(ids) - length) // step + 1 if len(ids) >= length else 0
    _check_count(count, windows, len(ids), length, step)
    places = torch.arange(windows or count)[:, None] * step + torch.arange(length)  # (count, length)
    special = max(len(prefix) - 1, 0)  # predictions that are of the prefix itself
    first = torch.full((len(places),), max(context - 1 - step, special))
    first[0] = special
    start = torch.tensor(prefix, dtype=torch.int64).expand(len(places), -1)
    predicted = places if prefix else places[:, 1:]
    byte_sizes, words = (
        (None, None) if sizes is None else (_behind(special, size[predicted]) for size in sizes)
    )
    return Windows(
        torch.cat([start, torch.tensor(ids, dtype=torch.int64)[places]], dim=1),
        first, byte_sizes, words,
    )  # fmt: skip


def _behind(count: int, sizes: Tensor) -> Tensor:
    """``sizes`` (windows, tokens) behind ``count`` columns of zeros."""
    return torch.nn.functional.pad(sizes, (count, 0))


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], tuple[Tensor, Tensor] | None]:
    """Ids of ``text``, and of each the UTF-8 bytes and words; None when the tokenizer tells no offsets."""
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, **options)
    if not fast or not found["input_ids"]:
        return found["input_ids"], None
    return found["input_ids"], _sizes(text, [start for start, _ in found["offset_mapping"]])


def _sizes(text: str, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Bytes and words of each token: a token reaches to where the next begins, the first from the start."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    width = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    begins = np.zeros(len(characters), dtype=np.int64)
    begins[[match.start() for match in re.finditer(r"\S+", text)]] = 1
    edges = np.append(np.maximum.accumulate(starts), len(text))
    edges[0] = 0
    sums = [np.concatenate([[0], np.cumsum(of)]) for of in (width, begins)]
    byte_sizes, words = (torch.from_numpy(np.diff(total[edges])) for total in sums)
    return byte_sizes, words


def _check_count(count: int, windows: int | None, tokens: int, length: int, step: int) -> None:
    asked = windows or 1
    if count >= asked:
        return
    advice = f"use at most --windows {count}" if count else "use a shorter --context or a longer text"
    raise UserError(
        f"the text has {tokens:,} tokens, and {(asked - 1) * step + length:,} are needed for {asked} "
        f"window{'s' * (asked > 1)} of {length} text tokens; {advice}"
    )


def bos_rule(tokenizer: Any) -> str:
    """What starts a window, in words."""
    prefix = window_prefix(tokenizer)
    if not prefix:
        return "none: the tokenizer adds none, and the first token of a window is not predicted"
    special = " ".join(tokenizer.convert_ids_to_tokens(prefix))
    return f"{special} starts every window, as the tokenizer adds it"
