"""Tiny pruned checkpoints and their packed folders, for tests of what writes and reads them."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmsparse.checkpoint import Checkpoint
from llmsparse.export import export
from llmsparse.grid import Grid
from llmsparse.gridfile import NAME, tensors
from llmsparse.pattern import parse
from llmsparse.skeleton import Skeleton
from tests.pruned import tensors as files_of
from tests.tiny import save_tiny

IDS = torch.arange(3, 23)[None]


def sparse(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, keep: float = 0.5,
           pattern: str | None = None, **options) -> Path:  # fmt: skip
    """A tiny checkpoint whose linear weights lost all but the largest ``keep`` of each row, or to ``pattern``."""
    save_tiny(family, folder, dtype, **options)
    weights = Skeleton(Checkpoint(folder)).weights
    prunable = {w.source: w for w in weights if w.block is not None}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name in found.keys() & prunable.keys():
            weight = prunable[name].stored(found[name])
            mask = parse(pattern or f"{100 * (1 - keep)}%", None if pattern else "row").select(weight.abs())
            found[name] = prunable[name].oriented(weight.where(mask, 0.0)).contiguous()
        save_file(found, file, metadata={"format": "pt"})
    return folder


def packed(folder: Path, family: str = "llama", values: str | None = None, **options) -> Path:
    export(sparse(folder / "sparse", family, **options), folder / "packed", values=values)
    return folder / "packed"


def add_grid(folder: Path, grid: str = "int8") -> None:
    """Round the block weights of ``folder`` and put their codes beside them, as prune does."""
    made, found, codes = Grid.parse(grid), files_of(folder), {}
    weights = [w for w in Skeleton(Checkpoint(folder)).weights if w.block is not None]
    for weight in weights:
        dense = weight.stored(found[weight.source]).float()
        each, scales = made.nearest(dense, dense != 0)
        codes |= tensors(weight.name, each, scales)
        found[weight.source] = weight.oriented(made.values(each, scales)).to(torch.bfloat16).contiguous()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(codes, folder / NAME, metadata={w.name: grid for w in weights})
