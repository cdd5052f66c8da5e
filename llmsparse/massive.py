"""Errors of hidden states in which a few tokens and a few channels are massive: neither outweighs the rest."""

from torch import Tensor

TINY = 1e-12  # of a token's squared norm
LEAST = 1e-3  # part in a token's squared norm, times the number of channels, below which channels count alike


def parts(states: Tensor) -> Tensor:
    """Each channel's part in a token's squared norm, (hidden,), the mean over the tokens of ``states`` (..., hidden)."""
    squares = states.float().square().flatten(0, -2)
    return (squares / squares.sum(-1, keepdim=True).clamp(min=TINY)).mean(0)


def weights(share: Tensor, power: float = 1.0) -> Tensor:
    """How much each channel of the ``parts`` (hidden,) counts: less the more it holds; 1 on average over what they hold."""
    found = (share + LEAST / len(share)) ** -power
    return found / (found * share).sum()


def relative_error(output: Tensor, aim: Tensor, weighing: Tensor) -> Tensor:
    """The mean over tokens of sum_c w_c (output - aim)_c^2 / |aim|^2, of states (..., hidden) in float32."""
    wrong = ((output - aim).square() * weighing).sum(-1)
    return (wrong / aim.square().sum(-1).clamp(min=TINY)).mean()
