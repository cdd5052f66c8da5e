"""Refit: the kept weights of any mask, solved again (masked preconditioned conjugate gradients, as in arXiv 2406.07831)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Pattern
from llmsparse.solution import Needs, Solution
from llmsparse.solvers.sparsegpt import SparseGPT, rounded
from llmsparse.statistics import Gram, narrowed


@dataclass(frozen=True)
class Refit:
    """Take the mask and the weights of ``inner``, and move the kept weights towards the least squares solution.

    ``steps`` of conjugate gradients lower tr((W-X) (G + damping) (W-X)T) over all X with that mask, every row by itself.
    """

    inner: Any = field(default_factory=SparseGPT)
    steps: int = 10
    damping: float = 0.01
    statistics: ClassVar[type[Gram]] = Gram
    needs: ClassVar[Needs] = Needs(products=11, weights=8, squares=2)

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(
                f"refit's damping must be positive; {self.damping} was given, its default is 0.01"
            )
        if self.steps < 1:
            raise UserError(f"refit's steps must be at least 1; {self.steps} was given, its default is 10")

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs; with ``grid`` what is refitted is rounded."""
        begun = self.inner(weight, narrowed(statistics, self.inner.statistics), pattern)
        gram, damping, _ = statistics.damped(self.damping)
        found = refit(weight.to(gram), begun.weight.to(gram), begun.mask, gram, self.steps)
        notes = {**begun.notes, "damping": damping}
        return rounded(
            Solution(found.to(weight.dtype), begun.mask, notes=notes), statistics, grid, self.damping
        )


def refit(weight: Tensor, start: Tensor, mask: Tensor, gram: Tensor, steps: int) -> Tensor:
    """From ``start`` towards the X with zeros outside ``mask`` that has the least tr((W-X) G (W-X)T).

    All (out, in), ``gram`` (in, in) positive definite. Conjugate gradients with the diagonal as preconditioner; rows
    are problems of their own, so each has its own step lengths. No step raises a row's error but by rounding.
    """
    diagonal, kept = gram.diagonal(), mask.to(gram)
    found = torch.where(mask, start, 0.0)
    residual = ((weight - found) @ gram).mul_(kept)
    ahead = residual / diagonal
    direction, power = ahead.clone(), (residual * ahead).sum(1, keepdim=True)
    curved, product = torch.empty_like(residual), torch.empty_like(residual)
    for _ in range(steps):  # written over: on a CPU new tensors would take as long as the products
        torch.mm(direction, gram, out=curved).mul_(kept)
        length = _quotient(power, torch.mul(direction, curved, out=product).sum(1, keepdim=True))
        found.addcmul_(direction, length)
        residual.addcmul_(curved, length, value=-1)
        torch.div(residual, diagonal, out=ahead)
        before, power = power, torch.mul(residual, ahead, out=product).sum(1, keepdim=True)
        direction.mul_(_quotient(power, before)).add_(ahead)
    return found


def _quotient(over: Tensor, under: Tensor) -> Tensor:
    """``over`` / ``under``, zero where a row has converged."""
    return torch.where(under > 0, over / under, 0.0)


solver = Refit
