"""Whether a packed product or a dense one is faster on this machine: timed once, remembered, and told."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import dispatch, gpu, held, native
from llmsparse.atomic import write_whole
from llmsparse.device import processor
from llmsparse.gguf_checkpoint import cache_folder
from llmsparse.kernels.cpu import library

ROUNDS = 24
COPIES = 3  # dense weights made for a timing: less than a block's
LOG = logging.getLogger("llmsparse")


class Timing(NamedTuple):
    """Seconds of a product with one token: the smallest of several."""

    packed: float
    dense: float

    @property
    def dense_wins(self) -> bool:
        return self.dense < self.packed


def choose(modules: Iterable[Any], untimed: Any = None) -> None:
    """Let each packed layer multiply in the faster way here; a dense one keeps a dense copy of its weight.

    ``untimed`` stays packed: an output layer, of which a dense copy would be larger than a block.

    ``LLMSPARSE_PRODUCTS`` may say ``packed`` or ``dense`` for all; else each kind of layer is timed with one token,
    once on a machine, and the log says which way won.

    Raises:
        UserError: the variable says something else.
    """
    way = dispatch.asked(dispatch.PRODUCTS, dispatch.WAYS)
    kinds: dict[str, list[Any]] = {}
    on_gpu = []
    for module in modules:
        where = getattr(module, module.parts[0]).device
        if gpu.here(where):
            module.place = where
            on_gpu.append(module)
            continue
        held.stay_dense(module, way == "dense")
        x = torch.empty(1, module.packed.shape[1], dtype=module.dtype, device=where)
        if way == "measured" and module is not untimed and native.why_not(x) is None:
            kinds.setdefault(_signature(module), []).append(module)
    dispatch.lay_out(on_gpu)
    for key, members in kinds.items():
        wins = _timing(key, members).dense_wins
        for module in members:
            held.stay_dense(module, wins)


def _signature(module: Any) -> str:
    """What a time depends on: layout, values, shape, share of zeros in twentieths, dtype, threads, machine."""
    packed = module.packed
    rows, columns = packed.shape
    zeros = 1 - packed.nnz / (rows * columns) if packed.nnz >= 0 else 0.0
    facts = (
        packed.layout, packed.values, f"{rows}x{columns}", f"{round(zeros * 20) * 5}% zeros",
        str(module.dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads", str(library.used()),
        f"torch {torch.__version__}", processor(),
    )  # fmt: skip
    return ", ".join(facts)


def _timing(key: str, members: list[Any]) -> Timing:
    """Remembered in the user's cache, or taken now; and told."""
    file = _file()
    known = _read(file)
    if key not in known:
        known = {**_read(file), key: list(_measure(members[:COPIES]))}
        with suppress(OSError):  # a home that cannot be written to: timed again the next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known, indent=1))
    timing = Timing(*known[key])
    won, say = ("dense", LOG.warning) if timing.dense_wins else ("packed", LOG.info)
    say("%s: packed %.1f µs, dense %.1f µs, %s is used", key, 1e6 * timing.packed, 1e6 * timing.dense, won)
    return timing


def _measure(members: list[Any]) -> Timing:
    """Several weights of each form in turn, so that they come from memory and not from cache."""
    x = torch.randn(1, members[0].packed.shape[1]).to(members[0].dtype)
    packed = [held.stored(module).product for module in members]
    dense = [partial(_dense, held.stored(module).dense(module.dtype)) for module in members]
    return time_forms(packed, dense, x)


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def time_forms(
    packed: Sequence[Callable[[Tensor], Tensor]], dense: Sequence[Callable[[Tensor], Tensor]], x: Tensor
) -> Timing:
    """The smallest time of each form, all in turn."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for form, products in enumerate((packed, dense)):
            for product in products:
                begun = time.perf_counter()
                product(x)
                best[form] = min(best[form], time.perf_counter() - begun)
    return Timing(*best)


def remembered() -> dict[str, Timing]:
    """Every timing of this machine that is remembered."""
    return {key: Timing(*times) for key, times in _read(_file()).items()}


def _file() -> Path:
    return cache_folder() / "products.json"


def _read(file: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if _is_timing(v)} if isinstance(found, dict) else {}


def _is_timing(value: Any) -> bool:
    """Two positive numbers."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, float) and 0 < v < 3600 for v in value)
    )
