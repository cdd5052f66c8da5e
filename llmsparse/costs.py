"""What a weight costs at each sparsity: parameters, packed bytes, or the time of its packed product here."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.formats import nm
from llmsparse.packed import Packed
from llmsparse.pattern import NM, Unstructured
from llmsparse.skeleton import Weight
from llmsparse.values import Values

DENSITIES = (0.05, 0.25, 0.5, 0.75, 0.95)  # that are timed; between them the time is interpolated
ROUNDS = 24  # products of each density that are timed, the fastest counts
Times = dict[str, list[float]]  # "out x in values" -> seconds at DENSITIES


@dataclass(frozen=True)
class Costs:
    """The costs of one ``budget``; ``values``: what each weight's numbers will be stored as."""

    budget: str
    values: dict[str, Values]  # weight name -> kind
    times: Times = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether costs are whole numbers whose every step is the same, so that totals can be exact."""
        return self.budget == "parameters"

    def of(self, weight: Weight, pattern: Unstructured | NM, kept: np.ndarray) -> np.ndarray:
        """What ``weight`` costs with each number of ``kept`` weights, (levels,); ``pattern`` says of which kind."""
        if self.budget == "parameters":
            return kept
        if self.budget == "bytes":
            return packed_bytes(
                (weight.out_features, weight.in_features), self.values[weight.name], pattern, kept
            )
        seconds = self.times[_key(weight, self.values[weight.name])]
        return np.interp(kept / (weight.out_features * weight.in_features), DENSITIES, seconds)


def packed_bytes(
    shape: tuple[int, int], values: Values, pattern: Unstructured | NM, kept: np.ndarray
) -> np.ndarray:
    """Bytes of the smallest layout of ``docs/format.md`` for each number of ``kept`` weights, (levels,).

    Rows of an odd number of 4-bit codes end in half a byte; where rows may differ, as many as can are taken to do so.
    """
    out, columns = shape
    bitmask = Packed("bitmask", values.name, shape, nnz=0, size=0).bytes  # without values
    even = isinstance(pattern, NM) or pattern.scope == "row"  # every row keeps the same
    least = bitmask + values.dtype.itemsize * _stored(kept, out, values, even)
    if isinstance(pattern, NM):
        for i, count in enumerate(kept):
            fields = nm.fields(shape, int(count) * pattern.m // (out * columns), pattern.m, values)
            if fields is not None:
                least[i] = min(least[i], Packed("nm", values.name, shape, **fields).bytes)
    plain = (
        Packed("dense", values.name, shape).bytes
        if values.float_dtype is None
        else out * columns * values.bits // 8
    )
    return np.minimum(least, plain)


def _stored(kept: np.ndarray, rows: int, values: Values, even: bool) -> np.ndarray:
    """Elements of the tensor of values."""
    if values.bits != 4:
        return kept
    return (kept // rows + 1) // 2 * rows if even else (kept + np.minimum(kept, rows)) // 2


def measured(weights: Iterable[Weight], values: dict[str, Values]) -> Times:
    """Time the packed product of one token for each shape and kind, at ``DENSITIES``, with this process's threads.

    Denser is never taken to be faster.

    Raises:
        UserError: no native kernel runs here.
    """
    from llmsparse.bench import packed, used

    used()
    random = torch.Generator().manual_seed(0)
    times: Times = {}
    for weight in weights:
        key = _key(weight, values[weight.name])
        if key not in times:
            dense = torch.randn(weight.out_features, weight.in_features, generator=random)
            rank = torch.rand(dense.shape, generator=random)
            x = torch.randn(1, weight.in_features, generator=random).to(torch.bfloat16)
            forms = [
                packed((dense * (rank < density)).to(torch.bfloat16), values[weight.name])
                for density in DENSITIES
            ]
            times[key] = list(np.maximum.accumulate(_fastest(forms, x)))
    return {key: [float(second) for second in seconds] for key, seconds in times.items()}


def _fastest(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
    """The least seconds of each product, all in turn."""
    best = [float("inf")] * len(products)
    for _ in range(ROUNDS):
        for i, product in enumerate(products):
            begun = time.perf_counter()
            product(x)
            best[i] = min(best[i], time.perf_counter() - begun)
    return best


def _key(weight: Weight, values: Values) -> str:
    return f"{weight.out_features}x{weight.in_features} {values.name}"


def kinds_of(
    weights: Iterable[Weight], budget: str, dtypes: dict[str, torch.dtype], asked: str | None
) -> dict[str, Values]:
    """What the numbers of each weight will be stored as: ``asked``, else the checkpoint's own; timed as bf16."""
    found = {}
    for weight in weights:
        own = Values.of(torch.bfloat16 if budget == "time" else dtypes[weight.name])
        kind = Values.parse(asked) if asked else own
        if kind is None and budget == "bytes":
            raise UserError(
                f"--budget bytes: {weight.name} is stored as {dtypes[weight.name]}, which no layout packs"
            )
        if kind is not None:
            found[weight.name] = kind
    return found
