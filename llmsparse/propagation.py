"""Error propagation: a weight that makes of the pruned model's inputs what it should make of the dense model's."""

import torch
from torch import Tensor

from llmsparse.statistics import Gram


def aimed(weight: Tensor, statistics: Gram, damping: float) -> Tensor:
    """The V (out, in) with the least |W D - V X|^2 + damping |V - W|^2: D are the dense model's inputs, X the pruned one's.

    V = W + W (D XT - X XT) (X XT + damping)^-1, the asymmetric calibration of GPTAQ (arXiv 2504.02692). What any solver
    then makes of V corrects the damage done before it. The weight itself where the statistics do not know D.
    """
    if statistics.cross is None:
        return weight
    upper, _, _ = statistics.factor(damping)
    drift = statistics.cross / max(statistics.tokens, 1) - statistics.matrix  # (in, in)
    return torch.addmm(weight, (weight @ drift) @ upper.T, upper)
