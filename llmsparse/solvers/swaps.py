"""Swaps: exchange kept and pruned weights while that lowers the layer's error (SparseSwaps, arXiv 2512.10922)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.grid import Grid
from llmsparse.pattern import Pattern
from llmsparse.solution import Needs, Solution, masked
from llmsparse.solvers.sparsegpt import rounded
from llmsparse.solvers.wanda import Wanda
from llmsparse.statistics import Gram, narrowed

GAIN = 1e-5  # of a row's error, below which rounding could pass for a gain


@dataclass(frozen=True)
class Swaps:
    """Take the mask of ``inner``, and in each row prune one weight and revive another wherever the sum of errors falls.

    Kept weights have their original values; put ``refit`` around it to solve them. Groups of n:m swap inside themselves.
    Up to ``candidates`` swaps a row are tried at once, and as many of them made as lower the error most, ``steps`` times.
    """

    inner: Any = field(default_factory=Wanda)
    steps: int = 12
    candidates: int = 24
    damping: float = 0.01
    statistics: ClassVar[type[Gram]] = Gram
    needs: ClassVar[Needs] = Needs(products=13, weights=9, squares=2)

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UserError(f"swaps' damping must be positive; {self.damping} was given, its default is 0.01")
        for name in ("steps", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"swaps' {name} must be at least 1; {getattr(self, name)} was given")

    def __call__(
        self, weight: Tensor, statistics: Gram, pattern: Pattern, grid: Grid | None = None
    ) -> Solution:
        """Prune ``weight`` (out, in) with the Gram (in, in) of its inputs."""
        begun = self.inner(weight, narrowed(statistics, self.inner.statistics), pattern)
        gram, damping, dead = statistics.damped(self.damping)
        alive = weight.to(gram).masked_fill(dead, 0.0)
        mask, swapped = swap(alive, begun.mask, gram, pattern.width, self.steps, self.candidates)
        notes = {**begun.notes, "damping": damping, "swaps": swapped}
        solution = masked(weight, mask, None)._replace(notes=notes)
        return rounded(solution, statistics, grid, self.damping)


class Swap(NamedTuple):
    """Exchanges in each row, the best first: ``prune`` and ``revive`` are columns, (out, k).

    ``change`` is the error's if an exchange is made alone, infinite where there is none.
    """

    prune: Tensor
    revive: Tensor
    change: Tensor


def swap(
    weight: Tensor, mask: Tensor, gram: Tensor, width: int | None, steps: int, candidates: int
) -> tuple[Tensor, int]:
    """``mask`` (out, in) after at most ``steps`` rounds of swaps, and their number; no round raises a row's error.

    With e = W outside the mask and c = e G, pruning p and reviving u changes a row's error e G eT by
    2 w_p c_p + w_p^2 G_pp - 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu.
    """
    mask, count = mask.clone(), 0
    lost = torch.where(mask, 0.0, weight)  # e
    slope = lost @ gram  # c
    own = weight.square() * gram.diagonal()
    for _ in range(steps):
        cost = torch.where(mask, own + 2 * weight * slope, torch.inf)  # of pruning
        gain = torch.where(mask, torch.inf, own - 2 * weight * slope)  # of reviving: negative where it helps
        given = (cost, gain, weight, gram, candidates)
        found = _anywhere(*given) if width is None else _in_groups(*given, width)
        used = _best_prefix(found, weight, gram, GAIN * (lost * slope).sum(1))  # (out, k)
        made = int(used.count_nonzero())
        if not made:
            break
        count += made
        moved = torch.zeros_like(weight)
        for columns, pruned in ((found.prune, True), (found.revive, False)):
            mask.scatter_(1, columns, mask.gather(1, columns) ^ used)
            values = weight.gather(1, columns) * used
            moved.scatter_add_(1, columns, values if pruned else -values)
        lost += moved
        slope += moved @ gram
    return mask, count


def _anywhere(cost: Tensor, gain: Tensor, weight: Tensor, gram: Tensor, candidates: int) -> Swap:
    """The cheapest to prune with the best to revive, in this order; before them the best pair of all of these."""
    k = min(candidates, cost.shape[1])
    prune, revive = cost.topk(k, largest=False).indices, gain.topk(k, largest=False).indices
    best = _change(cost, gain, weight, gram, prune[:, :, None], revive[:, None, :]).flatten(1).argmin(1)
    prune, revive = _to_front(prune, best // k), _to_front(revive, best % k)
    return Swap(prune, revive, _change(cost, gain, weight, gram, prune, revive))


def _in_groups(cost: Tensor, gain: Tensor, weight: Tensor, gram: Tensor, candidates: int, width: int) -> Swap:
    """The best pair of each group of ``width`` columns, the best groups first."""
    rows, inputs = cost.shape
    place = torch.arange(inputs, device=cost.device).view(1, -1, width)  # (1, groups, width)
    prune = place[:, :, :, None].expand(rows, -1, -1, width).reshape(rows, -1)
    revive = place[:, :, None, :].expand(rows, -1, width, -1).reshape(rows, -1)
    pairs = _change(cost, gain, weight, gram, prune, revive).view(rows, -1, width * width)
    change, best = pairs.min(2)  # (out, groups)
    change, group = change.topk(min(candidates, change.shape[1]), largest=False)
    best, first = best.gather(1, group), group * width
    return Swap(first + best // width, first + best % width, change)


def _change(
    cost: Tensor, gain: Tensor, weight: Tensor, gram: Tensor, prune: Tensor, revive: Tensor
) -> Tensor:
    """The change of each row's error by pruning ``prune`` and reviving ``revive``, of shapes (out, ...)."""

    def at(values: Tensor, columns: Tensor) -> Tensor:
        return values.gather(1, columns.flatten(1)).view(columns.shape)

    both = at(weight, prune) * at(weight, revive) * gram[prune, revive]
    return at(cost, prune) + at(gain, revive) - 2 * both


def _to_front(columns: Tensor, index: Tensor) -> Tensor:
    """Each row of ``columns`` (out, k) with its entry ``index`` (out,) first and the others as they were."""
    place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    return columns.gather(1, place.masked_fill(place == index[:, None], -1).argsort(dim=1, stable=True))


def _best_prefix(found: Swap, weight: Tensor, gram: Tensor, least: Tensor) -> Tensor:
    """Which swaps (out, k) to make together: as many of the first as lower a row's error most, by ``least`` (out,)."""
    columns = torch.stack((found.prune, found.revive), 2).flatten(1)  # (out, 2k)
    signs = torch.tensor([1.0, -1.0], device=weight.device, dtype=weight.dtype).repeat(found.prune.shape[1])
    moved = weight.gather(1, columns) * signs
    terms = gram[columns[:, :, None], columns[:, None, :]] * (moved[:, :, None] * moved[:, None, :])
    rows, k = found.prune.shape
    between = terms.view(rows, k, 2, k, 2).sum((2, 4)).triu(1).sum(1)  # of each swap with those before it
    change = (found.change + 2 * between).cumsum(1)
    lowest, last = change.min(1, keepdim=True)
    before = torch.arange(k, device=weight.device) <= last
    return before & (lowest < -least[:, None].clamp(min=0))


solver = Swaps
