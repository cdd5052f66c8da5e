"""Products with weights of at most two non-zeros in four: plain Triton, for any GPU and the interpreter."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import splits, two_of_four, widen
from llmsparse.kernels.launch import Launch

MAX_TOKENS = 8
ROWS, WARPS = 32, 4
INT4 = 8, 2  # the same of codes of four bits
PAD_ROWS, PAD_GROUPS = 64, 64  # what tiles divide: zeros fill a weight up to them, and no loop needs a mask


def reference(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str, x: Tensor) -> Tensor:
    return x.double() @ dense(tensors, shape, values).T


def dense(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in) in float64."""
    words, codes, scales = tensors
    rows, groups = len(codes), codes.shape[1] * 8
    lanes = lanes_of(groups)
    shifts = 4 * torch.arange(8, device=codes.device)
    places = (codes.view(rows, -1, 1, lanes) >> shifts[:, None]).reshape(rows, groups)
    kept = widen.pairs_of(words, values, lanes)
    weight = torch.zeros(rows, groups, 4, dtype=torch.float64, device=codes.device)
    weight.scatter_(2, torch.stack([places & 3, (places >> 2 & 3) + 1], 2).long(), kept)
    return widen.scaled(weight.view(rows, -1)[: shape[0], : shape[1]], scales, values)


@triton.jit
def nm_gemv(
    words, codes, scales, planes, y, out, groups, turns, scale_columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y[row] = sum over groups of low x[place of low] + high x[place of high].

    A turn takes 8 LANES groups of each row; an int32 of ``codes`` holds those of every LANES-th, so that no code needs
    to be moved: each bit is a predicate. The lower place is 0, 1 or 2, the higher 1, 2 or 3: two selections each.
    """
    token, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    share: tl.constexpr = 4 if KIND == "int4" else 2 if KIND == "int8" else 1  # groups in a word
    word = words + rows.to(tl.int64)[:, None] * (groups // share) + lanes[None, :]
    place = codes + rows.to(tl.int64)[:, None] * (groups // 8) + lanes[None, :]
    scale = scales + rows.to(tl.int64)[:, None] * scale_columns
    total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for turn in range(split * turns, min((split + 1) * turns, groups // (8 * LANES))):
        places = tl.load(place + turn * LANES, eviction_policy="evict_first")
        for part in tl.static_range(8):
            group = (turn * 8 + part) * LANES
            if part % share == 0:
                stored = tl.load(word + group // share, eviction_policy="evict_first")
            a, b = picked(planes + token * 4 * groups + group + lanes, groups, places, 4 * part)
            if share == 1:
                low, high = widen.pair(stored, KIND)
            else:
                low, high = widen.codes(stored, part % share, 16 // share)
            if KIND == "int4":
                total += (low * a + high * b) * scale_of(scale, group, GROUP, ROWS, LANES)
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
def picked(x, plane, places, FIRST: tl.constexpr):
    """The activations of both kept weights of a group, whose places are in bits FIRST.. of ``places``."""
    x0, x1 = tl.load(x)[None, :], tl.load(x + plane)[None, :]
    x2, x3 = tl.load(x + 2 * plane)[None, :], tl.load(x + 3 * plane)[None, :]
    low = tl.where(bit(places, FIRST + 1), x2, tl.where(bit(places, FIRST), x1, x0))
    high = tl.where(bit(places, FIRST + 3), x3, tl.where(bit(places, FIRST + 2), x2, x1))
    return low, high


@triton.jit
def bit(word, N: tl.constexpr):
    return (word & (1 << N)) != 0 if N < 31 else word < 0


@triton.jit
def scale_of(scale, group, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The scales (ROWS, LANES) of groups ``group``..., loaded once for those of a thread that share one."""
    chunk: tl.constexpr = 4 if GROUP % 16 == 0 else 2
    chunks = group // chunk + tl.arange(0, LANES // chunk)
    loaded = tl.load(scale + (chunks // (GROUP // 4 // chunk))[None, :]).to(tl.float32)
    return tl.reshape(tl.broadcast_to(loaded[:, :, None], (ROWS, LANES // chunk, chunk)), (ROWS, LANES))


def linear(
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    values: str,
    x: Tensor,
    programs: int = splits.PROGRAMS,
) -> Tensor:
    """x (tokens, in) -> (tokens, out), by ``programs`` of 128 threads for each token or few more."""
    words, codes, scales = tensors
    rows, warps = tile_of(values)
    groups, blocks = codes.shape[1] * 8, -(-shape[0] // rows)
    count, turns = splits.shares(blocks, groups // (8 * lanes_of(groups)), programs * 4 // warps)
    planes = planar(x, groups)
    y = torch.empty((count, len(x), shape[0]), dtype=splits.dtype_of(x, count), device=x.device)
    nm_gemv[(len(x), blocks, count)](
        words, codes, scales, planes, y, shape[0], groups, turns, scales.shape[1],
        **constants(values, lanes_of(groups)), ROWS=rows, num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return splits.add(y, x.dtype)


def planar(x: Tensor, groups: int) -> Tensor:
    """(tokens, in) -> float32 (tokens, 4, groups): input 4 g + p in plane p at g, zeros behind."""
    used = x.shape[1] // 4
    empty = torch.empty if used == groups else torch.zeros  # a zero weight times stale memory may be NaN
    planes = empty((len(x), 4, groups), dtype=torch.float32, device=x.device)
    planes[:, :, :used].copy_(x.view(len(x), used, 4).transpose(1, 2))
    return planes


def lanes_of(groups: int) -> int:
    """16, for segments of 64 bytes, unless that would take more padding."""
    return 16 if groups % 128 == 0 else 8


def tile_of(values: str) -> tuple[int, int]:
    """(rows, warps) of a program."""
    return INT4 if widen.kind_of(values) == "int4" else (ROWS, WARPS)


def constants(values: str, lanes: int) -> dict:
    return {"KIND": widen.kind_of(values), "GROUP": widen.group_of(values), "LANES": lanes}


def why_not(numbers: Tensor, values: str) -> str | None:
    if reason := widen.why_not(numbers, values):
        return reason
    return two_of_four.why_not(numbers)


def pack(numbers: Tensor, values: str, scales: Tensor | None) -> tuple[Tensor, ...]:
    """words int32 (rows, groups / groups in a word), codes int32 (rows, groups / 8), scales; rows and groups padded."""
    out, columns = numbers.shape
    wide = -(-columns // (8 * PAD_GROUPS)) * 2 * PAD_GROUPS
    groups = wide if wide * 4 <= 1.05 * columns else -(-columns // (4 * PAD_GROUPS)) * PAD_GROUPS
    rows, lanes = -(-out // PAD_ROWS) * PAD_ROWS, lanes_of(groups)
    filled = torch.zeros(rows, 4 * groups, dtype=numbers.dtype, device=numbers.device)
    filled[:out, :columns] = numbers
    kept, of_four = two_of_four.compress(filled)
    places = (of_four[..., 0] | (of_four[..., 1] - 1) << 2).view(rows, -1, 8, lanes)
    codes = torch.zeros(places[:, :, 0].shape, dtype=torch.int32, device=numbers.device)
    for part in range(8):
        codes |= places[:, :, part].to(torch.int32) << (4 * part)
    scale_columns = -(-4 * groups // (widen.group_of(values) or 4 * groups))
    scales = widen.padded(scales, rows, scale_columns, numbers.device)
    return widen.interleaved(kept, values, lanes), codes.view(rows, -1), scales


def launches() -> list[Launch]:
    kinds = [(values, 16, *tile_of(values)) for values in ("bf16", "fp16", "int8", "int4:128", "int4:32")]
    others = [("bf16", 8, ROWS, WARPS), ("bf16", 16, 64, 8), ("bf16", 16, 16, 2)]
    return [launch(*one) for one in kinds + others]


def launch(values: str, lanes: int, rows: int, warps: int) -> Launch:
    pointers = {"words": "*i32", "codes": "*i32", "scales": "*bf16", "planes": "*fp32", "y": "*fp32"}
    return Launch(
        name=f"{values} {rows}x{lanes} {warps} warps",
        kernel=nm_gemv,
        signature=pointers | dict.fromkeys(["out", "groups", "turns", "scale_columns"], "i32"),
        constants=constants(values, lanes) | {"ROWS": rows},
        warps=warps,
        weights=rows * lanes * 32,
        aligned=(*pointers, "groups", "out"),
    )
