"""The dense weight from nm_mma's fragments: a group of four inputs is two numbers, moved to their places."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import nm_mma
from llmsparse.kernels.launch import Launch
from llmsparse.kernels.widen import FLOATS


def reference(tensors: Sequence[Tensor], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in)."""
    return nm_mma.dense(tensors, shape, values)


@triton.jit
def kernel(fragments, metadata, scales, out, pairs, rows, groups, WARPS: tl.constexpr, CODES: tl.constexpr):
    """out[row, group]: two numbers at the group's places; floats as 64 bits, codes (four to a word) times their scale."""
    pair, block = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, WARPS * 256)  # groups of a block's two steps, which share metadata
    word, lane = place % 4, place // 4 % 32
    if CODES:  # both steps of a lane are one after the other
        lane, parity, warp = place // 8 % 32, place // 4 % 2, place // 256
    else:
        warp, parity = place // 128 % WARPS, place // (128 * WARPS)
    row_half, group_half = word % 2, word // 2
    tile = block.to(tl.int64) * pairs + pair
    places = tl.load(metadata + tile * (WARPS * 32) + warp * 32 + lane // 4 * 4 + parity * 2 + group_half)
    nibble = places >> (row_half * 16 + lane % 4 * 4)
    low_place, high_place = nibble & 3, nibble >> 2 & 3
    row = block * (WARPS * 16) + warp * 16 + lane // 4 + row_half * 8
    group = pair * 16 + parity * 8 + lane % 4 + group_half * 4
    inside = (row < rows) & (group < groups)
    to = row.to(tl.int64) * groups + group
    both = tl.load(fragments + tile * (WARPS * 256) + place, eviction_policy="evict_first")
    if CODES:
        scale = tl.load(scales + row)
        low, high = _weight(both.to(tl.int32), scale), _weight(both.to(tl.int32) >> 8, scale)
        for each in tl.static_range(4):
            weight = tl.where(low_place == each, low, tl.where(high_place == each, high, 0.0))
            tl.store(out + to * 4 + each, weight.to(out.dtype.element_ty), mask=inside)
    else:
        low, high = (both & 0xFFFF).to(tl.int64), (both >> 16 & 0xFFFF).to(tl.int64)
        bits = low << (low_place * 16).to(tl.int64) | high << (high_place * 16).to(tl.int64)
        tl.store(out + to, bits, mask=inside)


@triton.jit
def _weight(code, scale):
    return ((code & 255) - 128).to(tl.float32) * scale + 0.0  # no zero is negative


def unpack(tensors: Sequence[Tensor], shape: tuple[int, int], values: str, out: Tensor) -> None:
    """Write the weight into ``out`` (out, in), contiguous, of the weight's dtype (any for codes)."""
    fragments, metadata = tensors[:2]
    codes = values not in FLOATS
    blocks, pairs = metadata.shape[:2]
    kernel[(pairs, blocks)](
        fragments.view(torch.int16) if codes else fragments, metadata, tensors[-1],
        out if codes else out.view(torch.int64), pairs, shape[0], shape[1] // 4,
        WARPS=nm_mma.WARPS, CODES=codes, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> list[Launch]:
    signature = {"metadata": "*i32", "scales": "*fp32", **dict.fromkeys(("pairs", "rows", "groups"), "i32")}
    aligned = ("fragments", "metadata", "scales", "out", "rows", "groups")
    weights = nm_mma.ROWS * nm_mma.PAIR
    kinds = {"16 bits": ("*i32", "*i64"), "int8": ("*i16", "*bf16")}
    return [
        Launch(
            name, kernel, {**signature, "fragments": given, "out": out},
            {"WARPS": nm_mma.WARPS, "CODES": name == "int8"}, 4, weights, aligned,
        )
        for name, (given, out) in kinds.items()
    ]  # fmt: skip
