"""Products with weights of at most 8 non-zeros in 16, each with its place in four bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import splits, widen
from llmsparse.kernels.launch import Launch

MAX_TOKENS = 8
ROWS, WARPS = 32, 4
PAD_ROWS = 64  # what tiles divide: zeros fill a weight up to them, and no loop needs a mask


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, x: Tensor) -> Tensor:
    return x.double() @ dense(tensors, shape, values).T


def dense(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in) in float64."""
    words, places, scales = tensors
    out, columns = shape
    rows, lanes, share = len(places), lanes_of(places.shape[1]), share_of(values)
    half = half_of(tensors, columns)
    if share == 1:
        kept = words.view(widen.float_of(values)).view(rows, -1, 2).double()
    else:
        stored = words.view(torch.uint8)
        stored = torch.stack([stored & 15, stored >> 4], 2) if share == 4 else stored
        kept = stored.view(rows, -1, lanes, share, 2).transpose(2, 3).reshape(rows, -1, 2).double()
        kept -= 128 if share == 2 else 8
    pairs = places.view(torch.uint8).view(rows, -1, lanes, 4).transpose(2, 3).reshape(rows, -1)
    at = torch.stack([pairs & 15, pairs >> 4], 2).long()
    at += 16 * (torch.arange(pairs.shape[1], device=at.device) // half)[:, None]
    used = columns // 16 * half
    weight = torch.zeros(rows, columns, dtype=torch.float64, device=at.device)
    # Zeros that fill a group share a place with another value: they are added, not written.
    weight.scatter_add_(1, at[:, :used].flatten(1), kept[:, :used].flatten(1))
    return widen.scaled(weight[:out], scales, values)


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
            if KIND == "int4" and GROUP % 16 == 0:
                total += (low * a + high * b) * scale_of(scale, first, GROUP, HALF, ROWS, LANES)
            else:
                if KIND == "int4":
                    skipped = first // HALF * 16 if LANES % HALF == 0 else 0
                    low *= tl.load(scale + (skipped + at_low) // GROUP).to(tl.float32)
                    high *= tl.load(scale + (skipped + at_high) // GROUP).to(tl.float32)
                total += low * a
                total += high * b
    sums = tl.sum(total, 1)
    if KIND == "int8":
        sums *= tl.load(scales + rows).to(tl.float32)
    tl.store(y + (split * tl.num_programs(0) + token) * out + rows, sums.to(y.dtype.element_ty), mask=rows < out)


@triton.jit
def scale_of(scale, first, GROUP: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The scales (ROWS, LANES) of pairs ``first``..., loaded once for those of a thread that share one."""
    shared: tl.constexpr = GROUP // 16 * HALF
    chunk: tl.constexpr = 4 if shared % 4 == 0 else 2 if shared % 2 == 0 else 1
    chunks = first // chunk + tl.arange(0, LANES // chunk)
    loaded = tl.load(scale + (chunks // (shared // chunk))[None, :]).to(tl.float32)
    return tl.reshape(tl.broadcast_to(loaded[:, :, None], (ROWS, LANES // chunk, chunk)), (ROWS, LANES))


def linear(
    tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, x: Tensor, programs: int = splits.PROGRAMS
) -> Tensor:
    """x (tokens, in) -> (tokens, out), by ``programs`` for each token or few more."""
    words, places, scales = tensors
    pairs, blocks = places.shape[1] * 4, len(places) // ROWS
    lanes, half = lanes_of(places.shape[1]), half_of(tensors, shape[1])
    count, turns = splits.shares(blocks, pairs // (4 * lanes), programs)
    wide = widened(x, -(-pairs // half) * 16)
    y = torch.empty((count, len(x), shape[0]), dtype=splits.dtype_of(x, count), device=x.device)
    n16_gemv[(len(x), blocks, count)](
        words, places, scales, wide, y, shape[0], pairs, wide.shape[1], turns, scales.shape[1],
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


def lanes_of(places: int) -> int:
    """16, for segments of 64 bytes, unless that would take more padding."""
    return 16 if places % 16 == 0 else 8


def half_of(tensors: tuple[Tensor, ...], columns: int) -> int:
    """Pairs of a group: the most that so many pairs leave room for, since padding is less than a pair a group or short."""
    return int(tensors[3].numel())


def share_of(values: str) -> int:
    """Pairs that share an int32."""
    return {"int8": 2, "int4": 4}.get(widen.kind_of(values), 1)


def constants(values: str, half: int, lanes: int) -> dict:
    return {"KIND": widen.kind_of(values), "GROUP": widen.group_of(values), "HALF": half, "LANES": lanes}
