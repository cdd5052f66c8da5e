"""2:4 weights as two numbers and their places for every four inputs."""

import torch
from torch import Tensor


def why_not(numbers: Tensor) -> str | None:
    """Why ``numbers`` (out, in), of which a zero is not stored, are not 2:4."""
    columns = numbers.shape[1]
    if columns % 4:
        return f"its {columns} inputs are no multiple of 4"
    if bool(((numbers != 0).view(len(numbers), columns // 4, 4).sum(2) > 2).any()):
        return "more than 2 of 4 inputs are kept"
    return None


def compress(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The two stored numbers of each group and their places in rising order, both (out, in / 4, 2).

    A group with fewer stores zeros at places that are free.
    """
    groups = numbers.view(len(numbers), -1, 4)
    kept_first = (groups == 0).to(torch.uint8).sort(dim=2, stable=True).indices
    places = kept_first[:, :, :2].sort(dim=2).values
    return groups.gather(2, places), places


def spread(stored: Tensor, places: Tensor) -> Tensor:
    """The reverse of ``compress``: (out, in)."""
    groups = torch.zeros(*stored.shape[:2], 4, dtype=stored.dtype, device=stored.device)
    return groups.scatter_(2, places, stored).flatten(1)
