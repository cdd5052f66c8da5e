"""Running sums of calibration inputs and of their products: the Gram with the mean and variance of each input."""

import torch
from torch import Tensor

from llmsparse.statistics import Gram


class Moments:
    """Sums over tokens in one tensor, (in, in + 1) float32: of x xT, and in the last column of x."""

    def __init__(self, total: Tensor, tokens: int = 0) -> None:
        self.total, self.tokens = total, tokens
        self._products = Gram(total[:, :-1])

    @classmethod
    def zeros(cls, in_features: int, device: torch.device | str = "cpu") -> "Moments":
        return cls(torch.zeros(in_features, in_features + 1, device=device))

    def update(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add the tokens of ``inputs`` (..., in); all must be real tokens, never padding. ``targets`` are not used."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.total)
        self._products.update(rows)
        self.total[:, -1] += rows.sum(0)
        self.tokens += rows.shape[0]

    def merge(self, other: "Moments") -> None:
        self.total += other.total
        self.tokens += other.tokens

    def sums(self) -> Tensor:
        """The running sums themselves, for an all-reduce."""
        return self.total

    def gram(self) -> Gram:
        """The products alone, as they are now."""
        return Gram(self.total[:, :-1], self.tokens)

    @property
    def mean(self) -> Tensor:
        """Of each input, (in,)."""
        return self.total[:, -1] / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """Of each input over tokens, (in,)."""
        return (self.total.diagonal() / max(self.tokens, 1) - self.mean.square()).clamp_min(0.0)
