"""Which groups of a weight's inputs can go, and how the weight does without them.

A weight (out, in) reads ``groups`` groups of consecutive inputs: single MLP channels, or the heads of one key and value.
SlimGPT (arXiv 2412.18110), FLAP (arXiv 2312.11983).
"""

import torch
from torch import Tensor


def fluctuation(weight: Tensor, variance: Tensor, groups: int) -> Tensor:
    """What each group's departure from its mean puts out, (groups,): the variance of each input (in,) times |W_:,j|^2."""
    return (variance * weight.square().sum(0)).view(groups, -1).sum(1)


def largest(score: Tensor, kept: int) -> Tensor:
    """The groups with the ``kept`` largest scores, ascending; ties by lowest index."""
    return score.sort(descending=True, stable=True).indices[:kept].sort().values


def least_error(weight: Tensor, inverse: Tensor, groups: int, kept: int, batch: int = 1) -> Tensor:
    """The ``kept`` groups, ascending, that are left when the one whose removal costs least goes, again and again.

    ``inverse`` (in, in) is that of the damped Gram. Removing group g, with the others solved again, costs
    tr(W_g (inverse_gg)^-1 W_gT), and leaves W - W_g (inverse_gg)^-1 inverse_g: and inverse - inverse_:g (inverse_gg)^-1
    inverse_g:. ``batch`` groups go between two updates: within a batch, what one group could take over for another is not
    seen, so that 1 is the exact greedy order.
    """
    weight, inverse = weight.clone(), inverse.clone()
    unit = weight.shape[1] // groups
    inputs = torch.arange(groups * unit, device=weight.device).view(groups, unit)
    gone = torch.zeros(groups, dtype=torch.bool, device=weight.device)
    while (left := groups - kept - int(gone.sum())) > 0:
        cost = _costs(weight, inverse, groups).masked_fill(gone, torch.inf)
        chosen = cost.sort(stable=True).indices[: min(batch, left)]
        gone[chosen] = True
        columns = inputs[chosen].flatten()
        gain = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (removed, in)
        weight -= weight[:, columns] @ gain
        inverse -= inverse[:, columns] @ gain
        weight[:, columns] = 0.0
        inverse[columns] = inverse[:, columns] = 0.0
        inverse[columns, columns] = 1.0
    return (~gone).nonzero().flatten()


def _costs(weight: Tensor, inverse: Tensor, groups: int) -> Tensor:
    """tr(W_g (inverse_gg)^-1 W_gT) of each group, (groups,)."""
    unit = weight.shape[1] // groups
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = inverse.view(groups, unit, groups, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.T.reshape(groups, unit, -1)  # (groups, unit, out)
    return (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))


def refit(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """The X (out, kept) with the least tr((W-XS) G (W-XS)T), S the choice of the ``kept`` inputs, G (in, in) damped.

    X = W_K + W_R G_RK G_KK^-1 with R the inputs that go: what they put out alone is solved, kept inputs lose nothing.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    target = weight[:, removed] @ gram[removed][:, kept]  # (out, kept)
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    return weight[:, kept] + torch.cholesky_solve(target.T, factor).T
