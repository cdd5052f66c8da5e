"""The dense weight of what nm_gemv packs, at the memory's speed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import widen
from llmsparse.kernels.launch import Launch
from llmsparse.kernels.nm_gemv import bit, constants, dense, lanes_of

ROWS, WARPS = 32, 4


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    return out.copy_(dense(tensors, shape, values))


@triton.jit
def nm_gemv_unpack(
    words, codes, scales, weight, out, columns, groups, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """weight[row, 4 g + place] = value; RAW moves 16 bits as they are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    turn = tl.program_id(1)
    lanes = tl.arange(0, LANES)
    share: tl.constexpr = 4 if KIND == "int4" else 2 if KIND == "int8" else 1
    word = words + rows.to(tl.int64)[:, None] * (groups // share) + lanes[None, :]
    places = tl.load(codes + rows.to(tl.int64)[:, None] * (groups // 8) + turn * LANES + lanes[None, :])
    for part in tl.static_range(8):
        group = (turn * 8 + part) * LANES
        if part % share == 0:
            stored = tl.load(word + group // share, eviction_policy="evict_first")
        if RAW:
            low, high = stored.to(tl.int16), (stored >> 16).to(tl.int16)
        elif share == 1:
            low, high = widen.pair(stored, KIND)
        else:
            low, high = widen.codes(stored, part % share, 16 // share)
        if share > 1:
            place = scales + rows.to(tl.int64)[:, None] * scale_columns
            if KIND == "int4":
                place += ((group + lanes) // (GROUP // 4))[None, :]
            scale = tl.load(place).to(tl.float32)
            low, high = widen.weight(low, scale), widen.weight(high, scale)
        fours = spread(low, high, places, 4 * part, weight.dtype.element_ty)
        at = group * 4 + tl.arange(0, 4 * LANES)
        spot = weight + rows.to(tl.int64)[:, None] * columns + at[None, :]
        tl.store(
            spot, tl.reshape(fours, (ROWS, 4 * LANES)), mask=(rows < out)[:, None] & (at < columns)[None, :]
        )


@triton.jit
def spread(low, high, places, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """(ROWS, LANES, 2, 2): the four weights of each group."""
    low, high = low.to(DTYPE), high.to(DTYPE)
    zero = tl.zeros_like(low)
    low1, low2 = bit(places, FIRST), bit(places, FIRST + 1)
    high2, high3 = bit(places, FIRST + 2), bit(places, FIRST + 3)
    w0 = tl.where(low1 | low2, zero, low)
    w1 = tl.where(low1, low, tl.where(high2 | high3, zero, high))
    w2 = tl.where(low2, low, tl.where(high2, high, zero))
    w3 = tl.where(high3, high, zero)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    """Fills ``out`` (out, in), contiguous, with the weight."""
    words, codes, scales = tensors
    groups = codes.shape[1] * 8
    lanes = lanes_of(groups)
    raw = out.dtype == widen.FLOATS.get(values)
    nm_gemv_unpack[(-(-shape[0] // ROWS), groups // (8 * lanes))](
        words, codes, scales, out.view(torch.int16) if raw else out, *shape, groups, scales.shape[1],
        **constants(values, lanes), ROWS=ROWS, RAW=raw, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launches() -> list[Launch]:
    kinds = [("bf16", "*i16"), ("int8", "*bf16"), ("int4:128", "*bf16"), ("fp16", "*bf16")]
    return [launch(*kind) for kind in kinds]


def launch(values: str, weight: str) -> Launch:
    pointers = {"words": "*i32", "codes": "*i32", "scales": "*bf16", "weight": weight}
    return Launch(
        name=f"{values} to {weight[1:]}",
        kernel=nm_gemv_unpack,
        signature=pointers | dict.fromkeys(["out", "columns", "groups", "scale_columns"], "i32"),
        constants=constants(values, 16) | {"ROWS": ROWS, "RAW": weight == "*i16"},
        warps=WARPS,
        weights=ROWS * 16 * 32,
        aligned=(*pointers, "groups", "columns"),
    )
