"""Products with weights of at most 8 non-zeros in 16, each with its place in four bits."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import splits, widen
from llmsparse.kernels.launch import Launch

MAX_TOKENS = 8
ROWS, WARPS = 64, 4
PAD_ROWS = 64  # what tiles divide: zeros fill a weight up to them, and no loop needs a mask


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, x: Tensor) -> Tensor:
    return x.double() @ dense(tensors, shape, values).T


def dense(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in) in float64."""
    words, places, scales = tensors
    rows, groups, half = places.shape
    lanes = lanes_of(groups * half)
    kept = widen.pairs_of(words, values, lanes)
    pairs = places.view(rows, -1, lanes, 4).transpose(2, 3).reshape(rows, -1)
    at = torch.stack([pairs & 15, pairs >> 4], 2).view(rows, groups, -1).long()
    weight = torch.zeros(rows, groups, 16, dtype=torch.float64, device=at.device)
    # Zeros that fill a group may share a place with another value: they are added, not written.
    weight.scatter_add_(2, at, kept.view(rows, groups, -1))
    return widen.scaled(weight.view(rows, -1)[: shape[0], : shape[1]], scales, values)


@triton.jit
def n16_gemv(
    words, places, scales, x, y, out, pairs, width, turns, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y[row] = sum over pairs of low x[16 group + place of low] + high x[16 group + place of high].

    A group has HALF pairs. A turn takes 4 LANES pairs of each row; an int32 of ``places`` holds those of every LANES-th.
    """
    token, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    share: tl.constexpr = 4 if KIND == "int4" else 2 if KIND == "int8" else 1  # pairs in a word
    word = words + rows.to(tl.int64)[:, None] * (pairs // share) + lanes[None, :]
    place = places + rows.to(tl.int64)[:, None] * (pairs // 4) + lanes[None, :]
    scale = scales + rows.to(tl.int64)[:, None] * scale_columns
    total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for turn in range(split * turns, min((split + 1) * turns, pairs // (4 * LANES))):
        four = tl.load(place + turn * LANES, eviction_policy="evict_first")
        for part in tl.static_range(4):
            first = (turn * 4 + part) * LANES
            if part % share == 0:
                stored = tl.load(word + first // share, eviction_policy="evict_first")
            if LANES % HALF == 0:
                begin = x + token * width + first // HALF * 16
                base = (lanes // HALF * 16)[None, :]
            else:
                begin = x + token * width
                base = ((first + lanes) // HALF * 16)[None, :]
            at_low, at_high = base + (four >> (8 * part) & 15), base + (four >> (8 * part + 4) & 15)
            a, b = tl.load(begin + at_low), tl.load(begin + at_high)
            if share == 1:
                low, high = widen.pair(stored, KIND)
            else:
                low, high = widen.codes(stored, part % share, 16 // share)
            if KIND == "int4":
                skipped = first // HALF * 16 if LANES % HALF == 0 else 0
                inputs = skipped + at_low, skipped + at_high
                total += scaled(low * a, high * b, scale, first, inputs, GROUP, HALF, ROWS, LANES)
            else:
                total += low * a
                total += high * b
    sums = tl.sum(total, 1)
    if KIND == "int8":
        sums *= tl.load(scales + rows).to(tl.float32)
    tl.store(
        y + (split * tl.num_programs(0) + token) * out + rows, sums.to(y.dtype.element_ty), mask=rows < out
    )


@triton.jit
def scaled(
    low, high, scale, first, inputs,
    GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """low + high, each times the scale of its group of ``inputs``; those of a thread that share one load it once."""
    if GROUP % 16:  # a scale changes within 16 inputs
        low *= tl.load(scale + inputs[0] // GROUP).to(tl.float32)
        high *= tl.load(scale + inputs[1] // GROUP).to(tl.float32)
        return low + high
    else:
        shared: tl.constexpr = GROUP // 16 * HALF  # pairs
        chunk: tl.constexpr = 4 if shared % 4 == 0 else 2 if shared % 2 == 0 else 1
        chunks = first // chunk + tl.arange(0, LANES // chunk)
        loaded = tl.load(scale + (chunks // (shared // chunk))[None, :]).to(tl.float32)
        wide = tl.broadcast_to(loaded[:, :, None], (ROWS, LANES // chunk, chunk))
        return (low + high) * tl.reshape(wide, (ROWS, LANES))


def linear(
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    values: str,
    x: Tensor,
    programs: int = splits.PROGRAMS,
) -> Tensor:
    """x (tokens, in) -> (tokens, out), by ``programs`` for each token or few more."""
    words, places, scales = tensors
    _, groups, half = places.shape
    lanes, blocks = lanes_of(groups * half), -(-shape[0] // ROWS)
    count, turns = splits.shares(blocks, groups * half // (4 * lanes), programs)
    wide = widened(x, groups * 16)
    y = torch.empty((count, len(x), shape[0]), dtype=splits.dtype_of(x, count), device=x.device)
    n16_gemv[(len(x), blocks, count)](
        words, int32s(places), scales, wide, y, shape[0], groups * half, groups * 16, turns, scales.shape[1],
        **constants(values, half, lanes), ROWS=ROWS, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return splits.add(y, x.dtype)


def widened(x: Tensor, width: int) -> Tensor:
    """(tokens, in) -> float32 (tokens, width), zeros behind: padding reads there."""
    if width == x.shape[1]:
        return x.float()
    wide = torch.zeros(len(x), width, dtype=torch.float32, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide


def int32s(places: Tensor) -> Tensor:
    return places.view(len(places), -1).view(torch.int32)


def lanes_of(pairs: int) -> int:
    """16, for segments of 64 bytes, unless that would take more padding."""
    return 16 if pairs % 64 == 0 else 8


def constants(values: str, half: int, lanes: int) -> dict:
    return {"KIND": widen.kind_of(values), "GROUP": widen.group_of(values), "HALF": half, "LANES": lanes}


def why_not(numbers: Tensor, values: str) -> str | None:
    if reason := widen.why_not(numbers, values):
        return reason
    if numbers.shape[1] % 16:
        return f"needs inputs divisible by 16, not {numbers.shape[1]}"
    most = most_of(numbers)
    return f"holds at most 8 of every 16 inputs, not {most}" if most > 8 else None


def most_of(numbers: Tensor) -> int:
    return int((numbers.view(len(numbers), -1, 16) != 0).sum(2).max()) if numbers.numel() else 0


def pack(numbers: Tensor, values: str, scales: Tensor | None) -> tuple[Tensor, ...]:
    """words int32 (rows, pairs / pairs in a word), places uint8 (rows, groups, pairs of a group), scales; padded."""
    out, columns = numbers.shape
    half = max(1, -(-most_of(numbers) // 2))
    unit = 32 // math.gcd(32, half)
    wide = -(-columns // (32 * unit)) * 2 * unit
    groups = wide if wide * 16 <= 1.05 * columns else -(-columns // (16 * unit)) * unit
    rows, lanes = -(-out // PAD_ROWS) * PAD_ROWS, lanes_of(groups * half)
    filled = torch.zeros(rows, 16 * groups, dtype=numbers.dtype, device=numbers.device)
    filled[:out, :columns] = numbers
    kept, at = kept_of(filled.view(-1, 16), 2 * half)
    places = (at[:, 0::2] | at[:, 1::2] << 4).view(rows, -1, 4, lanes).transpose(2, 3)
    scale_columns = -(-16 * groups // (widen.group_of(values) or 16 * groups))
    scales = widen.padded(scales, rows, scale_columns, numbers.device)
    words = widen.interleaved(kept.view(rows, -1, 2), values, lanes)
    return words, places.contiguous().view(rows, groups, half), scales


def kept_of(groups: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(values, places uint8) of the first ``kept`` non-zeros of each of (groups, 16); zeros at 0 where they are fewer."""
    rank = torch.zeros(len(groups), dtype=torch.uint8, device=groups.device)
    values = torch.zeros(len(groups), kept, dtype=groups.dtype, device=groups.device)
    places = torch.zeros(len(groups), kept, dtype=torch.uint8, device=groups.device)
    for place in range(16):
        there = groups[:, place] != 0
        for slot in range(min(place + 1, kept)):
            here = there & (rank == slot)
            values[:, slot] = torch.where(here, groups[:, place], values[:, slot])
            places[:, slot] = torch.where(here, place, places[:, slot])
        rank += there
    return values, places


def launches() -> list[Launch]:
    kinds = [(values, 4, 16, ROWS, WARPS) for values in ("bf16", "fp16", "int8", "int4:128", "int4:32")]
    others = [("bf16", 2, 16, ROWS, WARPS), ("bf16", 3, 16, ROWS, WARPS), ("bf16", 4, 8, ROWS, WARPS)]
    return [launch(*one) for one in [*kinds, *others, ("bf16", 4, 16, 64, 8), ("bf16", 4, 16, 32, 4)]]


def launch(values: str, half: int, lanes: int, rows: int, warps: int) -> Launch:
    pointers = {"words": "*i32", "places": "*i32", "scales": "*bf16", "x": "*fp32", "y": "*fp32"}
    return Launch(
        name=f"{values} {2 * half}:16 {rows}x{lanes} {warps} warps",
        kernel=n16_gemv,
        signature=pointers | dict.fromkeys(["out", "pairs", "width", "turns", "scale_columns"], "i32"),
        constants=constants(values, half, lanes) | {"ROWS": rows},
        warps=warps,
        weights=rows * lanes * 64 // half,
        aligned=(*pointers, "pairs", "width", "out"),
    )
