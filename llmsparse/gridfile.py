"""grid.safetensors: the codes and scales beside a checkpoint whose weights are their rounding."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsparse.bits import panels
from llmsparse.errors import UserError
from llmsparse.grid import Grid

NAME = "grid.safetensors"
CODES, SCALES = ".codes", ".scales"


def layout(
    shapes: dict[str, tuple[int, int]], grids: dict[str, Grid]
) -> dict[str, tuple[torch.dtype, tuple]]:
    """The file's tensors, name -> dtype and shape, for weights of these (out, in) ``shapes``."""
    tensors: dict[str, tuple[torch.dtype, tuple]] = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[name + CODES] = torch.int8, (outputs, inputs)
        tensors[name + SCALES] = torch.bfloat16, (outputs, grids[name].groups(inputs))
    return tensors


def beside(quantised: dict[str, tuple[tuple[int, int], Grid]]) -> dict[str, tuple[dict, dict[str, str]]]:
    """The file, if anything is ``quantised`` (name -> (out, in) shape and grid): its tensors and metadata."""
    shapes, grids = ({name: each[i] for name, each in quantised.items()} for i in (0, 1))
    described = {name: str(grid) for name, grid in grids.items()}
    return {NAME: (layout(shapes, grids), described)} if quantised else {}  # type: ignore[arg-type]


def tensors(name: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """One weight's part of the file."""
    return {name + CODES: codes, name + SCALES: scales.to(torch.bfloat16)}


def described(grid: Grid, tables: str, dtype: torch.dtype) -> dict[str, str]:
    """What a report tells a reader of quantised weights; ``tables``: the values of embedding and output tables."""
    stored = str(dtype).removeprefix("torch.")
    note = f"a weight is code x scale, both in {NAME}; the {stored} weights are the rounding of that"
    return {"file": NAME, "values": str(grid), "tables": tables, "note": note}


class GridFile:
    """The codes of a folder's weights, read weight by weight."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open: Any = safe_open(path, framework="pt")
            found = set(self._open.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it, or prune again") from error
        metadata = self._open.metadata() or {}
        self.names = sorted(name.removesuffix(CODES) for name in found if name.endswith(CODES))
        for name in self.names:
            if name + SCALES not in found or name not in metadata:
                raise UserError(f"{path}: {name} has codes, but no scales or no grid; prune again")
        self._grids = {name: Grid.parse(metadata[name]) for name in self.names}
        for name, grid in self._grids.items():
            codes, scales = (self._open.get_slice(name + part) for part in (CODES, SCALES))
            shape = codes.get_shape()
            wanted = [shape[0], grid.groups(shape[1])] if len(shape) == 2 else None
            if (codes.get_dtype(), scales.get_dtype(), scales.get_shape()) != ("I8", "BF16", wanted):
                raise UserError(f"{path}: {name} has codes or scales of another shape or dtype; prune again")

    @classmethod
    def open(cls, folder: Path) -> "GridFile | None":
        """The folder's codes, where it has some."""
        return cls(folder / NAME) if (folder / NAME).is_file() else None

    def grid(self, name: str) -> Grid:
        return self._grids[name]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self._open.get_slice(name + CODES).get_shape()
        return rows, columns

    def codes(self, name: str) -> Tensor:
        """int8 (out, in)."""
        return self._open.get_tensor(name + CODES)

    def scales(self, name: str) -> Tensor:
        """float32 (out, groups)."""
        return self._open.get_tensor(name + SCALES).float()

    def values(self, name: str) -> Tensor:
        """Code times scale, float32 (out, in)."""
        return self.grid(name).values(self.codes(name), self.scales(name))

    def checked(self, name: str, stored: Tensor) -> Tensor:
        """The values of ``name``, if ``stored`` (out, in), the weight in the checkpoint, is their rounding: ``check``."""
        self.check(name, stored)
        return self.values(name)

    def check(self, name: str, stored: Tensor) -> None:
        """Refuse codes of which ``stored`` (out, in), the weight in the checkpoint, is not the rounding, panel by panel.

        Raises:
            UserError: the weight was changed after it was quantised.
        """
        low, high = self.grid(name).range
        least, most = (int(edge) for edge in self.codes(name).aminmax())
        if least < low or most > high:
            raise UserError(
                f"{self.path}: {name} has codes from {least} to {most}; {self.grid(name)} ends at {high}"
            )
        grid, codes, scales = self.grid(name), self.codes(name), self.scales(name)
        same = codes.shape == stored.shape and all(
            torch.equal(
                grid.values(codes[first:last], scales[first:last]).to(stored.dtype), stored[first:last]
            )
            for first, last in panels(*stored.shape)
        )
        if not same:
            raise UserError(
                f"{name} is not what its codes in {self.path} give: it was changed after it was quantised; "
                f"use the folder as `prune` wrote it, or delete {NAME} to go on from the weights alone"
            )
