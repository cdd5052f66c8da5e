"""ADMM: a mask that grows over twenty splitting steps, each with a least squares weight update (Boža, arXiv 2401.02938)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.coordinates import scaled
from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Pattern, keep_largest
from llmsparse.solution import Needs, Solution
from llmsparse.solvers.sparsegpt import rounded
from llmsparse.statistics import Gram

PENALTY = 1.0  # beside the unit diagonal of the scaled Gram


@dataclass(frozen=True)
class Admm:
    """``iterations`` of Z = V + U in the mask, U += V - Z, V = (G + 1)^-1 (G W + Z - U); ``choosing`` of them choose it.

    Meanwhile the share of the weights to be pruned that is still kept falls as (1 - t / choosing)^3, those of the
    largest |V + U|. ``ridge`` is added to the unit diagonal of the scaled Gram, as published; ``damping`` to the Gram
    itself before, as in the other solvers.
    """

    iterations: int = 20
    choosing: int = 15
    ridge: float = 0.1
    damping: float = 0.01
    statistics: ClassVar[type[Gram]] = Gram
    needs: ClassVar[Needs] = Needs(products=22, weights=7, squares=6, inverses=1)

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(f"admm's damping must be positive; {self.damping} was given, its default is 0.01")
        if not self.ridge >= 0:
            raise UserError(f"admm's ridge must be 0 or more; {self.ridge} was given, its default is 0.1")
        if not 1 <= self.choosing <= self.iterations:
            raise UserError(
                f"admm's choosing must lie between 1 and its iterations, {self.iterations}; {self.choosing} was given"
            )

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs."""
        problem = scaled(statistics, self.damping)
        target = problem.target(weight)
        wanted = target @ problem.gram + self.ridge * target
        inverse = problem.inverse(PENALTY + self.ridge)
        free, dual = target, torch.zeros_like(target)
        mask = torch.ones_like(target, dtype=torch.bool)
        for iteration in range(1, self.iterations + 1):
            pulled = free + dual
            if iteration <= self.choosing:
                mask = _mask(pattern, pulled.abs(), (1 - iteration / self.choosing) ** 3)
            sparse = torch.where(mask, pulled, 0.0)
            dual = pulled - sparse
            free = (wanted + PENALTY * (sparse - dual)) @ inverse
        found = torch.where(mask, free + dual, 0.0) / problem.norms
        solution = Solution(found.to(weight.dtype), mask, notes={"damping": problem.damping})
        return rounded(solution, statistics, grid, self.damping)


def _mask(pattern: Pattern, score: Tensor, left: float) -> Tensor:
    """What ``pattern`` keeps of ``score`` (out, in), and of what it prunes the largest share ``left``."""
    kept = pattern.select(score)
    rest = round(left * int((~kept).count_nonzero()))
    if not rest:
        return kept
    return kept | keep_largest(score.masked_fill(kept, -1.0).view(1, -1), rest).view_as(kept)


solver = Admm
