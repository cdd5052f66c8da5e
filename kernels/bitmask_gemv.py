"""Products with weights of any zeros: a bit for each weight, then the values row by row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import splits, widen
from llmsparse.kernels.launch import Launch

MAX_TOKENS = 8
PANEL = 256  # rows that are packed together
ROWS, LANES, WARPS = 4, 64, 4  # few rows: many loads wait at once
PAD_ROWS, PAD_WORDS = 32, 8  # what tiles divide: zeros fill a weight up to them, and no loop needs a mask
MOST = 65536  # inputs: a word's first value is counted from its row's in 16 bits


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, x: Tensor) -> Tensor:
    return x.double() @ dense(tensors, shape, values).T


def dense(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in) in float64."""
    masks, stored, _, bases, scales = tensors
    kept = (masks[:, :, None] >> torch.arange(32, device=masks.device) & 1).bool().flatten(1)
    if values in widen.FLOATS:
        numbers = stored.view(widen.FLOATS[values]).double()
    else:
        numbers = stored.view(torch.uint8)
        if values != "int8":
            numbers = torch.stack([numbers & 15, numbers >> 4], 1).flatten()
        numbers = numbers.double() - (128 if values == "int8" else 8)
    at = bases[:, None] * unit_of(values) + kept.cumsum(1) - 1
    weight = torch.where(kept, numbers[at.clamp(min=0)], 0.0)
    return widen.scaled(weight[: shape[0], : shape[1]], scales, values)


@triton.jit
def bitmask_gemv(
    masks, values, starts, bases, scales, planes, y, out, words, turns, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y[row] = sum over set bits of the next value times x there.

    A lane takes four columns: the bits of its word before them say which value comes first, and those that follow are
    loaded whether they are its own or not, from one address.
    """
    token, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    shift = (lanes % 8 * 4)[None, :]
    before = (1 << shift) - 1
    mask = masks + rows.to(tl.int64)[:, None] * words + (lanes // 8)[None, :]
    start = starts + rows.to(tl.int64)[:, None] * words + (lanes // 8)[None, :]
    scale = scales + rows.to(tl.int64)[:, None] * scale_columns
    value = values + tl.load(bases + rows)[:, None]
    total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for turn in range(split * turns, min((split + 1) * turns, words * 8 // LANES)):
        word = tl.load(mask + turn * (LANES // 8))
        first = (tl.load(start + turn * (LANES // 8)).to(tl.int32) & 0xFFFF) + count(word & before)
        bits = word >> shift
        x = planes + token * 32 * words + turn * LANES + lanes
        if KIND == "bf16" or KIND == "fp16":
            at = value + first
            v0, v1, v2, v3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        else:
            v0, v1, v2, v3 = four_codes(value, first, 8 if KIND == "int8" else 4)
        if KIND == "int4":
            place = scale + ((turn * LANES + lanes) // (GROUP // 4))[None, :]
            part = four(tl.zeros_like(total), v0, v1, v2, v3, bits, x, 8 * words, KIND)
            total += part * tl.load(place).to(tl.float32)
        else:
            total = four(total, v0, v1, v2, v3, bits, x, 8 * words, KIND)
    sums = tl.sum(total, 1)
    if KIND == "int8":
        sums *= tl.load(scales + rows).to(tl.float32)
    tl.store(
        y + (split * tl.num_programs(0) + token) * out + rows, sums.to(y.dtype.element_ty), mask=rows < out
    )


@triton.jit
def count(word):
    """Set bits; compilers know it as one instruction."""
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def four_codes(value, first, BITS: tl.constexpr):
    """Four int32 whose low bits are code number ``first`` and those that follow: two words are read as one."""
    at = value + first // (32 // BITS)
    low, high = tl.load(at).to(tl.uint32).to(tl.uint64), tl.load(at + 1).to(tl.uint32).to(tl.uint64)
    window = ((high << 32 | low) >> (first % (32 // BITS) * BITS).to(tl.uint64)).to(tl.uint32).to(tl.int32)
    return window, window >> BITS, window >> (2 * BITS), window >> (3 * BITS)


@triton.jit
def four(total, v0, v1, v2, v3, bits, x, plane, KIND: tl.constexpr):
    """total + the values of the set bits times x: after each of them the values move up."""
    b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    total = tl.where(b0, total + widen.single(v0, KIND) * tl.load(x)[None, :], total)
    v0, v1, v2 = tl.where(b0, v1, v0), tl.where(b0, v2, v1), tl.where(b0, v3, v2)
    total = tl.where(b1, total + widen.single(v0, KIND) * tl.load(x + plane)[None, :], total)
    v0, v1 = tl.where(b1, v1, v0), tl.where(b1, v2, v1)
    total = tl.where(b2, total + widen.single(v0, KIND) * tl.load(x + 2 * plane)[None, :], total)
    v0 = tl.where(b2, v1, v0)
    return tl.where(b3, total + widen.single(v0, KIND) * tl.load(x + 3 * plane)[None, :], total)


def linear(
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    values: str,
    x: Tensor,
    programs: int = splits.PROGRAMS,
) -> Tensor:
    """x (tokens, in) -> (tokens, out), by ``programs`` for each token or few more."""
    masks, stored, starts, bases, scales = tensors
    words, blocks = masks.shape[1], -(-shape[0] // ROWS)
    count, turns = splits.shares(blocks, words * 8 // LANES, programs)
    planes = planar(x, words * 8)
    y = torch.empty((count, len(x), shape[0]), dtype=splits.dtype_of(x, count), device=x.device)
    bitmask_gemv[(len(x), blocks, count)](
        masks, stored, starts, bases, scales, planes, y, shape[0], words, turns, scales.shape[1],
        **constants(values), ROWS=ROWS, LANES=LANES, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return splits.add(y, x.dtype)


def planar(x: Tensor, quarter: int) -> Tensor:
    """(tokens, in) -> float32 (tokens, 4, quarter): input 4 q + p in plane p at q, zeros behind."""
    if x.shape[1] != 4 * quarter:
        wide = torch.zeros(len(x), 4 * quarter, dtype=x.dtype, device=x.device)
        wide[:, : x.shape[1]] = x
        x = wide
    planes = torch.empty((len(x), 4, quarter), dtype=torch.float32, device=x.device)
    return planes.copy_(x.view(len(x), quarter, 4).transpose(1, 2))


def unit_of(values: str) -> int:
    """Values in an element of the packed tensor: 16 bits, or 32 of codes."""
    return {"int8": 4, "int4": 8}.get(widen.kind_of(values), 1)


def constants(values: str) -> dict:
    return {"KIND": widen.kind_of(values), "GROUP": widen.group_of(values)}


def why_not(numbers: Tensor, values: str) -> str | None:
    if numbers.shape[1] > MOST:
        return f"holds at most {MOST} inputs, not {numbers.shape[1]}"
    return widen.why_not(numbers, values)


def pack(numbers: Tensor, values: str, scales: Tensor | None) -> tuple[Tensor, ...]:
    """masks int32 (rows, words), values, starts int16 (rows, words) in a row, bases int64 (rows,), scales.

    A row's values begin at an int32 where they are codes. Rows and words are padded with zeros.
    """
    out, columns = numbers.shape
    rows, words = -(-out // PAD_ROWS) * PAD_ROWS, -(-columns // (32 * PAD_WORDS)) * PAD_WORDS
    filled = torch.zeros(rows, 32 * words, dtype=numbers.dtype, device=numbers.device)
    filled[:out, :columns] = numbers
    kept = (filled != 0).view(rows, words, 32)
    masks = torch.zeros(rows, words, dtype=torch.int32, device=numbers.device)
    for bit in range(32):
        masks |= kept[:, :, bit].to(torch.int32) << bit
    counts = kept.sum(2, dtype=torch.int32)
    ends = counts.cumsum(1)
    unit = unit_of(values)
    sizes = (ends[:, -1] + unit - 1) // unit
    missing = sizes * unit - ends[:, -1]  # to the next element
    # rows in panels: an index of every value would take eight times its memory
    panels = [slice(row, row + PANEL) for row in range(0, rows, PANEL)]
    parts = [_values(filled[panel], kept.view(rows, -1)[panel], missing[panel], unit) for panel in panels]
    stored = torch.cat([*parts, filled.new_zeros(4 * unit)])  # four values are loaded where one may be left
    bases = sizes.cumsum(0) - sizes
    if unit > 1:
        stored = widen.biased(stored, values)
        stored = (stored if unit == 4 else stored[0::2] | stored[1::2] << 4).view(torch.int32)
    starts = (ends - counts).to(torch.int16)
    scale_columns = -(-32 * words // (widen.group_of(values) or 32 * words))
    return masks, stored, starts, bases, widen.padded(scales, rows, scale_columns, numbers.device)


def _values(filled: Tensor, kept: Tensor, missing: Tensor, unit: int) -> Tensor:
    """The kept numbers row by row, each row filled up with ``missing`` zeros."""
    beyond = torch.arange(unit, device=filled.device) < missing[:, None]
    return torch.cat([filled, torch.zeros_like(filled[:, :unit])], 1)[torch.cat([kept, beyond], 1)]


def launches() -> list[Launch]:
    kinds = [(values, ROWS, LANES, WARPS) for values in ("bf16", "fp16", "int8", "int4:128")]
    return [
        launch(*one)
        for one in [*kinds, ("bf16", 4, 32, 4), ("bf16", 4, 64, 2), ("bf16", 16, 64, 4), ("bf16", 32, 64, 8)]
    ]


def launch(values: str, rows: int, lanes: int, warps: int) -> Launch:
    element = "*i32" if values.startswith("int") else "*i16"
    pointers = {"masks": "*i32", "values": element, "starts": "*i16", "bases": "*i64", "scales": "*bf16"}
    pointers |= {"planes": "*fp32", "y": "*fp32"}
    return Launch(
        name=f"{values} {rows}x{lanes} {warps} warps",
        kernel=bitmask_gemv,
        signature=pointers | dict.fromkeys(["out", "words", "turns", "scale_columns"], "i32"),
        constants=constants(values) | {"ROWS": rows, "LANES": lanes},
        warps=warps,
        weights=rows * lanes * 4,
        aligned=(*pointers, "out"),
    )
