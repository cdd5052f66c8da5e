"""Weights for the tests of kernels: numbers and scales as the kernels take them, and the dense weight that they are."""

from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Weight(NamedTuple):
    numbers: Tensor  # (out, in) int16 or int8
    values: str
    scales: Tensor | None
    dense: Tensor  # (out, in) float64

    @property
    def shape(self) -> tuple[int, int]:
        out, columns = self.numbers.shape
        return out, columns


def kept_of_groups(out: int, columns: int, n: int, m: int, fill: float, generator: torch.Generator) -> Tensor:
    """At most n of every m inputs, each of those with probability ``fill``."""
    order = torch.rand(out, columns // m, m, generator=generator).argsort(2).argsort(2)
    return ((order < n) & (torch.rand(order.shape, generator=generator) < fill)).view(out, columns)


def make(kept: Tensor, values: str, generator: torch.Generator) -> Weight:
    """Random values where ``kept``; some floats are -0.0, which is stored, and some scales are negative."""
    out, columns = kept.shape
    if values in DTYPES:
        floats = torch.randn(out, columns, generator=generator)
        floats[torch.rand(out, columns, generator=generator) < 0.05] = -0.0
        numbers = torch.where(kept, floats.to(DTYPES[values]).view(torch.int16), 0)
        return Weight(numbers.to(DEVICE), values, None, numbers.view(DTYPES[values]).double().to(DEVICE))
    most = 127 if values == "int8" else 7
    codes = torch.randint(1, most + 1, (out, columns), generator=generator)
    codes = torch.where(torch.rand(out, columns, generator=generator) < 0.5, codes, -codes)
    codes[codes == -7] = -8 if values != "int8" else -7
    numbers = torch.where(kept, codes, 0).to(torch.int8)
    group = int(values.partition(":")[2] or columns)
    scales = torch.randn(out, -(-columns // group), generator=generator).bfloat16()
    dense = numbers.double() * scales.double().repeat_interleave(group, 1)[:, :columns]
    return Weight(numbers.to(DEVICE), values, scales.to(DEVICE), dense.to(DEVICE))
