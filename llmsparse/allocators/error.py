"""Error: each weight's curve of relative error, times what its block adds; the same marginal damage everywhere.

The saliencies are those of OBS (arXiv 2301.00774).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsparse.allocation import Choice, Divided, Levels, Memory, Target, check_positive
from llmsparse.dense_model import DenseModel
from llmsparse.pattern import NM, Pattern
from llmsparse.skeleton import Weight
from llmsparse.statistics import Gram, SquaredNorm

PANEL = 1 << 22  # scores that are summed in float64 at a time
TINY = 1e-300


@dataclass(frozen=True)
class Error:
    """Options: no weight's sparsity is further than ``bound`` from what was asked (in n:m n moves by one at least).

    ``damping`` is that of the Gram matrix; ``windows`` of calibration text are looked at.
    """

    bound: float = 0.1
    damping: float = 0.01
    windows: int = 16

    def __post_init__(self) -> None:
        check_positive("error", self, "bound", "damping", "windows")

    def __call__(self, dense: DenseModel, target: Target, memory: Memory) -> dict[str, Pattern]:
        """The patterns with the least sum over the weights of relative errors, as the curves tell them.

        Each counts as much as its block adds to the hidden states (``llmsparse.dense_model.moved``).
        """
        levels = target.levels(self.bound)
        return target.chosen(levels, self.choose(dense, target, levels))

    def choose(
        self, dense: DenseModel, target: Target, levels: dict[str, Levels],
        also: Callable[[Weight, Any, Tensor], None] = lambda weight, statistics, importance: None,
    ) -> dict[str, Choice]:  # fmt: skip
        """The same as choices among ``levels``; ``also`` is shown each weight's statistics and ``importance``."""
        damage: dict[str, np.ndarray] = {}

        def visit(weight: Weight, matrix: Tensor, statistics: Any) -> None:
            each = levels[weight.name]
            priced = importance(statistics, weight.in_features, self.damping).to(matrix)
            scores = matrix.square() * priced
            lost = steps(scores, each.pattern, by_rows(each.pattern, statistics))
            whole = whole_of(matrix, scores, statistics)
            damage[weight.name] = np.concatenate(([0.0], lost.cumsum()))[each.parts] / max(whole, TINY)
            also(weight, statistics, priced)

        shares = dense.observe(dense.solver_kinds(list(target.weights)), self.windows, visit)
        damage = {name: shares[target.weights[name].block] * curve for name, curve in damage.items()}
        return target.divide(levels, damage)


def importance(statistics: Any, inputs: int, damping: float) -> Tensor:
    """What the square of a weight of each input costs when it is pruned, (in,).

    Of a Gram matrix 1 / U_jj^2 as in SparseGPT, whose later columns make up for what they can; of norms alone the mean
    square of the input; one where no token came.
    """
    if statistics is None or statistics.tokens == 0:
        return torch.ones(inputs)
    if isinstance(statistics, SquaredNorm):
        return statistics.value
    upper, _, dead = statistics.factor(damping)
    return (upper.diagonal() ** -2).masked_fill(dead, 0.0)


def by_rows(pattern: Divided, statistics: Any) -> bool:
    """Whether every row is pruned alike: as asked, else as solvers do that know the norms alone."""
    scope = getattr(pattern, "scope", None)
    return scope == "row" or (scope is None and not isinstance(statistics, Gram))


def steps(scores: Tensor, pattern: Divided, rows: bool) -> np.ndarray:
    """The sum of ``scores`` (out, in) that each further part loses, (parts,) float64, never falling.

    The least scores go first: of each group of m, of each row, or of the whole weight, as many as it has rows a part.
    """
    if isinstance(pattern, NM):
        table = _sorted(scores.reshape(-1, pattern.m))
    elif rows:
        table = _sorted(scores)
    else:
        table = _sorted(scores.reshape(-1)).reshape(scores.shape[1], scores.shape[0]).T
    total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for panel in table.split(max(1, PANEL // table.shape[1])):
        total += panel.double().sum(0)
    return total.cpu().numpy()


def _sorted(scores: Tensor) -> Tensor:
    """The last dimension from small to large."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))  # no indices, eight bytes each
    return scores.sort(dim=-1).values


def whole_of(matrix: Tensor, scores: Tensor, statistics: Any) -> float:
    """tr(W G WT), what errors are relative to."""
    if isinstance(statistics, Gram) and statistics.tokens:
        return float(((matrix @ statistics.matrix.to(matrix)) * matrix).sum(dtype=torch.float64))
    return float(scores.sum(dtype=torch.float64))


allocator = Error
