"""What a solver returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.grid import Grid


class Solution(NamedTuple):
    """A solved weight: ``weight`` and ``mask`` are (out, in), mask True = kept; ``notes`` go to the report."""

    weight: Tensor
    mask: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None
    notes: dict[str, Any] = {}


class Needs(NamedTuple):
    """What `plan` counts for a solver that has it as ``needs``, beyond the factorisation that every one of them shares.

    ``products`` of a weight (out, in) and its Gram (in, in), about; tensors of the shapes of both that are in memory at
    once, in float32; ``inverses`` (in, in) that are kept between weights, see ``coordinates.KEPT``.
    """

    products: float = 1.5
    weights: int = 4
    squares: int = 5
    inverses: int = 0


def masked(weight: Tensor, mask: Tensor, grid: Grid | None) -> Solution:
    """``weight`` (out, in) where ``mask`` is True, zero elsewhere; with ``grid`` rounded to the nearest."""
    if grid is None:
        return Solution(weight.masked_fill(~mask, 0.0), mask)
    codes, scales = grid.nearest(weight.to(torch.promote_types(weight.dtype, torch.float32)), mask)
    return Solution(grid.values(codes, scales).to(weight.dtype), mask, codes, scales)
