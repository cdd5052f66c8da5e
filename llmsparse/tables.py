"""Embedding and output tables on a grid: rounded to the nearest, a few rows at a time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse import gridfile
from llmsparse.grid import Grid

ROWS = 4096  # rounded at a time


class Table(NamedTuple):
    """Codes int8 and scales of a table, and the share of its squares that rounding took."""

    codes: Tensor
    scales: Tensor
    squared_error: float

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What of it goes into grid.safetensors."""
        return gridfile.tensors(name, self.codes, self.scales)

    def row(self, name: str, grid: Grid) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "name": name,
            "shape": list(self.codes.shape),
            "values": str(grid),
            "squared_error": self.squared_error,
        }


def round_table(stored: Tensor, grid: Grid) -> Table:
    """Put the nearest grid points in the place of ``stored`` (rows, columns)."""
    codes, scales, lost, whole = [], [], 0.0, 0.0
    for rows in stored.split(ROWS):
        dense = rows.float()
        found, scale = grid.nearest(dense)
        values = grid.values(found, scale)
        lost, whole = lost + float((values - dense).square().sum()), whole + float(dense.square().sum())
        rows.copy_(values)
        codes.append(found)
        scales.append(scale)
    return Table(torch.cat(codes), torch.cat(scales), lost / whole)
