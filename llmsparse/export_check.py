"""What every export's check shares: the text, the perplexity on it, the zeros, the zipped size."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmsparse.eval.fidelity import NLL, window_scores
from llmsparse.eval.forward import forward_of
from llmsparse.eval.perplexity import perplexity
from llmsparse.eval.text import load_text
from llmsparse.eval.windows import Windows, cut_windows

TOKENS = 8192
CONTEXT = 1024
CHUNK = 1 << 22  # bytes that are compressed at a time
LOSES = {"F32": 0.001, "F16": 0.001, "BF16": 0.001, "Q8_0": 0.02, "Q4_0": 0.6}  # of the perplexity, at most
EXACT = 0.001  # the same where the codes lay beside the model: nothing was rounded


class Text(NamedTuple):
    """About ``TOKENS`` tokens of Python's own documentation, which every machine has."""

    windows: Windows
    text: str
    label: str


def fixed_text(tokenizer: Any, positions: int) -> Text:
    text, _, label = load_text("builtin")
    context = min(CONTEXT, positions)
    cut = cut_windows(text, tokenizer, context)
    count = max(1, TOKENS // context)
    parts = (None if part is None else part[:count] for part in cut)
    return Text(Windows(*parts), text, label)  # type: ignore[arg-type]


@torch.inference_mode()
def score(model: Any, windows: Windows, name: str, progress: Any) -> tuple[float, float | None]:
    """Perplexity and its standard error."""
    forward = forward_of(model, windows.ids[:1])
    progress.start(name, len(windows.ids))
    found = []
    for ids, first in zip(windows.ids.split(1), windows.first.split(1), strict=True):
        found.append(window_scores(forward, None, ids, first)[NLL].sum(1))
        progress.advance(name, "")
    return perplexity(torch.cat(found), windows.scored.sum(1))


def zipped_share(file: Path) -> float:
    """Bytes of the file under zlib (level 1) over its bytes; of large files every eighth piece is measured."""
    size = file.stat().st_size
    step = CHUNK * (8 if size > 32 * CHUNK else 1)
    raw = small = 0
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            piece = stream.read(CHUNK)
            raw += len(piece)
            small += len(zlib.compress(piece, 1))
    return small / max(raw, 1)


def tolerance(result: dict[str, Any]) -> float:
    """How much larger the perplexity may be, as a share: by the coarsest type, or next to nothing for given codes."""
    if result["values"].get("from", "").endswith(".safetensors"):
        return EXACT
    return max(LOSES[name] for name in result["layouts"])


def verdict(share: float, allowed: float) -> list[str]:
    """What failed, in words; where nothing was rounded, a perplexity that fell is as wrong as one that rose."""
    fine = share <= allowed and (allowed > EXACT or -share <= allowed)
    return [] if fine else [f"perplexity is {share:+.2%} off the source's, and {allowed:.1%} is allowed"]
