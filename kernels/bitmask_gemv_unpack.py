"""The dense weight of what bitmask_gemv packs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import widen
from llmsparse.kernels.bitmask_gemv import constants, count, dense, four_codes
from llmsparse.kernels.launch import Launch

ROWS, LANES, WARPS = 16, 64, 4


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    return out.copy_(dense(tensors, shape, values))


@triton.jit
def bitmask_gemv_unpack(
    masks, values, starts, bases, scales, weight, out, columns, words, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """weight[row, column] = the next value where the bit is set; RAW moves 16 bits as they are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    shift = (lanes % 8 * 4)[None, :]
    word = tl.load(masks + row * words + (lanes // 8)[None, :])
    first = tl.load(starts + row * words + (lanes // 8)[None, :]).to(tl.int32) & 0xFFFF
    first += count(word & ((1 << shift) - 1))
    bits = word >> shift
    value = values + tl.load(bases + rows)[:, None]
    if KIND == "bf16" or KIND == "fp16":
        at = value + first
        v0, v1, v2, v3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        v0, v1, v2, v3 = four_codes(value, first, 8 if KIND == "int8" else 4)
    place = scales
    if KIND == "int8":
        place += row
    if KIND == "int4":
        place += row * scale_columns + (lanes // (GROUP // 4))[None, :]
    scale = tl.load(place).to(tl.float32)
    dtype: tl.constexpr = weight.dtype.element_ty
    w0, w1 = number(v0, scale, KIND, RAW, dtype), number(v1, scale, KIND, RAW, dtype)
    w2, w3 = number(v2, scale, KIND, RAW, dtype), number(v3, scale, KIND, RAW, dtype)
    b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    zero = tl.zeros_like(w0)
    first_one = tl.where(b0, w0, zero)
    w0, w1, w2 = tl.where(b0, w1, w0), tl.where(b0, w2, w1), tl.where(b0, w3, w2)
    second = tl.where(b1, w0, zero)
    w0, w1 = tl.where(b1, w1, w0), tl.where(b1, w2, w1)
    third = tl.where(b2, w0, zero)
    fourth = tl.where(b3, tl.where(b2, w1, w0), zero)
    fours = tl.join(tl.join(first_one, third), tl.join(second, fourth))
    to = tl.program_id(1) * (4 * LANES) + tl.arange(0, 4 * LANES)
    mask = (rows < out)[:, None] & (to < columns)[None, :]
    tl.store(weight + row * columns + to[None, :], tl.reshape(fours, (ROWS, 4 * LANES)), mask=mask)


@triton.jit
def number(stored, scale, KIND: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr):
    if RAW:
        return stored
    elif KIND == "int8" or KIND == "int4":
        return (widen.single(stored, KIND) * scale).to(DTYPE)
    else:
        return widen.single(stored, KIND).to(DTYPE)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, out: Tensor) -> Tensor:
    """Fills ``out`` (out, in), contiguous, with the weight."""
    masks, stored, starts, bases, scales = tensors
    words = masks.shape[1]
    raw = out.dtype == widen.FLOATS.get(values)
    bitmask_gemv_unpack[(-(-shape[0] // ROWS), words * 8 // LANES)](
        masks, stored, starts, bases, scales, out.view(torch.int16) if raw else out, *shape, words, scales.shape[1],
        **constants(values), ROWS=ROWS, LANES=LANES, RAW=raw, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launches() -> list[Launch]:
    kinds = [("bf16", "*i16"), ("int8", "*bf16"), ("int4:128", "*bf16"), ("fp16", "*bf16"), ("bf16", "*fp32")]
    return [launch(*kind) for kind in kinds]


def launch(values: str, weight: str) -> Launch:
    element = "*i32" if values.startswith("int") else "*i16"
    pointers = {"masks": "*i32", "values": element, "starts": "*i16", "bases": "*i64", "scales": "*bf16"}
    pointers |= {"weight": weight}
    return Launch(
        name=f"{values} to {weight[1:]}",
        kernel=bitmask_gemv_unpack,
        signature=pointers | dict.fromkeys(["out", "columns", "words", "scale_columns"], "i32"),
        constants=constants(values) | {"ROWS": ROWS, "LANES": LANES, "RAW": weight == "*i16"},
        warps=WARPS,
        weights=ROWS * LANES * 4,
        aligned=(*pointers, "columns"),
    )
