"""The dense weight from nm_mma's fragments: a group of four inputs is two numbers, moved to their places."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import nm_mma
from llmsparse.kernels.launch import Launch


def reference(tensors: Sequence[Tensor], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in)."""
    return nm_mma.unpacked(tensors, shape).contiguous().view(nm_mma.DTYPES[values])


@triton.jit
def kernel(fragments, metadata, out, steps, rows, groups, WARPS: tl.constexpr):
    """out[row, group], 64 bits: the lower number at bit 16 p, the upper one at bit 16 q, for the group's places p, q."""
    pair, block = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, WARPS * 256)  # a block's two steps that share metadata
    row_half, group_half, lane = place % 2, place // 2 % 2, place // 4 % 32
    warp, parity = place // 128 % WARPS, place // (128 * WARPS)
    tile = block.to(tl.int64) * (steps // 2) + pair
    holder = warp * 32 + lane // 4 * 4 + parity * 2 + group_half
    places = tl.load(metadata + tile * (WARPS * 32) + holder)
    nibble = places >> (row_half * 16 + lane % 4 * 4)
    both = tl.load(fragments + tile * (WARPS * 256) + place, eviction_policy="evict_first")
    low, high = (both & 0xFFFF).to(tl.int64), (both >> 16 & 0xFFFF).to(tl.int64)
    numbers = low << ((nibble & 3) * 16).to(tl.int64) | high << ((nibble >> 2 & 3) * 16).to(tl.int64)
    row = warp * 16 + lane // 4 + row_half * 8
    group = pair * 16 + parity * 8 + lane % 4 + group_half * 4
    first = block * (WARPS * 16)
    inside = (first + row < rows) & (group < groups)
    tl.store(out + first.to(tl.int64) * groups + row * groups + group, numbers, mask=inside)


def unpack(tensors: Sequence[Tensor], shape: tuple[int, int], values: str, out: Tensor) -> None:
    """Write the weight into ``out`` (out, in), contiguous, of the weight's dtype."""
    fragments, metadata = tensors
    blocks, steps = fragments.shape[:2]
    kernel[(steps // 2, blocks)](
        fragments, metadata, out.view(torch.int64), steps, shape[0], shape[1] // 4,
        WARPS=nm_mma.WARPS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> list[Launch]:
    signature = {"fragments": "*i32", "metadata": "*i32", "out": "*i64"}
    signature |= dict.fromkeys(("steps", "rows", "groups"), "i32")
    aligned = ("fragments", "metadata", "out", "rows", "groups")
    constants = {"WARPS": nm_mma.WARPS}
    return [Launch("16 bits", kernel, signature, constants, 4, nm_mma.ROWS * nm_mma.PAIR, aligned)]
