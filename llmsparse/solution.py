"""What a solver returns."""

from typing import Any, NamedTuple

from torch import Tensor


class Solution(NamedTuple):
    """A solved weight: ``weight`` and ``mask`` are (out, in), mask True = kept; ``notes`` go to the report."""

    weight: Tensor
    mask: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None
    notes: dict[str, Any] = {}
