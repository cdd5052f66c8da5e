"""One layer to solve: correlated inputs with outlier channels, and the error that a solver leaves."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse import plugins
from llmsparse.pattern import NM, Unstructured
from llmsparse.solution import Solution
from llmsparse.statistics import Gram, SquaredNorm


class Layer(NamedTuple):
    """``weight`` (out, in) and calibration ``inputs`` (tokens, in), both float64."""

    weight: Tensor
    inputs: Tensor

    @property
    def gram(self) -> Tensor:
        """The mean of x xT, (in, in), by its definition."""
        return self.inputs.T @ self.inputs / len(self.inputs)

    def error(self, pruned: Tensor) -> float:
        """tr((W-P) G (W-P)T) / tr(W G WT)."""
        return float(self._energy(self.weight - pruned.double()) / self._energy(self.weight))

    def _energy(self, weight: Tensor) -> Tensor:
        return (weight @ self.gram * weight).sum()


def layer(outputs: int, inputs: int, tokens: int = 0, seed: int = 0) -> Layer:
    """A random layer whose inputs are correlated and whose channels differ in scale, a few by 10 times."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mixing = torch.eye(inputs, dtype=torch.float64) + normal(inputs, inputs) / inputs**0.5
    scale = torch.exp(0.5 * normal(inputs))
    scale[torch.randperm(inputs, generator=random)[: max(inputs // 32, 1)]] *= 10
    return Layer(normal(outputs, inputs) / inputs**0.5, normal(tokens or 4 * inputs, inputs) @ mixing * scale)


def solve(
    name: str, weight: Tensor, inputs: Tensor, pattern: Unstructured | NM, **options: float | int
) -> Solution:
    """Run the plug-in ``name`` on ``weight`` (out, in); ``inputs`` (tokens, in) set the statistics' dtype."""
    solver = plugins.load("solvers", name).solver(**options)
    statistics: Gram | SquaredNorm | None = None
    if solver.statistics is Gram:
        statistics = Gram.zeros(inputs.shape[1], dtype=inputs.dtype)
    elif solver.statistics is SquaredNorm:
        statistics = SquaredNorm(torch.zeros(inputs.shape[1], dtype=inputs.dtype))
    if statistics is not None:
        statistics.update(inputs)
    return solver(weight, statistics, pattern)
