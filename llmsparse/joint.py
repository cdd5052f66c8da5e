"""Rounding to a grid inside a column sweep: SparseGPT's joint sparsification and quantisation (arXiv 2301.00774, 3.5)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmsparse.grid import Grid
from llmsparse.solution import Solution


class Joint:
    """The codes and scales of a weight while its columns are swept; a column of the weight is a row here.

    With ``scales`` (out, groups) they are given; else a group's scales are fitted when the sweep arrives there, on
    what earlier errors have made of its columns, each weighed by what its error costs, ``importance`` (in,).
    """

    def __init__(self, grid: Grid, shape: torch.Size, importance: Tensor, scales: Tensor | None) -> None:
        inputs, outputs = shape
        self.grid, self.importance = grid, importance
        self.fitted = scales is None
        self.codes = torch.zeros(inputs, outputs, dtype=torch.int8, device=importance.device)
        count = grid.groups(inputs)
        self.scales = importance.new_zeros(count, outputs) if scales is None else scales.to(importance).T
        self.width = grid.group or inputs  # inputs that share a scale
        self._first = 0

    def begin(self, first: int) -> "Joint":
        """A chunk of columns begins; the other methods count from its ``first`` column."""
        self._first = first
        return self

    def starts_group(self, column: int) -> bool:
        """Whether a group whose scales are to be fitted begins at ``column``."""
        return self.fitted and column % self.width == 0

    def fit(
        self, column: int, columns: Tensor, kept: Tensor, launch: Callable[..., Tensor] | None = None
    ) -> None:
        """Fit the scales of the group that begins at ``column`` to its ``columns`` (group, out).

        ``launch`` does the same as the grid's own fit in one launch, given what the grid tries and its range.
        """
        first = self._first + column
        importance = self.importance[first : first + len(columns)]
        if launch is not None:
            fitted = launch(columns, kept, importance, (self.grid.tried, *self.grid.range))
        else:
            fitted = self.grid.fit(columns.T.contiguous(), kept.T, importance)[:, 0]
        self.scales[first // self.width] = fitted

    def round(self, column: int, values: Tensor, kept: Tensor) -> Tensor:
        """The grid's nearest numbers to ``values`` (out,) where ``kept``, else zero; their codes are remembered."""
        scale = self.scales[(self._first + column) // self.width]
        codes = (values / scale).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*self.grid.range).mul_(kept)
        self.codes[self._first + column] = codes
        return codes.mul_(scale)

    def given(self, columns: slice) -> tuple[Tensor, Tensor, int, int]:
        """The scale (out,) that ``columns`` share, their codes (columns, out) to be filled, smallest and largest code."""
        first = self._first + columns.start
        codes = self.codes[first : self._first + columns.stop]
        return self.scales[first // self.width].contiguous(), codes, *self.grid.range

    def solution(self, mask: Tensor, dtype: torch.dtype, notes: dict[str, Any]) -> Solution:
        """What the sweep found, the weight in ``dtype``; ``mask`` (out, in)."""
        codes, scales = self.codes.T.contiguous(), self.scales.T.contiguous()
        return Solution(self.grid.values(codes, scales).to(dtype), mask, codes, scales, notes)
