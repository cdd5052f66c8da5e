"""The dense weight of what n16_gemv packs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import widen
from llmsparse.kernels.launch import Launch
from llmsparse.kernels.n16_gemv import constants, dense, lanes_of

ROWS, GROUPS, STEPS, WARPS = 4, 16, 8, 4


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    return out.copy_(dense(tensors, shape, values))


@triton.jit
def n16_gemv_unpack(
    words, places, scales, weight, out, columns, groups, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """The int32 words of weight[row, 16 group + place] = value, each of them the or of those that fall into it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    share: tl.constexpr = 4 if KIND == "int4" else 2 if KIND == "int8" else 1  # pairs in a word
    both: tl.constexpr = 1 if tl.float32 == DTYPE else 2  # weights in a word
    slots = tl.arange(0, 16 // both)[None, None, :]
    scale = scales + row * scale_columns
    place = places + row * (groups * HALF)
    word = words + row * (groups * HALF // share)
    spot = weight + row[:, :, None] * (columns // both) + slots
    begin = tl.program_id(1) * (STEPS * GROUPS)
    for step in range(begin, min(begin + STEPS * GROUPS, columns // 16), GROUPS):
        group = step + tl.arange(0, GROUPS)[None, :]
        mask = (group < groups) & (row < out)
        dense = tl.zeros((ROWS, GROUPS, 16 // both), dtype=tl.int32)
        for number in tl.static_range(HALF):
            pair = group * HALF + number
            part, lane = pair // LANES, pair % LANES
            at = tl.load(place + (part // 4 * 4 * LANES + lane * 4 + part % 4), mask=mask, other=0).to(
                tl.int32
            )
            stored = tl.load(word + (part // share * LANES + lane), mask=mask, other=0)
            if RAW:
                low, high = stored & 0xFFFF, (stored >> 16) & 0xFFFF
            else:
                if share == 1:
                    low, high = widen.pair(stored, KIND)
                else:
                    low, high = widen.codes(stored >> (part % share * (32 // share)), 0, 16 // share)
                    by_low = tl.load(scale).to(tl.float32)
                    by_high = by_low
                if KIND == "int4":
                    by_low = tl.load(scale + (group * 16 + (at & 15)) // GROUP).to(tl.float32)
                    by_high = tl.load(scale + (group * 16 + (at >> 4)) // GROUP).to(tl.float32)
                if share > 1:
                    low, high = widen.weight(low, by_low), widen.weight(high, by_high)
                low, high = bits(low, DTYPE), bits(high, DTYPE)
            dense = placed(dense, low, at & 15, slots, both)
            dense = placed(dense, high, at >> 4, slots, both)
        mask = (group * 16 < columns) & (row < out)
        tl.store(spot + (group * (16 // both))[:, :, None], dense, mask=mask[:, :, None])


@triton.jit
def bits(value, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return value.to(tl.int32, bitcast=True)
    else:
        return value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def placed(dense, value, at, slots, BOTH: tl.constexpr):
    """``dense`` (rows, groups, words) with ``value`` (rows, groups) at ``at``; filling zeros change nothing."""
    if BOTH == 2:
        value = value << (at % 2 * 16)
    here = (at // BOTH)[:, :, None] == slots
    return tl.where(here, dense | value[:, :, None], dense)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    """Fills ``out`` (out, in), contiguous, with the weight."""
    words, places, scales = tensors
    _, groups, half = places.shape
    raw = out.dtype == widen.FLOATS.get(values)
    n16_gemv_unpack[(-(-shape[0] // ROWS), -(-shape[1] // (16 * GROUPS * STEPS)))](
        words, places, scales, out.view(torch.int32), *shape, groups, scales.shape[1],
        **constants(values, half, lanes_of(groups * half)), ROWS=ROWS, GROUPS=GROUPS, STEPS=STEPS,
        DTYPE=TYPES[out.dtype], RAW=raw, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launches() -> list[Launch]:
    kinds = [("bf16", tl.bfloat16), ("int8", tl.bfloat16), ("int4:128", tl.bfloat16), ("fp16", tl.bfloat16)]
    return [launch(*kind) for kind in [*kinds, ("bf16", tl.float32)]]


def launch(values: str, dtype: tl.dtype) -> Launch:
    pointers = {"words": "*i32", "places": "*u8", "scales": "*bf16", "weight": "*i32"}
    raw = (values, dtype) == ("bf16", tl.bfloat16)
    return Launch(
        name=f"{values} 8:16 to {dtype}",
        kernel=n16_gemv_unpack,
        signature=pointers | dict.fromkeys(["out", "columns", "groups", "scale_columns"], "i32"),
        constants=constants(values, 4, 16)
        | {"ROWS": ROWS, "GROUPS": GROUPS, "STEPS": STEPS, "DTYPE": dtype, "RAW": raw},
        warps=WARPS,
        weights=ROWS * GROUPS * 16,
        aligned=(*pointers, "groups", "columns"),
    )
