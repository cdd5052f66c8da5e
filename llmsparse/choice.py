"""Whether a packed product or a dense one is faster on this machine: timed once, remembered, and told."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.atomic import write_whole
from llmsparse.device import processor
from llmsparse.gguf_checkpoint import cache_folder
from llmsparse.kernels.cpu import library

ROUNDS = 24
LOG = logging.getLogger("llmsparse")


class Timing(NamedTuple):
    """Seconds of a product with one token: the smallest of several."""

    packed: float
    dense: float

    @property
    def packed_wins(self) -> bool:
        return self.packed <= self.dense


def signature(stored: Any, dtype: torch.dtype) -> str:
    """What a time depends on: layout, values, shape, share of zeros in twentieths, dtype, threads, machine."""
    packed = stored.packed
    rows, columns = packed.shape
    zeros = 1 - packed.nnz / (rows * columns) if packed.nnz >= 0 else 0.0
    isa = next((name for name, why in library.available().items() if why is None), "none")
    facts = (
        packed.layout, packed.values, f"{rows}x{columns}", f"{round(zeros * 20) * 5}% zeros",
        str(dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads", isa, f"torch {torch.__version__}",
        processor(),
    )  # fmt: skip
    return ", ".join(facts)


def decide(
    key: str, packed: Sequence[Callable[[Tensor], Tensor]], dense: Sequence[Tensor], x: Tensor
) -> Timing:
    """The timing of ``key``, remembered in the user's cache or taken now: ``packed`` products against ``dense`` weights.

    Several of each, where there are some, so that weights come from memory and not from cache.
    """
    file = cache_folder() / "products.json"
    known = _read(file)
    if key not in known:
        timing = _time(packed, dense, x)
        known = {**_read(file), key: list(timing)}
        with suppress(OSError):  # a home that cannot be written to: timed again the next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known, indent=1))
    timing = Timing(*known[key])
    won, say = ("packed", LOG.info) if timing.packed_wins else ("dense", LOG.warning)
    say("%s: packed %.1f µs, dense %.1f µs, %s is used", key, 1e6 * timing.packed, 1e6 * timing.dense, won)
    return timing


def _time(packed: Sequence[Callable[[Tensor], Tensor]], dense: Sequence[Tensor], x: Tensor) -> Timing:
    best = [float("inf"), float("inf")]
    forms = [packed, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense]]
    for _ in range(max(ROUNDS // len(packed), 3)):
        for index, products in enumerate(forms):
            for product in products:
                begun = time.perf_counter()
                product(x)
                best[index] = min(best[index], time.perf_counter() - begun)
    return Timing(*best)


def _read(file: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return (
        {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 2}
        if isinstance(found, dict)
        else {}
    )
