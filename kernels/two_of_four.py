"""2:4 weights as two numbers and their places for every four inputs."""

import torch
from torch import Tensor


def why_not(numbers: Tensor) -> str | None:
    """Why ``numbers`` (out, in), of which a zero is not stored, are not 2:4."""
    if numbers.shape[1] % 4:
        return f"needs inputs divisible by 4, not {numbers.shape[1]}"
    most = int((numbers.reshape(len(numbers), -1, 4) != 0).sum(2).max()) if numbers.numel() else 0
    return f"holds at most 2 of every 4 inputs, not {most}" if most > 2 else None


def compress(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The two stored numbers of each group and their places (uint8) in rising order, both (out, in / 4, 2).

    A group with fewer stores zeros at places that are free.
    """
    fours = numbers.view(len(numbers), -1, 4)
    n0, n1, n2, n3 = (fours != 0).unbind(2)
    zero = torch.zeros_like(n0, dtype=torch.uint8)
    low = torch.where(n0, zero, torch.where(n1, zero + 1, torch.where(n2 | n3, zero + 2, zero)))
    high = torch.where(n0 & n1, zero + 1, low + 1)
    high = torch.where(n3, zero + 3, torch.where(n2 & (n0 | n1), zero + 2, high))
    return torch.stack([_chosen(fours, low), _chosen(fours, high)], 2), torch.stack([low, high], 2)


def _chosen(fours: Tensor, places: Tensor) -> Tensor:
    w0, w1, w2, w3 = fours.unbind(2)
    return torch.where(places > 1, torch.where(places > 2, w3, w2), torch.where(places > 0, w1, w0))


def spread(stored: Tensor, places: Tensor) -> Tensor:
    """The reverse of ``compress``: (out, in)."""
    groups = torch.zeros(*stored.shape[:2], 4, dtype=stored.dtype, device=stored.device)
    return groups.scatter_(2, places.long(), stored).flatten(1)
