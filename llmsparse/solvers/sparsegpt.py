"""SparseGPT: optimal brain surgeon, column by column (Frantar & Alistarh, arXiv 2301.00774)."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.joint import Joint
from llmsparse.pattern import NM, Existing, Fixed, Pattern, Unstructured, keep_largest
from llmsparse.solution import Solution
from llmsparse.statistics import Gram

INNER = 32  # columns swept one by one before their errors reach the rest of the chunk as a matrix product
LAUNCHED = ("cuda",)  # devices on which a kernel sweeps many columns at once
WIDEST = 128  # group of n:m, or of a grid, that the kernels hold
LOG = logging.getLogger("llmsparse")


class Kernels(NamedTuple):
    """``sweep`` (columns, kept, upper, errors, Joint.given) for many columns, ``fit`` for Joint.fit: one launch each."""

    sweep: Callable[..., None]
    fit: Callable[..., Tensor]


@dataclass(frozen=True)
class SparseGPT:
    """Prune columns left to right; each column's error is absorbed by the columns after it.

    Scores are w^2 / U_jj^2 with U the upper Cholesky factor of the inverse Gram. Unstructured masks are
    chosen chunk by chunk (rows compared together by default), n:m masks group by group as the sweep arrives.
    ``first_token``: how often each window's first token counts for queries, keys and values; ``None`` is once, as
    published, and with a grid half of the window's length, about as often as others attend to it.
    """

    damping: float = 0.01
    chunk: int = 128
    first_token: float | None = None
    statistics: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(
                f"sparsegpt's damping must be positive; {self.damping} was given, its default is 0.01"
            )
        if self.first_token is not None and not 0 < self.first_token < float("inf"):
            raise UserError(f"sparsegpt's first_token must be positive; {self.first_token} was given")
        if self.chunk < 1:
            raise UserError(
                f"sparsegpt's chunk must be at least 1 column; {self.chunk} was given, its default is 128"
            )

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs; with ``grid`` round each column as well.

        Then the error that later columns absorb is that of both. A scale for whole rows is fitted to what the
        sweep without rounding gives, and that sweep's mask is kept.
        """
        known = pattern.select(weight.abs()) if isinstance(pattern, Existing | Fixed) else None
        scales = None
        if grid is not None and grid.group is None:
            alone = self(weight, statistics, pattern)
            known = alone.mask
            scales = grid.fit(alone.weight.to(torch.promote_types(weight.dtype, torch.float32)), known)
        upper, damping, dead = statistics.factor(self.damping)
        upper = upper.to(weight.device)
        columns = weight.T.to(
            upper.dtype, copy=True
        ).contiguous()  # (in, out): a column of the weight is a row here
        columns[dead] = 0.0
        kept = torch.empty_like(columns, dtype=torch.bool)
        joint = Joint(grid, columns.shape, upper.diagonal() ** -2, scales) if grid else None
        # chunks begin and end where groups of weights do, of the pattern and of the grid
        unit = math.lcm(pattern.width or 1, (grid.group or 1) if grid else 1)
        step = max(self.chunk // unit, 1) * unit
        budgets = _budgets(pattern, columns, upper, step)
        kernels = _kernels(columns, pattern if known is None else None, grid)
        for start in range(0, len(columns), step):
            end = min(start + step, len(columns))
            choose = _chooser(pattern, budgets, start // step, None if known is None else known[:, start:end])
            part = upper[start:end, start:end]
            chunk = _Chunk(columns[start:end], kept[start:end], part, choose, unit, kernels)
            errors = chunk.sweep(pattern.width if known is None else None, joint and joint.begin(start))
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        mask, notes = kept.T.contiguous(), {"damping": damping}
        if joint is not None:
            return joint.solution(mask, weight.dtype, notes)
        return Solution(torch.where(kept, columns, 0.0).T.to(weight.dtype), mask, notes=notes)


def rounded(solution: Solution, statistics: Gram, grid: Grid | None, damping: float) -> Solution:
    """``solution`` on the ``grid``, if there is one: a sweep that keeps its mask and rounds (GPTQ, arXiv 2210.17323).

    The sweep starts at the solved weights: where they are least squares, that is where the original ones would lead.
    """
    if grid is None:
        return solution
    swept = SparseGPT(damping)(solution.weight, statistics, Fixed(solution.mask), grid)
    return swept._replace(notes={**solution.notes, **swept.notes})


def _budgets(
    pattern: Pattern, columns: Tensor, upper: Tensor, step: int
) -> list[int] | list[list[int]] | None:
    """How many weights each chunk prunes (in each row with scope ``row``), so that the totals are exact."""
    if not isinstance(pattern, Unstructured):
        return None
    inputs, outputs = columns.shape
    ends = [min(start + step, inputs) for start in range(0, inputs, step)]
    if pattern.scope == "layer":
        scores = columns.square() / upper.diagonal().square()[:, None]  # (in, out), before any update
        pruned = ~pattern.select(scores)
        return [int(pruned[begin:end].sum()) for begin, end in zip([0, *ends], ends, strict=False)]
    per_column = 1 if pattern.scope == "row" else outputs
    totals = [0, *(pattern.pruned(per_column * end) for end in ends)]
    return [after - before for before, after in zip(totals, totals[1:], strict=False)]


def _chooser(pattern: Pattern, budgets, chunk: int, known: Tensor | None):  # noqa: ANN001, ANN202
    """The function from scores (out, columns) to a mask of what is kept there."""
    if known is not None:
        return lambda scores: known
    if budgets is None:
        return pattern.select

    def choose(scores: Tensor) -> Tensor:
        if pattern.scope == "row":  # type: ignore[attr-defined]
            return keep_largest(scores, scores.shape[1] - budgets[chunk])
        return keep_largest(scores.reshape(1, -1), scores.numel() - budgets[chunk]).view_as(scores)

    return choose


def _kernels(columns: Tensor, pattern: Pattern | None, grid: Grid | None) -> Kernels | None:
    """What sweeps ``columns`` in few launches; ``None``, and a line in the log, where that is left to the plain loop.

    ``pattern`` is ``None`` where the mask is known.
    """
    if columns.device.type not in LAUNCHED:
        return None
    reason = _not_launched(columns.dtype, pattern, grid) or _does_not_run(columns.device)
    if reason:
        _say(f"sparsegpt sweeps column by column, slower than its GPU kernel: {reason}")
        return None
    from llmsparse.kernels import grid_fit, obs_sweep

    nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None

    def sweep(columns: Tensor, kept: Tensor, upper: Tensor, errors: Tensor, given: Any) -> None:
        obs_sweep.sweep(columns, kept, upper, errors, nm, given and obs_sweep.Rounding(*given))

    def fit(columns: Tensor, kept: Tensor, importance: Tensor, codes: Any) -> Tensor:
        return grid_fit.fit(columns, kept, importance, grid_fit.Codes(*codes))

    return Kernels(sweep, fit)


def _not_launched(dtype: torch.dtype, pattern: Pattern | None, grid: Grid | None) -> str:
    """Why the kernel is not made for this; empty where it is."""
    if dtype != torch.float32:
        return f"the kernel computes in float32, not in {dtype}"
    if grid is not None and (grid.group or 0) > WIDEST:
        return f"the kernel fits groups of up to {WIDEST}, not {grid}"
    if pattern is None or pattern.width is None:
        return ""
    if type(pattern) is not NM or pattern.m > WIDEST:
        return f"the kernel chooses n:m masks with m up to {WIDEST}, not {pattern}"
    if grid is not None and (grid.group or 0) % pattern.m:
        return f"groups of {pattern} cross those of {grid}"
    return ""


@cache
def _does_not_run(device: torch.device) -> str:
    """Why the kernels cannot run on ``device``, found by trying them; empty where they can."""
    try:
        from llmsparse.kernels import grid_fit, obs_sweep

        return obs_sweep.wrong(device) or grid_fit.wrong(device) or ""
    # no Triton, no C compiler, a GPU that Triton does not know: each fails in its own way
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or ['it says no more'])[0]}"


@cache
def _say(line: str) -> None:
    """Log ``line``, once in this process."""
    LOG.warning(line)


class _Chunk(NamedTuple):
    """Columns swept together: views that ``sweep`` fills and updates."""

    columns: Tensor  # (chunk, out), updated where kept; what is pruned keeps the value that it lost
    kept: Tensor  # (chunk, out), filled
    upper: Tensor  # (chunk, chunk)
    choose: Callable[[Tensor], Tensor]
    unit: int  # inner blocks begin at its multiples
    kernels: Kernels | None = None

    def sweep(self, width: int | None, joint: Joint | None) -> Tensor:
        """Choose, prune and round column by column; returns the errors (chunk, out)."""
        columns, kept, upper = self.columns, self.kept, self.upper
        errors = torch.zeros_like(columns)
        if width is None:
            kept.copy_(self._mask(slice(None)))
        inner = max(INNER // self.unit, 1) * self.unit
        if self.kernels:  # as many columns as share their scales, which are fitted between launches
            inner = joint.width if joint and joint.fitted else len(columns)
        for start in range(0, len(columns), inner):
            end = min(start + inner, len(columns))
            if self.kernels:
                self._inner_launched(slice(start, end), errors, width, joint)
            elif joint:
                self._inner_joint(range(start, end), errors, width, joint)
            else:
                self._inner(range(start, end), errors, width)
            columns[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
        return errors

    def _mask(self, columns: slice) -> Tensor:
        """What is kept of ``columns`` as they are now, (columns, out)."""
        scores = self.columns[columns].square() / self.upper.diagonal()[columns, None].square()
        return self.choose(scores.T.contiguous()).T

    def _ahead(self, columns: slice, width: int) -> Tensor:
        """What will be kept of ``columns`` if they stay as they are now; groups of ``width`` may begin before them."""
        first, last = columns.start // width * width, -(-columns.stop // width) * width
        return self._mask(slice(first, last))[columns.start - first : columns.stop - first]

    def _inner(self, block: range, errors: Tensor, width: int | None) -> None:
        # views, made once: indexing costs as much as the products
        row, lost, factor = self.columns.unbind(), errors.unbind(), self.upper.unbind()
        diagonal = self.upper.diagonal()[:, None]
        for group in block[:: width or len(block)]:
            stop = min(group + (width or len(block)), block.stop)
            if width:
                self.kept[group:stop] = self._mask(slice(group, stop))
            # 1/U_jj where pruned, else 0
            scale = (~self.kept[group:stop]).to(self.columns.dtype) / diagonal[group:stop]
            for j in range(group, stop):
                error = torch.mul(row[j], scale[j - group], out=lost[j])
                self.columns[j + 1 : block.stop].addr_(factor[j][j + 1 : block.stop], error, alpha=-1)

    def _inner_joint(self, block: range, errors: Tensor, width: int | None, joint: Joint) -> None:
        """The same with rounding: the error is that of both. A group's scales are fitted when the sweep arrives."""
        row, lost, factor = self.columns.unbind(), errors.unbind(), self.upper.unbind()
        inverse = self.upper.diagonal().reciprocal()
        for j in block:
            if joint.starts_group(j):
                ahead = slice(j, min(j + joint.width, block.stop))
                joint.fit(j, self.columns[ahead], self._ahead(ahead, width) if width else self.kept[ahead])
            if width and (j - block.start) % width == 0:
                group = slice(j, j + width)
                self.kept[group] = self._mask(group)
            error = torch.sub(row[j], joint.round(j, row[j], self.kept[j]), out=lost[j]).mul_(inverse[j])
            self.columns[j + 1 : block.stop].addr_(factor[j][j + 1 : block.stop], error, alpha=-1)

    def _inner_launched(self, block: slice, errors: Tensor, width: int | None, joint: Joint | None) -> None:
        """The same with one launch for the columns of ``block``, and one for the fit of their scales before it."""
        assert self.kernels is not None
        columns, kept, upper = self.columns[block], self.kept[block], self.upper[block, block]
        if joint and joint.starts_group(block.start):
            ahead = self._ahead(block, width) if width else kept
            joint.fit(block.start, columns, ahead, self.kernels.fit)
        self.kernels.sweep(columns, kept, upper, errors[block], joint and joint.given(block))


solver = SparseGPT
