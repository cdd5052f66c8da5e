"""SparseGPT's column loop over one chunk in one launch (arXiv 2301.00774, algorithm 1)."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels.launch import Launch

# Columns that a program holds at once, and its warps. One warp waits at no barrier; wider groups of n:m need more
# registers than it has. None of these spills on sm_80, 89, 90 and 120.
TILES = ((16, 1), (32, 4), (128, 32))
ROWS = 16  # rows of the weight that a program sweeps: 256 programs for 4096
WIDEST = TILES[-1][0]  # group of n:m
EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: numbers of its size have no fraction, ties go to even


class Rounding(NamedTuple):
    """One scale for each row while these columns are swept; ``codes`` are filled."""

    scale: Tensor  # (out,)
    codes: Tensor  # int8 (chunk, out)
    low: int
    high: int


def reference(
    columns: Tensor,
    kept: Tensor,
    upper: Tensor,
    errors: Tensor,
    nm: tuple[int, int] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """What ``sweep`` does, column by column, in any dtype."""
    diagonal = upper.diagonal()
    for j in range(len(columns)):
        if nm is not None and j % nm[1] == 0:
            group = slice(j, j + nm[1])
            scores = columns[group].square() / diagonal[group, None].square()
            kept[group] = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0) < nm[0]
        value = torch.where(kept[j], columns[j], 0.0)
        if rounding is not None:
            codes = (value / rounding.scale).nan_to_num(0.0, 0.0, 0.0).round()
            rounding.codes[j] = codes.clamp(rounding.low, rounding.high)
            value = rounding.codes[j] * rounding.scale
        errors[j] = (columns[j] - value) * diagonal[j].reciprocal()
        columns[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]


@triton.jit
def _largest(tile, diagonal, group, N: tl.constexpr, M: tl.constexpr):
    """Where ``tile`` (BLOCK, ROWS) has the N largest w^2 / U_jj^2 of columns group..group+M, ties by lowest index."""
    inner = tl.arange(0, tile.shape[0])[:, None]
    scores = tl.div_rn(tile * tile, (diagonal * diagonal)[:, None])
    before = tl.zeros_like(scores).to(tl.int32)  # how many of the group go first
    for k in range(group, group + M):
        other = tl.sum(tl.where(inner == k, scores, 0.0), 0)[None, :]
        before += ((other > scores) | ((other == scores) & (inner > k))).to(tl.int32)
    return (before < N) & (inner >= group) & (inner < group + M)


@triton.jit
def nearest(value, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The code nearest to ``value`` / ``scale``, a float; 0 where the quotient is not finite."""
    code = tl.div_rn(value, tl.where(scale == 0, float("inf"), scale))
    code = tl.where(tl.abs(code) < float("inf"), code, 0.0)
    return (tl.minimum(tl.maximum(code, LOW), HIGH) + EVEN) - EVEN


@triton.jit
def _catch_up(tile, error, there, factor, inside, earlier, count, outputs):
    """``tile`` (BLOCK, ROWS) less what the errors of the ``earlier`` columns of the chunk take from it."""
    for _ in range(earlier):
        ahead = tl.load(factor, mask=inside, other=0.0)
        tile -= ahead[:, None] * tl.load(error, mask=there, other=0.0)[None, :]
        factor += count
        error += outputs
    return tile


@triton.jit
def _block(
    tile,
    keep,
    scale,
    row,
    size,
    count,
    N: tl.constexpr,
    M: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Sweep the ``size`` columns of ``tile`` (BLOCK, ROWS); ``row`` is where their part of the factor begins.

    Returns the tile, each column as it was in its turn, what is kept of it, and 1 / U_jj.
    """
    inner = tl.arange(0, tile.shape[0])
    diagonal = tl.load(row + inner * (count + 1), mask=inner < size, other=1.0)
    inverse = tl.div_rn(1.0, diagonal)
    WIDTH: tl.constexpr = M if N > 0 else tile.shape[0]
    # a row of the factor is asked for a column before it is needed
    following = tl.load(row + inner, mask=(inner > 0) & (inner < size), other=0.0)
    for group in range(0, size, WIDTH):
        if N > 0:
            keep = keep | _largest(tile, diagonal, group, N, M)
        for j in range(group, tl.minimum(group + WIDTH, size)):
            factor, here = following, (inner == j)[:, None]
            row += count
            following = tl.load(row + inner, mask=(inner > j + 1) & (inner < size), other=0.0)
            error = tl.sum(tl.where(here, tile, 0.0), 0)
            value = tl.sum(tl.where(here & keep, tile, 0.0), 0)
            if HIGH > 0:
                value = nearest(value, scale, LOW, HIGH) * scale
            error -= value
            error *= tl.sum(tl.where(inner == j, inverse, 0.0), 0)
            tile -= factor[:, None] * error[None, :]
    return tile, keep, inverse


@triton.jit
def _sweep(
    columns,  # (count, outputs)
    kept,
    upper,  # (count, count)
    errors,
    scale,  # (outputs,), or None as the codes are
    codes,
    count,
    outputs,
    N: tl.constexpr,  # 0: kept is given
    M: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,  # 0: nothing is rounded
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """e_j = (w_j - q_j) / U_jj, then w_i -= U_ji e_j for all i > j, a block of columns after the other in registers.

    A block first catches up with the errors before it, in their order: each column is read and written once.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < outputs
    inner = tl.arange(0, BLOCK)
    offsets = inner[:, None] * outputs + rows[None, :]
    begin = tl.full((), 0, tl.int64)  # of a block
    scales = tl.zeros((ROWS,), tl.float32)
    if HIGH > 0:
        scales = tl.load(scale + rows, mask=there, other=1.0)
    STEP: tl.constexpr = BLOCK // M * M if N > 0 else BLOCK  # whole groups
    for first in range(0, count, STEP):
        size = tl.minimum(count - first, STEP)
        inside = (inner < size)[:, None] & there[None, :]
        tile = tl.load(columns + begin + offsets, mask=inside, other=0.0)
        factor = upper + first + inner
        tile = _catch_up(tile, errors + rows, there, factor, inner < size, first, count, outputs)
        keep = tl.zeros_like(tile) != 0
        if N == 0:
            keep = tl.load(kept + begin + offsets, mask=inside, other=0) != 0
        row = upper + first * count + first
        tile, keep, inverse = _block(tile, keep, scales, row, size, count, N, M, LOW, HIGH)
        value = tl.where(keep, tile, 0.0)
        if HIGH > 0:
            code = nearest(value, scales[None, :], LOW, HIGH)
            value = code * scales[None, :]
            tl.store(codes + begin + offsets, code.to(tl.int8), mask=inside)
        tl.store(columns + begin + offsets, tile, mask=inside)
        tl.store(errors + begin + offsets, (tile - value) * inverse[:, None], mask=inside)
        if N > 0:
            tl.store(kept + begin + offsets, keep.to(tl.uint8), mask=inside)
        begin += STEP * outputs
        tl.debug_barrier()  # other threads of this program read these errors


def sweep(
    columns: Tensor,
    kept: Tensor,
    upper: Tensor,
    errors: Tensor,
    nm: tuple[int, int] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Prune and round a chunk of columns; fills the ``errors`` (chunk, out) that later columns are to absorb.

    ``columns`` (chunk, out) float32 are updated in place (what is pruned keeps the value that it lost); ``kept``
    (chunk, out) bool is given, or with ``nm``, n kept of m, chosen group by group and filled. ``upper`` (chunk, chunk)
    is the chunk's part of the Cholesky factor of the inverse Gram.

    Raises:
        ValueError: another dtype than float32, no contiguous columns, or a group of n:m too wide or cut off.
    """
    count, outputs = columns.shape
    if columns.dtype != torch.float32 or not all(t.is_contiguous() for t in (columns, kept, errors)):
        raise ValueError(f"obs_sweep needs contiguous float32 columns; these are {columns.dtype}")
    if nm and (nm[1] > WIDEST or count % nm[1]):
        raise ValueError(f"obs_sweep needs groups of up to {WIDEST} that divide {count} columns, not {nm}")
    scale, codes, low, high = rounding or (None, None, 0, 0)
    constants, warps = _constants(nm or (0, 0), low, high)
    arguments = (columns, kept.view(torch.uint8), upper.contiguous(), errors, scale, codes, count, outputs)
    with torch.cuda.device_of(columns):
        _sweep[(triton.cdiv(outputs, ROWS),)](
            *arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=True
        )


def _constants(nm: tuple[int, int], low: int, high: int) -> tuple[dict[str, int], int]:
    """What the kernel is compiled for, and its warps."""
    block, warps = next(tile for tile in TILES if tile[0] >= nm[1])
    return {"N": nm[0], "M": nm[1], "LOW": low, "HIGH": high, "BLOCK": block, "ROWS": ROWS}, warps


def wrong(device: torch.device) -> str | None:
    """What of a sweep of 64 columns is wrong on ``device``, in every number of warps, with and without a grid, or None."""
    random = torch.Generator().manual_seed(0)
    upper = torch.randn(64, 64, generator=random).triu(1) / 16 + torch.eye(64)
    columns = torch.randn(64, 40, generator=random)
    for nm in (None, (2, 4), (16, 32), (32, 64)):
        for high in (0, 127):
            single, double = (
                _swept(columns.to(device, dtype, copy=True), upper.to(device, dtype), nm, high, by)
                for dtype, by in ((torch.float32, sweep), (torch.float64, reference))
            )
            error = float((single.double() - double).norm() / double.norm())
            if not error < 0.01:
                pattern = f"{nm[0]}:{nm[1]}" if nm else "a given mask"
                return f"a sweep with {pattern}{' and a grid' if high else ''} is wrong by {error:.2g} of its norm"
    return None


def _swept(columns: Tensor, upper: Tensor, nm: tuple[int, int] | None, high: int, by: Any) -> Tensor:
    """The errors of a sweep, and the columns after it."""
    kept, errors = columns > 0, torch.full_like(columns, float("nan"))
    scale = torch.full_like(columns[0], 0.25)
    rounding = Rounding(scale, torch.zeros_like(columns, dtype=torch.int8), -high, high) if high else None
    by(columns, kept, upper, errors, nm, rounding)
    return torch.cat([errors, columns, kept.to(columns.dtype)])


def launches() -> list[Launch]:
    """A given mask first, then groups of n:m, wide ones too, each without and with a grid."""
    pointers = {"columns": "*fp32", "kept": "*u8", "upper": "*fp32", "errors": "*fp32"}
    numbers = {"count": "i32", "outputs": "i32"}
    grid = {"scale": "*fp32", "codes": "*i8"}
    found = []
    for n, m in ((0, 0), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)):
        for name, low, high in (("", 0, 0), (" int8", -127, 127), (" int4", -8, 7)):
            constants, warps = _constants((n, m), low, high)
            signature = pointers | numbers | (grid if high else {})
            given = constants | ({} if high else dict.fromkeys(grid))
            title = (f"{n}:{m}" if m else "mask") + name
            found.append(Launch(title, _sweep, signature, given, warps, aligned=tuple(signature)))
    return found
