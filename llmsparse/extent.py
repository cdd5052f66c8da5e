"""What of a sparse checkpoint is trained: which weights, under which masks and patterns, on which grids."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.gridfile import GridFile
from llmsparse.pattern import NM, Existing, Pattern, Unstructured, parse_mask
from llmsparse.recovery import Recovery
from llmsparse.skeleton import Skeleton, Weight

TABLES = Grid(8)  # of embedding and output tables, where --values gives the weights a grid
WIDTHS = (4, 8, 16, 32)  # the m of n:m that is looked for in a mask
TIGHT = 0.9  # a mask fits n:m if no group keeps more than n, and all together so much of that


@dataclass(frozen=True)
class Extent:
    """``weights``: the linear ones of the blocks, and any other that is pruned; by their names:

    ``kept``: masks (out, in), True = kept, of the pruned ones, and, to be spliced, their ``patterns``; ``grids`` of those
    that have codes.
    ``tables``: embedding and output tables that have codes, by name on disk. ``codes``: the file beside the checkpoint.
    """

    skeleton: Skeleton
    weights: list[Weight]
    kept: dict[str, Tensor]
    patterns: dict[str, Pattern]
    grids: dict[str, Grid]
    tables: dict[str, Grid]
    codes: GridFile | None

    def quantised(self) -> dict[str, tuple[tuple[int, int], Grid]]:
        """Everything that gets codes: name -> its (out, in) shape and its grid."""
        found = {
            w.name: ((w.out_features, w.in_features), self.grids[w.name])
            for w in self.weights
            if w.name in self.grids
        }
        shapes = {name: self.skeleton.checkpoint.shape(name) for name in self.tables}
        return found | {
            name: ((rows, columns), self.tables[name]) for name, (rows, columns) in shapes.items()
        }

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> a mask of its shape, of those that are pruned or hold a pruned weight."""
        pruned = {w.parameter for w in self.weights if w.name in self.kept}
        model = self.skeleton.model
        found = {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in pruned}
        for name, view in self.skeleton.views(
            [w for w in self.weights if w.name in self.kept], found
        ).items():
            view.copy_(self.kept[name])
        return found


def extent_of(skeleton: Skeleton, options: Recovery, report: dict[str, Any], smaller: bool) -> Extent:
    """What ``options`` train of the checkpoint of ``skeleton``, which the run of ``report`` wrote, read weight by weight.

    ``smaller``: it has fewer channels or blocks than its teacher.

    A weight that was pruned keeps all of its zeros; of one that nothing is known of, or that was quantised as it was, a
    fifth must be zero: fewer are what rounding made.

    Raises:
        UserError: nothing is pruned, quantised or smaller; splicing where nothing is pruned, or of a mask that is not of
            the weight's pattern.
    """
    rows = {row["name"]: row for row in report.get("weights") or ()}
    kept: dict[str, Tensor] = {}
    for weight in skeleton.weights:
        stored = weight.stored(skeleton.checkpoint.tensor(weight.source))
        mask = _mask(stored, rows.get(weight.name))
        if not bool(mask.all()):
            kept[weight.name] = mask
    skeleton.checkpoint.close()
    weights = [w for w in skeleton.weights if w.block is not None or w.name in kept]
    codes = GridFile.open(skeleton.checkpoint.folder)
    grids = _grids(weights, options, codes)
    if not kept and not grids and not smaller:
        raise UserError(
            f"{skeleton.checkpoint.folder} has no pruned weight, no codes and no fewer channels or blocks; prune it first, "
            "there is nothing to recover"
        )
    patterns = {}
    if options.masks == "splice":
        if not kept:
            raise UserError(
                f"--masks splice: {skeleton.checkpoint.folder} has no pruned weight; use --masks fixed"
            )
        asked = {name: (rows.get(name) or {}).get("pattern") for name in kept}
        patterns = {name: counted(name, mask, asked[name]) for name, mask in kept.items()}
    return Extent(skeleton, weights, kept, patterns, grids, _tables(skeleton, weights, options, codes), codes)


def _mask(stored: Tensor, row: dict[str, Any] | None) -> Tensor:
    if row and row.get("sparsity") and row.get("pattern") != str(Existing()):
        return stored != 0
    return Existing().select(stored.abs())


def _grids(weights: list[Weight], options: Recovery, codes: GridFile | None) -> dict[str, Grid]:
    """What is asked for, else the grids that SPARSE's weights have."""
    if options.values is not None:
        return dict.fromkeys([w.name for w in weights], Grid.parse(options.values))
    return {w.name: codes.grid(w.name) for w in weights if codes is not None and w.name in codes.names}


def _tables(
    skeleton: Skeleton, weights: list[Weight], options: Recovery, codes: GridFile | None
) -> dict[str, Grid]:
    """Those with codes; where the weights get a grid now, all that are not trained."""
    trained = {w.source for w in weights}
    names = [skeleton.sources[f"{path}.weight"][0][0] for path in skeleton.tables]
    names = [name for name in names if name not in trained]
    if codes is not None:
        return {name: codes.grid(name) for name in names if name in codes.names}
    return dict.fromkeys(names, TABLES) if options.values is not None else {}


def counted(name: str, mask: Tensor, asked: str | None) -> Pattern:
    """The pattern by which ``mask`` (out, in) can be chosen again: n:m where it was ``asked`` for or shows, else its count.

    Raises:
        UserError: n:m was asked for, and a group keeps more.
    """
    pattern = parse_mask(asked) if asked else None
    if isinstance(pattern, NM):
        if _fits(mask, pattern):
            return pattern
        raise UserError(
            f"--masks splice: {name} was pruned to {pattern}, and some of its groups keep more; prune again"
        )
    most = {m: int(mask.reshape(-1, m).sum(1).max()) for m in WIDTHS if mask.shape[1] % m == 0}
    density = float(mask.float().mean())
    found = [NM(n, m) for m, n in most.items() if 0 < n < m and density >= TIGHT * n / m]
    if found:
        return found[0]
    zeros = (~mask).sum(1)
    scope = "row" if bool((zeros == zeros[0]).all()) else "layer"
    return Unstructured(float(zeros.sum()) / mask.numel(), scope)


def _fits(mask: Tensor, pattern: NM) -> bool:
    """Whether no group keeps more than n: a kept weight may have been rounded to zero."""
    if mask.shape[1] % pattern.m:
        return False
    return int(mask.reshape(-1, pattern.m).sum(1).max()) <= pattern.n
