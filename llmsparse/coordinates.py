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

    def target(self, weight: Tensor) -> Tensor:
        """The scaled ``weight`` (out, in), zero where it meets no input."""
        return (weight.to(self.gram) * self.norms).masked_fill(self.dead, 0.0)

    def inverse(self, penalty: float) -> Tensor:
        """(gram + penalty)^-1, by Cholesky; the weights that share a Gram share it."""
        if penalty not in self.inverses:
            while self.inverses and (len(self.inverses) + 1) * self.gram.nbytes > KEPT:
                del self.inverses[next(iter(self.inverses))]
            self.inverses[penalty] = torch.cholesky_inverse(self._factor(penalty))
        return self.inverses[penalty]

    def divide(self, rows: Tensor, penalty: float, out: Tensor) -> Tensor:
        """``rows`` (out, in) times (gram + penalty)^-1, into ``out``.

        Few rows, for which no other weight has made the inverse, are solved with the factor: the inverse would cost more.
        """
        if penalty in self.inverses or 2 * len(rows) > len(self.gram):
            return torch.mm(rows, self.inverse(penalty), out=out)
        return out.copy_(torch.cholesky_solve(rows.T, self._factor(penalty)).T)

    def _factor(self, penalty: float) -> Tensor:
        """The lower Cholesky factor of gram + penalty."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(penalty)
        return torch.linalg.cholesky(shifted)


def scaled(statistics: Gram, damping: float) -> Scaled:
    """The problem of ``statistics`` in scaled coordinates, remembered with them."""

    def make() -> Scaled:
        gram, used, dead = statistics.damped(damping)
        norms = gram.diagonal().sqrt()
        return Scaled(gram / norms / norms[:, None], norms, used, dead, {})

    return statistics.remember(("scaled", damping), make)
