"""Wanda: weights times the norm of their inputs, compared per output row (Sun et al., arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.grid import Grid
from llmsparse.pattern import Existing, Pattern, Unstructured
from llmsparse.solution import Solution, masked
from llmsparse.statistics import SquaredNorm


@dataclass(frozen=True)
class Wanda:
    """Keep the largest |w_ij| * ||x_j||; an unstructured pattern is compared per output row."""

    statistics: ClassVar[type[SquaredNorm]] = SquaredNorm

    def __call__(
        self, weight: Tensor, statistics: SquaredNorm, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the mean squares of its inputs (in,)."""
        if isinstance(pattern, Unstructured):
            pattern = pattern.scoped("row")
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        if isinstance(pattern, Existing):  # what is zero already, not what meets no input
            return masked(weight, pattern.select(magnitude), grid)
        mask = pattern.select(magnitude * statistics.value.sqrt().to(magnitude))
        return masked(weight, mask, grid)


solver = Wanda
