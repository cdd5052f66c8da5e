"""What every export's check shares: the text, the perplexity on it, the zeros, the zipped size."""

import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.device import processor
from llmsparse.eval.fidelity import NLL, window_scores
from llmsparse.eval.forward import forward_of
from llmsparse.eval.perplexity import perplexity
from llmsparse.eval.text import load_text
from llmsparse.eval.windows import Windows, cut_windows
from llmsparse.runtime_child import THREADS, rate

TOKENS = 8192
CONTEXT = 1024
CHUNK = 1 << 22  # bytes that are compressed at a time
LOSES = {  # of the perplexity, at most
    **dict.fromkeys(("F32", "F16", "BF16"), 0.001),
    **dict.fromkeys(("Q8_0", "Q6_K", "W8A16", "int8"), 0.02),
    "Q4_K": 0.3,  # as many bits as Q4_0, but a minimum for every block and finer scales
    **dict.fromkeys(("Q4_0", "W4A16", "int4"), 0.6),
}
EXACT = 0.001  # the same where the codes lay beside the model: nothing was rounded


class Text(NamedTuple):
    """Some tokens of Python's own documentation, which every machine has."""

    windows: Windows
    text: str
    label: str


def fixed_text(tokenizer: Any, positions: int, tokens: int | None = None) -> Text:
    """About ``tokens`` tokens (``TOKENS``, if not given) in windows that a model of so many ``positions`` takes."""
    text, _, label = load_text("builtin")
    context = min(CONTEXT, positions)
    cut = cut_windows(text, tokenizer, context)
    count = max(1, (tokens or TOKENS) // context)
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


class Zeros:
    """Counts the zeros of linear weights, of the source and of what was exported."""

    def __init__(self) -> None:
        self.source = self.export = self.both = self.total = 0

    def add(self, source: Tensor, exported: Tensor) -> None:
        """Of one weight, both of one shape."""
        was, now = source == 0, exported == 0
        self.source += int(was.sum())
        self.export += int(now.sum())
        self.both += int((was & now).sum())
        self.total += was.numel()

    def shares(self) -> dict[str, float | None]:
        """Of the source's and the export's linear weights; and of the source's zeros those that still are."""
        kept = self.both / self.source if self.source else None
        return {"source": self.source / self.total, "export": self.export / self.total, "kept": kept}


def request(windows: Windows) -> dict[str, Any]:
    """The windows for a process of its own: ``ids``; predictions before position ``first`` do not count."""
    return {"ids": windows.ids.tolist(), "first": windows.first.tolist()}


def told(losses: list[float], windows: Windows) -> tuple[float, float | None]:
    """Perplexity and its standard error of the summed losses (nats) of each window."""
    return perplexity(torch.tensor(losses, dtype=torch.float64), windows.scored.sum(1))


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest ``count`` tokens after ``prompt`` in transformers."""
    told = model(input_ids=torch.tensor([prompt]), use_cache=True)
    found: list[int] = []
    while len(found) < count:
        found.append(int(told.logits[0, -1].argmax()))
        read = torch.tensor([found[-1:]])
        told = model(input_ids=read, past_key_values=told.past_key_values, use_cache=True)
    return found


def equal(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


@torch.inference_mode()
def speeds(model: Any, ids: Tensor) -> dict[str, float]:
    """Tokens a second of greedy decoding in transformers after a prompt (tokens,), by threads; the fastest of some."""
    before, found = torch.get_num_threads(), {}
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            found[str(threads)] = rate(lambda count: _decode(model, ids, count))
    finally:
        torch.set_num_threads(before)
    return found


def summary(
    text: Text, result: dict[str, Any], *, source: float, exported: tuple[float, float | None], zeros: dict[str, Any],
    files: list[Path], gain: str, runtime: dict[str, Any] | None, activations: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """What every check reports; ``failed`` says what was beyond the tolerance.

    ``exported``: perplexity and standard error of the export. ``files``: those that hold weights. ``gain``: what the
    runtime gains from zeros. ``runtime``: its ``name`` with version, ``load_seconds``, ``tokens_per_second`` by
    threads. ``activations``: what the perplexity may lose besides, where the runtime rounds activations.
    """
    found, error = exported
    size = sum(file.stat().st_size for file in files)
    zipped = sum(zipped_share(file) * file.stat().st_size for file in files) / max(size, 1)
    change, allowed = found / source - 1, tolerance(result)
    return {
        "text": text.label,
        "tokens": int(text.windows.scored.sum()),
        "perplexity": {"source": source, "export": found, "standard_error": error, "change": change},
        "tolerance": allowed + activations,
        "zeros": zeros,
        "file_bytes": size,
        "bits_per_weight": result["bits_per_weight"],
        "zipped_share": zipped,
        "says": f"{gain}; zipped (zlib, level 1) it shrinks by {1 - zipped:.0%}",
        "runtime": runtime,
        "processor": processor(),
        "failed": verdict(change, allowed + activations, both=allowed == EXACT),
        "notes": [],
    }


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
    values = result["values"]
    names = [*result["layouts"], *values.get("kinds", ()), values.get("embeddings", "")]
    if values.get("from", "").endswith(".safetensors"):
        names = values.get("rounded", ())
    return max((LOSES.get(name.partition(":")[0], EXACT) for name in names), default=EXACT)


def verdict(share: float, allowed: float, *, both: bool) -> list[str]:
    """What failed, in words; ``both``: nothing was rounded, a perplexity that fell is as wrong as one that rose."""
    fine = share <= allowed and (not both or -share <= allowed)
    return [] if fine else [f"perplexity is {share:+.2%} off the source's, and {allowed:.1%} is allowed"]


def _decode(model: Any, ids: Tensor, count: int) -> float:
    """Seconds of ``count`` greedy tokens after a prompt whose own pass does not count."""
    told = model(input_ids=ids[None], use_cache=True)
    begun = time.perf_counter()
    for _ in range(count):
        likeliest = told.logits[:, -1:].argmax(-1)
        told = model(input_ids=likeliest, past_key_values=told.past_key_values, use_cache=True)
    return time.perf_counter() - begun
