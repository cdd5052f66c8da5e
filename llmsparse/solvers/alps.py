"""ALPS: operator splitting with the support inside, then conjugate gradients on it (Meng et al., arXiv 2406.07831)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsparse.coordinates import Scaled, scaled
from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Pattern
from llmsparse.solution import Needs, Solution
from llmsparse.solvers.refit import refit
from llmsparse.solvers.sparsegpt import rounded
from llmsparse.statistics import Gram

LADDER = 1.1  # penalties are its powers, so that weights that share a Gram meet the same ones
RUNGS = ((0.1, 3), (0.005, 2), (0.0, 1))  # the support moved by more than this share: so many rungs up
PATIENCE = 5  # comparisons before a support that never moved counts as settled


@dataclass(frozen=True)
class Alps:
    """Minimise tr((W-B) G (W-B)T) with B = D and D in the pattern, the penalty rising until D's support stays.

    Every ``every`` iterations the support is compared; it has settled when less than ``still`` of it moved.
    """

    damping: float = 0.01
    penalty: float = 0.1
    iterations: int = 300
    every: int = 1
    still: float = 0.01
    steps: int = 10
    statistics: ClassVar[type[Gram]] = Gram
    needs: ClassVar[Needs] = Needs(products=40, weights=9, squares=6, inverses=12)

    def __post_init__(self) -> None:
        for name in ("damping", "penalty"):
            if not getattr(self, name) > 0:
                raise UserError(f"alps' {name} must be positive; {getattr(self, name)} was given")
        for name in ("iterations", "every", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"alps' {name} must be at least 1; {getattr(self, name)} was given")

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs."""
        problem = scaled(statistics, self.damping)
        target = problem.target(weight)
        found, mask, iterations = self._split(target, problem, pattern)
        found = refit(target, found, mask, problem.gram, self.steps) / problem.norms
        notes = {"damping": problem.damping, "iterations": iterations}
        found = torch.where(mask, found, 0.0).to(weight.dtype)
        return rounded(Solution(found, mask, notes=notes), statistics, grid, self.damping)

    def _split(self, target: Tensor, problem: Scaled, pattern: Pattern) -> tuple[Tensor, Tensor, int]:
        """The iteration: B, the mask of D, and how many there were."""
        wanted = target @ problem.gram
        rung = moves = 0
        mask = before = pattern.select(target.abs())
        sparse, dual = torch.where(mask, target, 0.0), torch.zeros_like(target)
        free, pulled = torch.empty_like(target), torch.empty_like(target)
        for iteration in range(1, self.iterations + 1):  # tensors are written over, see refit
            penalty = self.penalty * LADDER**rung
            torch.add(wanted, sparse, alpha=penalty, out=pulled).sub_(dual)
            problem.divide(pulled, penalty, out=free)
            torch.add(free, dual, alpha=1 / penalty, out=pulled)
            mask = pattern.select(pulled.abs())
            torch.mul(pulled, mask, out=sparse)
            dual.add_(free, alpha=penalty).sub_(sparse, alpha=penalty)
            if iteration % self.every == 0:
                moved = int((mask ^ before).count_nonzero()) / 2 / max(int(mask.count_nonzero()), 1)
                moves += moved > self.still
                # the first iterations may not move a support that is far from settled
                if moved <= self.still and (moves or iteration >= PATIENCE * self.every):
                    return free, mask, iteration
                rung += next((up for share, up in RUNGS if moved > share), 0)
                before = mask
        return free, mask, self.iterations


solver = Alps
