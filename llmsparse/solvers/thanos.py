"""Thanos: a chunk of columns at a time, a row's pruned weights there removed at once (Ilin et al., arXiv 2504.05346)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Existing, Fixed, Pattern, Unstructured, keep_largest
from llmsparse.solution import Solution
from llmsparse.solvers.sparsegpt import rounded
from llmsparse.statistics import Gram

ELEMENTS = 1 << 24  # of the systems solved together


@dataclass(frozen=True)
class Thanos:
    """Prune ``chunk`` columns, least |w_ij| * ||x_j|| of all that are left, and let every later column make up for it.

    Each row's system is solved for all of its pruned weights in the chunk together: with H the inverse Gram of the
    columns not passed yet, and q the pruned ones, W -= w_q (H_qq)^-1 H_q.
    """

    damping: float = 0.01
    chunk: int = 128
    statistics: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(
                f"thanos' damping must be positive; {self.damping} was given, its default is 0.01"
            )
        if self.chunk < 1:
            raise UserError(
                f"thanos' chunk must be at least 1 column; {self.chunk} was given, its default is 128"
            )

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs."""
        upper, damping, dead = statistics.factor(self.damping)
        norms = statistics.squares.value.sqrt()
        found = weight.to(upper, copy=True)
        found[:, dead] = 0.0
        mask = torch.ones_like(found, dtype=torch.bool)
        step = max(self.chunk // (pattern.width or 1), 1) * (pattern.width or 1)
        for start in range(0, found.shape[1], step):
            columns = slice(start, min(start + step, found.shape[1]))
            mask[:, columns] = _mask(pattern, found, mask, norms, columns)
            part = upper[columns, start:]
            inverse = part[:, : columns.stop - start].T @ part  # the chunk's rows of H
            for rows in _parts(len(found), step):
                _remove(found[rows, start:], ~mask[rows, columns], inverse)
        found = torch.where(mask, found, 0.0).to(weight.dtype)
        return rounded(Solution(found, mask, notes={"damping": damping}), statistics, grid, self.damping)


def _mask(pattern: Pattern, weight: Tensor, kept: Tensor, norms: Tensor, columns: slice) -> Tensor:
    """What is kept of ``columns``; ``kept`` says what was of those before them."""
    if isinstance(pattern, Existing | Fixed):
        return pattern.select(weight.abs())[:, columns]
    score = weight.abs() * norms
    if not isinstance(pattern, Unstructured):
        return pattern.select(score[:, columns])
    rest = score[:, columns.start :]
    width = columns.stop - columns.start
    gone = (~kept[:, : columns.start]).sum(1)
    if pattern.scope == "row":  # rows have lost different numbers so far
        lefts = rest.shape[1] - pattern.pruned(weight.shape[1]) + gone  # (out,)
        places = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (places < lefts[:, None])[:, :width]
    left = rest.numel() - pattern.pruned(weight.numel()) + int(gone.sum())
    return keep_largest(rest.reshape(1, -1), left).view_as(rest)[:, :width]


def _remove(weight: Tensor, pruned: Tensor, inverse: Tensor) -> None:
    """Set ``pruned`` (rows, chunk) of the first columns of ``weight`` (rows, rest) to zero; the others make up for it.

    ``inverse`` (chunk, rest): the chunk's rows of the inverse Gram. What is not pruned is left out of a row's system by
    a unit in its place.
    """
    width = pruned.shape[1]
    both = pruned[:, :, None] & pruned[:, None, :]
    unit = torch.eye(width, dtype=weight.dtype, device=weight.device)
    systems = torch.where(both, inverse[:, :width], unit)
    lost = torch.where(pruned, weight[:, :width], 0.0)
    factors = torch.linalg.cholesky(systems)
    weight -= torch.cholesky_solve(lost[:, :, None], factors)[:, :, 0] @ inverse


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // width**2)
    return (slice(start, start + step) for start in range(0, rows, step))


solver = Thanos
