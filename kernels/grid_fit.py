"""Scales of one group of a grid, one for each row, fitted in one launch while SparseGPT's sweep waits."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels.launch import Launch
from llmsparse.kernels.obs_sweep import EVEN, nearest

ROWS = 16  # rows of the weight for a program
WIDEST = 128  # group


class Codes(NamedTuple):
    """What a grid tries: the largest weight over scale, with both signs where they differ; its range."""

    steps: tuple[float, ...]
    low: int
    high: int


def reference(columns: Tensor, kept: Tensor, importance: Tensor, codes: Codes) -> Tensor:
    """What ``fit`` computes, in any dtype."""
    values = torch.where(kept, columns, 0.0)
    extreme = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)

    def nearest_codes(scale: Tensor) -> Tensor:
        return (values / scale).nan_to_num(0.0, 0.0, 0.0).round().clamp(codes.low, codes.high)

    for step in codes.steps:
        scale = eight_bits(extreme / step)
        found = nearest_codes(scale)
        weighed = found * importance[:, None]
        fitted = (values * weighed).sum(0) / (found * weighed).sum(0)
        scale = eight_bits(torch.where(fitted.isfinite(), fitted, scale))
        error = ((values - nearest_codes(scale) * scale).square() * importance[:, None]).sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def eight_bits(scale: Tensor) -> Tensor:
    """The nearest number with 8 significant bits that fp16 holds."""
    small = (scale * 2.0**24).round() * 2.0**-24
    rounded = scale.float().bfloat16().to(scale)
    return torch.where(rounded.abs() < 2.0**-16, small, rounded).clamp(-65280.0, 65280.0)


@triton.jit
def _eight_bits(scale):
    """The same: bfloat16 has 8 significant bits, and 2^-24 is fp16's smallest number."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    small = ((scale * 16777216.0 + EVEN) - EVEN) * 5.9604644775390625e-08
    rounded = tl.where(tl.abs(rounded) < 1.52587890625e-05, small, rounded)
    return tl.minimum(tl.maximum(rounded, -65280.0), 65280.0)


@triton.jit
def _fit(
    columns,  # (group, outputs)
    kept,
    importance,  # (group,)
    steps,
    scales,  # (outputs,)
    group,
    outputs,
    tried,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """s = sum(g w c) / sum(g c^2) for the codes c that each first scale gives; the s of the least sum(g (w - c s)^2)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK)
    inside = (inner < group)[:, None] & (rows < outputs)[None, :]
    offsets = inner[:, None] * outputs + rows[None, :]
    tile = tl.load(columns + offsets, mask=inside, other=0.0)
    tile = tl.where(tl.load(kept + offsets, mask=inside, other=0) != 0, tile, 0.0)
    cost = tl.load(importance + inner, mask=inner < group, other=0.0)[:, None]
    largest = tl.max(tl.abs(tile), 0)
    first = tl.min(tl.where(tl.abs(tile) == largest[None, :], inner[:, None], BLOCK), 0)
    extreme = tl.sum(tl.where(inner[:, None] == first[None, :], tile, 0.0), 0)
    best, least = tl.zeros_like(extreme), tl.zeros_like(extreme) + float("inf")
    for number in range(tried):
        scale = _eight_bits(tl.div_rn(extreme, tl.load(steps + number)))
        code = nearest(tile, scale[None, :], LOW, HIGH)
        below = tl.sum(code * (code * cost), 0)
        fitted = tl.div_rn(tl.sum(tile * (code * cost), 0), tl.where(below == 0, 1.0, below))
        finite = (below != 0) & (tl.abs(fitted) < float("inf"))
        scale = _eight_bits(tl.where(finite, fitted, scale))
        wrong = tile - nearest(tile, scale[None, :], LOW, HIGH) * scale[None, :]
        error = tl.sum(wrong * wrong * cost, 0)
        best, least = tl.where(error < least, scale, best), tl.minimum(error, least)
    tl.store(scales + rows, best, mask=rows < outputs)


def fit(columns: Tensor, kept: Tensor, importance: Tensor, codes: Codes) -> Tensor:
    """Scales (out,) of the group ``columns`` (group, out) float32: least squares over what is ``kept``, as Grid.fit.

    ``importance`` (group,) weighs the squared errors.

    Raises:
        ValueError: another dtype than float32, or more than 128 columns.
    """
    group, outputs = columns.shape
    if columns.dtype != torch.float32 or group > WIDEST:
        raise ValueError(
            f"grid_fit needs float32 and groups up to {WIDEST}; these are {group} columns of {columns.dtype}"
        )
    columns, kept = columns.contiguous(), kept.contiguous().view(torch.uint8)
    scales = torch.empty_like(columns[0])
    steps = _steps(codes.steps, columns.device)
    constants, warps = _constants(group, codes.low, codes.high)
    arguments = (columns, kept, importance.contiguous(), steps, scales, group, outputs, len(codes.steps))
    with torch.cuda.device_of(columns):
        _fit[(triton.cdiv(outputs, ROWS),)](
            *arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=True
        )
    return scales


def wrong(device: torch.device) -> str | None:
    """What of a fit on ``device`` is wrong, in every number of warps, or None."""
    random = torch.Generator().manual_seed(0)
    codes = Codes((5.0, -5.0, 7.0, -7.0, 8.5, -8.5), -8, 7)
    for group in (32, 64, 128):
        columns = torch.randn(group, 40, generator=random).to(device)
        importance = torch.rand(group, generator=random).to(device)
        found = fit(columns, columns > -0.5, importance, codes)
        wanted = reference(columns.double(), columns > -0.5, importance.double(), codes)
        if not bool(
            ((found - wanted).abs() < 0.05 * wanted.abs()).float().mean() > 0.9
        ):  # ties may go either way
            return f"scales of groups of {group} are wrong"
    return None


@cache
def _steps(steps: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy waits."""
    return torch.tensor(steps, device=device, dtype=torch.float32)


def _constants(group: int, low: int, high: int) -> tuple[dict[str, int], int]:
    """What the kernel is compiled for, and its warps: one for every 32 columns."""
    block = max(triton.next_power_of_2(group), 32)
    return {"LOW": low, "HIGH": high, "BLOCK": block, "ROWS": ROWS}, block // 32


def launches() -> list[Launch]:
    """int4:32, then int4:64 and wider groups."""
    names = ("columns", "kept", "importance", "steps", "scales", "group", "outputs", "tried")
    signature = dict(zip(names, ("*fp32", "*u8", *["*fp32"] * 3, *["i32"] * 3), strict=True))
    found = []
    for group in (32, 64, 128):
        constants, warps = _constants(group, -8, 7)
        found.append(Launch(f"int4:{group}", _fit, signature, constants, warps, aligned=names))
    return found
