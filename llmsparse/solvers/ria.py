"""RIA: weights relative to their row and column, times their inputs' norms (Zhang et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Existing, Pattern, Unstructured
from llmsparse.solution import Solution, masked
from llmsparse.statistics import SquaredNorm


@dataclass(frozen=True)
class Ria:
    """Keep the largest (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^power, compared over the whole layer."""

    power: float = 0.5
    statistics: ClassVar[type[SquaredNorm]] = SquaredNorm

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise UserError(f"ria's power must be 0 or more; {self.power} was given, its default is 0.5")

    def __call__(
        self, weight: Tensor, statistics: SquaredNorm, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the mean squares of its inputs (in,)."""
        if isinstance(pattern, Unstructured):
            pattern = pattern.scoped("layer")
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        if isinstance(pattern, Existing):  # what is zero already, not what meets no input
            return masked(weight, pattern.select(magnitude), grid)
        share = sum((magnitude / magnitude.sum(side, keepdim=True)).nan_to_num(0.0) for side in (0, 1))
        return masked(weight, pattern.select(share * statistics.value.pow(self.power / 2).to(share)), grid)


solver = Ria
