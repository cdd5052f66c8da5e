"""A layer's problem with every input scaled to unit variance: |V| are then Wanda's scores, and one penalty fits all."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.statistics import Gram

KEPT = 1 << 30  # bytes of inverses that a Gram remembers


class Scaled(NamedTuple):
    """``gram`` (in, in) damped and with unit diagonal; ``norms`` and ``dead`` (in,): see ``target``."""

    gram: Tensor
    norms: Tensor
    damping: float
    dead: Tensor
    inverses: dict[float, Tensor]
    factors: dict[float, Tensor]  # the latest

    def target(self, weight: Tensor) -> Tensor:
        """The scaled ``weight`` (out, in), zero where it meets no input."""
        return (weight.to(self.gram) * self.norms).masked_fill(self.dead, 0.0)

    def inverse(self, penalty: float) -> Tensor:
        """(gram + penalty)^-1, by Cholesky; the weights that share a Gram share it."""
        if penalty not in self.inverses:
            while self.inverses and (len(self.inverses) + 1) * self.gram.nbytes > KEPT:
                del self.inverses[next(iter(self.inverses))]
            self.inverses[penalty] = torch.cholesky_inverse(self._factored(penalty))
        return self.inverses[penalty]

    def divide(self, rows: Tensor, penalty: float, out: Tensor) -> Tensor:
        """``rows`` (out, in) times (gram + penalty)^-1, into ``out``.

        Where rows are few and no other weight left the inverse, the factor solves them: inverting would cost more.
        """
        if penalty in self.inverses or 2 * len(rows) > len(self.gram):
            return torch.mm(rows, self.inverse(penalty), out=out)
        if penalty not in self.factors:
            self.factors.clear()
            self.factors[penalty] = self._factored(penalty)
        return out.copy_(torch.cholesky_solve(rows.T, self.factors[penalty]).T)

    def _factored(self, penalty: float) -> Tensor:
        """The lower Cholesky factor of gram + penalty."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(penalty)
        return torch.linalg.cholesky(shifted)


def scaled(statistics: Gram, damping: float) -> Scaled:
    """The problem of ``statistics`` in scaled coordinates, remembered with them."""

    def make() -> Scaled:
        gram, used, dead = statistics.damped(damping)
        norms = gram.diagonal().sqrt()
        return Scaled(gram / norms / norms[:, None], norms, used, dead, {}, {})

    return statistics.remember(("scaled", damping), make)
