"""Magnitude pruning: keep the largest weights, no data (Han et al., arXiv 1506.02626)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmsparse.grid import Grid
from llmsparse.pattern import Pattern, Unstructured
from llmsparse.solution import Solution, masked


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest |w|; an unstructured pattern is compared over the whole layer."""

    statistics: ClassVar[None] = None

    def __call__(
        self, weight: Tensor, statistics: None, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in); ``statistics`` is not used."""
        if isinstance(pattern, Unstructured):
            pattern = pattern.scoped("layer")
        mask = pattern.select(weight.abs())
        return masked(weight, mask, grid)


solver = Magnitude
