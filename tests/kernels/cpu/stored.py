"""Random weights in the storage of docs/format.md, written plainly, and the dense float64 weights they stand for."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.kernels.cpu.library import Matrix


class Stored(NamedTuple):
    """The tensors of a packed weight and the weight itself."""

    kind: str
    values: Tensor
    mask: Tensor | None
    scales: Tensor | None
    dense: Tensor  # float64 (out, in)

    def matrix(self) -> Matrix:
        return Matrix(self.kind, tuple(self.dense.shape), self.values, self.mask, self.scales)


def random_mask(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Half of the weights; row 1 of 3 empty, row 2 of 3 full, so that both occur wherever there are rows."""
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask[1::3] = False
    mask[2::3] = True
    return mask


def pack_bits(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.int64)
    padded[:, :columns] = mask
    return (padded.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    padded = torch.zeros(codes.numel() + codes.numel() % 2, dtype=torch.int64)
    padded[: codes.numel()] = codes + 8
    return (padded[::2] | padded[1::2] << 4).to(torch.uint8)


def store(kind: str, rows: int, columns: int, masked: bool, seed: int = 0) -> Stored:
    """A random matrix of a kind, with a mask or dense."""
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(rows, columns, generator) if masked else torch.ones(rows, columns, dtype=torch.bool)
    bits = pack_bits(mask) if masked else None
    name, _, group = kind.partition(":")
    if name in ("bf16", "fp16", "fp32"):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        weight[:, ::5] = -0.0
        values = weight.view(torch.int32 if name == "fp32" else torch.int16)[mask]
        return Stored(kind, values, bits, None, torch.where(mask, weight.double(), 0.0))
    width = int(group) if group else columns
    low, high = (-8, 8) if name == "int4" else (-127, 128)
    codes = torch.randint(low, high, (rows, columns), generator=generator)
    scales = (torch.rand(rows, -(-columns // width), generator=generator) - 0.5).bfloat16()
    spread = scales.double().repeat_interleave(width, 1)[:, :columns]
    dense = torch.where(mask & (codes != 0), codes * spread, 0.0)
    if name == "int4":
        values = torch.cat([pack_nibbles(codes[row][mask[row]]) for row in range(rows)])
    else:
        values = codes[mask].to(torch.int8)
    return Stored(kind, values, bits, scales, dense)
