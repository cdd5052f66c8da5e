"""The second pass of a product whose inputs were split among programs: partial sums added, always in the same order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels.launch import Launch, written

TILE = 256


def reference(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension in float64, as ``dtype``."""
    return parts.double().sum(0).to(dtype)


@triton.jit
def kernel(parts, out, size, splits, TILE: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < size
    total = tl.zeros((TILE,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size + place, mask=inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def split_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (splits, tokens, out) float32 -> (tokens, out) in ``dtype``."""
    out = torch.empty(parts.shape[1:], dtype=written(dtype), device=parts.device)
    size = out.numel()
    kernel[(triton.cdiv(size, TILE),)](parts, out, size, len(parts), TILE=TILE, num_warps=4)
    return out.to(dtype)


def launches() -> list[Launch]:
    signature = {"parts": "*fp32", "out": "*bf16", "size": "i32", "splits": "i32"}
    return [Launch("bf16", kernel, signature, {"TILE": TILE}, 4, aligned=("parts", "out", "size"))]
