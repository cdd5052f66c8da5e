"""How long the products of a model's linear layers take on this CPU: packed, dense in C, and torch's."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.checkpoint import Checkpoint
from llmsparse.device import processor
from llmsparse.errors import UserError
from llmsparse.formats import bitmask
from llmsparse.grid import Grid
from llmsparse.kernels.cpu import library
from llmsparse.packed import Packed
from llmsparse.pattern import parse_mask
from llmsparse.progress import Quiet
from llmsparse.report import versions
from llmsparse.skeleton import Skeleton
from llmsparse.values import Values

Product = Callable[[Tensor], Tensor]  # x (tokens, in) bf16 -> (tokens, out)
TORCH = ("torch fp32", "torch bf16")


class Layer(NamedTuple):
    """One weight in every form that is timed, each in memory of its own."""

    shape: tuple[int, int]
    zeros: float
    inputs: Tensor  # (tokens, in) bf16
    products: dict[str, Product]


def bench(
    model: str | Path, *, pattern: str | None = None, values: str = "bf16,int8,int4:32", tokens: int = 1,
    threads: str = "1", calls: int = 96, revision: str | None = None, token: str | None = None,
    cache_dir: str | None = None, progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Time every linear layer's product in every form, layer by layer, in turn, at least ``calls`` times a shape.

    A layer comes round only after all others, so its weights come from memory as they do in a decoder. The zeros are
    the model's own; with ``pattern`` each weight is pruned to it by magnitude first. ``threads`` may list several
    counts. Seconds; a row for each shape, form and thread count, with the minimum, median and the middle 80 %.

    Raises:
        UserError: the model has no zeros and no pattern is given, is packed, or the native kernels are not built.
    """
    progress = progress or Quiet()
    kernels = used()
    kinds = [Values.parse(text.strip()) for text in values.split(",")]
    if slow := [kind.name for kind in kinds if kind.name in ("fp16", "fp32")]:
        raise UserError(f"--values {slow[0]} has no product of its own; use bf16, int8 or int4:32")
    counts = [_count("--threads", text) for text in threads.split(",")]
    _count("--calls", str(calls))
    if _count("--tokens", str(tokens)) > library.MAX_TOKENS:
        raise UserError(f"--tokens {tokens}: the kernels take 1 to {library.MAX_TOKENS}")
    checkpoint = Checkpoint.open(model, revision, token, cache_dir)
    if checkpoint.is_packed:
        raise UserError(f"{model} is packed; give the folder that it was exported from")
    layers = _layers(checkpoint, pattern, kinds, tokens, progress)
    before = torch.get_num_threads()
    try:
        rows = [row for count in counts for row in timed(layers, count, calls, progress)]
    finally:
        torch.set_num_threads(before)
    return {
        "model": str(model),
        "pattern": pattern,
        "tokens": tokens,
        "zeros": sum(layer.zeros for layer in layers) / len(layers),
        "processor": processor(),
        "kernels": kernels,
        "versions": versions(),
        "rows": rows,
        "totals": totals(rows),
    }


def used() -> str:
    """The native kernels that run here. Raises UserError where there are none."""
    kernels = library.used()
    if kernels is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in library.available().items())
        raise UserError(f"no native kernel runs here, there is nothing to time ({reasons})")
    return kernels


def _count(option: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{option} {text!r} is no number of at least 1")
    return int(text)


def _layers(
    checkpoint: Checkpoint, pattern: str | None, kinds: list[Values], tokens: int, progress: Any
) -> list[Layer]:
    weights = [w for w in Skeleton(checkpoint).weights if w.block is not None and w.expert is None]
    if not weights:
        raise UserError(
            f"{checkpoint.folder} has no linear layers outside its experts; there is nothing to time"
        )
    chosen = parse_mask(pattern) if pattern else None
    random = torch.Generator().manual_seed(0)
    layers = []
    progress.start("reading weights", len(weights))
    for weight in weights:
        dense = weight.stored(checkpoint.tensor(weight.source)).to(torch.bfloat16).contiguous()
        if chosen is not None:
            dense = dense.masked_fill(~chosen.select(dense.float().abs()), 0.0)
        zeros = 1 - int(dense.count_nonzero()) / dense.numel()
        if zeros < 0.05:
            raise UserError(
                f"{weight.name} has {zeros:.1%} zeros; give a pruned model, or --pattern 50% to time it as if pruned"
            )
        inputs = torch.randn(tokens, weight.in_features, generator=random).to(torch.bfloat16)
        layers.append(Layer((weight.out_features, weight.in_features), zeros, inputs, products(dense, kinds)))
        checkpoint.close()
        progress.advance("reading weights")
    return layers


def products(weight: Tensor, kinds: list[Values]) -> dict[str, Product]:
    """The forms of ``weight`` (out, in), bf16: torch's two, and dense and packed in C for each kind of values."""
    single, half = weight.float(), weight.clone()
    products: dict[str, Product] = {
        "torch fp32": lambda x: torch.nn.functional.linear(x.float(), single),
        "torch bf16": lambda x: torch.nn.functional.linear(x, half),
    }
    for kind in kinds:
        numbers, scales = _numbers(weight, kind)
        for name, matrix in (
            ("dense C", _dense(numbers, kind, scales)),
            ("packed", _packed(numbers, kind, scales)),
        ):
            products[f"{name} {kind.name}"] = _multiply(matrix)
    return products


def packed(weight: Tensor, kind: Values) -> Product:
    """The packed form of ``weight`` (out, in), bf16, alone."""
    numbers, scales = _numbers(weight, kind)
    return _multiply(_packed(numbers, kind, scales))


def _multiply(matrix: library.Matrix) -> Product:
    return lambda x: library.linear(matrix, x)


def _numbers(weight: Tensor, kind: Values) -> tuple[Tensor, Tensor | None]:
    if kind.float_dtype is not None:
        return kind.numbers(weight), None
    codes, scales = Grid.parse(kind.name).unfitted(weight.float())
    return codes, scales.to(torch.bfloat16)


def _dense(numbers: Tensor, kind: Values, scales: Tensor | None) -> library.Matrix:
    rows, columns = numbers.shape
    stored = numbers.clone().reshape(-1)
    if kind.bits == 4:
        stored = bits.pack_nibbles(stored, torch.full((rows,), columns))
    return library.Matrix(kind.name, (rows, columns), stored, None, scales)


def _packed(numbers: Tensor, kind: Values, scales: Tensor | None) -> library.Matrix:
    shape = (numbers.shape[0], numbers.shape[1])
    fields = next(iter(bitmask.measure(numbers, kind)))
    tensors = bitmask.pack(Packed("bitmask", kind.name, shape, **fields), numbers)
    return library.Matrix(kind.name, shape, tensors["values"], tensors["mask"], scales)


def timed(layers: list[Layer], threads: int, calls: int, progress: Any) -> Iterator[dict[str, Any]]:
    """Rounds over all layers, every form of a layer in turn; a first round is not counted."""
    torch.set_num_threads(threads)
    shapes = [layer.shape for layer in layers]
    rounds = -(-calls // min(map(shapes.count, shapes)))
    seconds: dict[tuple[tuple[int, int], str], list[float]] = {}
    progress.start(f"timing, {threads} threads", rounds + 1)
    for number in range(rounds + 1):
        for layer in layers:
            for name, product in layer.products.items():
                begun = time.perf_counter()
                product(layer.inputs)
                if number:
                    seconds.setdefault((layer.shape, name), []).append(time.perf_counter() - begun)
        progress.advance(f"timing, {threads} threads")
    for (shape, name), found in seconds.items():
        times = torch.tensor(found, dtype=torch.float64)
        middle = [float(times.quantile(q)) for q in (0.1, 0.5, 0.9)]
        yield {
            "shape": list(shape),
            "layers": shapes.count(shape),
            "threads": threads,
            "form": name,
            "calls": len(found),
            "min": float(times.min()),
            "median": middle[1],
            "spread": [middle[0], middle[2]],
        }


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each form's sum over all layers, of minima and of medians, by thread count."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        total = found.setdefault(
            (row["threads"], row["form"]),
            {"threads": row["threads"], "form": row["form"], "min": 0.0, "median": 0.0},
        )
        for key in ("min", "median"):
            total[key] += row["layers"] * row[key]
    return list(found.values())
