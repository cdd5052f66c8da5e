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
            shifted = self.gram.clone()
            shifted.diagonal().add_(penalty)
            self.inverses[penalty] = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        return self.inverses[penalty]


def scaled(statistics: Gram, damping: float) -> Scaled:
    """The problem of ``statistics`` in scaled coordinates, remembered with them."""

    def make() -> Scaled:
        gram, used, dead = statistics.damped(damping)
        norms = gram.diagonal().sqrt()
        return Scaled(gram / norms / norms[:, None], norms, used, dead, {})

    return statistics.remember(("scaled", damping), make)
