"""SparseGPT: optimal brain surgeon, column by column (Frantar & Alistarh, arXiv 2301.00774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.pattern import Pattern, Unstructured, keep_largest
from llmsparse.solution import Solution
from llmsparse.statistics import Gram

INNER = 32  # columns swept one by one before their errors reach the rest of the chunk as a matrix product


@dataclass(frozen=True)
class SparseGPT:
    """Prune columns left to right; each column's error is absorbed by the columns after it.

    Scores are w^2 / U_jj^2 with U the upper Cholesky factor of the inverse Gram. Unstructured masks are
    chosen chunk by chunk (rows compared together by default), n:m masks group by group as the sweep arrives.
    """

    damping: float = 0.01
    chunk: int = 128
    statistics: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(
                f"sparsegpt's damping must be positive; {self.damping} was given, its default is 0.01"
            )
        if self.chunk < 1:
            raise UserError(
                f"sparsegpt's chunk must be at least 1 column; {self.chunk} was given, its default is 128"
            )

    def __call__(self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: None = None) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs."""
        upper, damping, dead = statistics.factor(self.damping)
        upper = upper.to(weight.device)
        columns = weight.T.to(
            upper.dtype, copy=True
        ).contiguous()  # (in, out): a column of the weight is a row here
        columns[dead] = 0.0
        kept = torch.empty_like(columns, dtype=torch.bool)
        step = max(self.chunk // pattern.width, 1) * pattern.width if pattern.width else self.chunk
        budgets = _budgets(pattern, columns, upper, step)
        for start in range(0, len(columns), step):
            end = min(start + step, len(columns))
            choose = _chooser(pattern, budgets, start // step)
            errors = _sweep(
                columns[start:end], kept[start:end], upper[start:end, start:end], pattern.width, choose
            )
            columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        solved = torch.where(kept, columns, 0.0).T.to(weight.dtype)
        return Solution(solved, kept.T.contiguous(), notes={"damping": damping})


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


def _chooser(pattern: Pattern, budgets, chunk: int):  # noqa: ANN001, ANN202
    """The function from scores (out, columns) to a mask of what is kept there."""
    if budgets is None:
        return pattern.select

    def choose(scores: Tensor) -> Tensor:
        if pattern.scope == "row":  # type: ignore[attr-defined]
            return keep_largest(scores, scores.shape[1] - budgets[chunk])
        return keep_largest(scores.reshape(1, -1), scores.numel() - budgets[chunk]).view_as(scores)

    return choose


def _sweep(columns: Tensor, kept: Tensor, upper: Tensor, width: int | None, choose) -> Tensor:  # noqa: ANN001
    """Fill ``kept`` (chunk, out) and update ``columns`` (chunk, out) where kept, with ``upper`` (chunk, chunk).

    Returns the errors (chunk, out); what is pruned keeps the value that it lost.
    """
    diagonal = upper.diagonal()[:, None]  # (chunk, 1)
    errors = torch.zeros_like(columns)
    # views, made once: indexing costs as much as the products
    row, lost, factor = columns.unbind(), errors.unbind(), upper.unbind()
    if width is None:
        kept.copy_(choose((columns.square() / diagonal.square()).T.contiguous()).T)
    inner = max(INNER // width, 1) * width if width else INNER
    for start in range(0, len(columns), inner):
        end = min(start + inner, len(columns))
        for group in range(start, end, width or inner):
            stop = min(group + (width or inner), end)
            if width:
                scores = columns[group:stop].square() / diagonal[group:stop].square()
                kept[group:stop] = choose(scores.T.contiguous()).T
            scale = (~kept[group:stop]).to(columns.dtype) / diagonal[
                group:stop
            ]  # 1/U_jj where pruned, else 0
            for j in range(group, stop):
                error = torch.mul(row[j], scale[j - group], out=lost[j])
                columns[j + 1 : end].addr_(factor[j][j + 1 : end], error, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
    return errors


solver = SparseGPT
