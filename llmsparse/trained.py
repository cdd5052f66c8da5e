"""A parameter while it is trained: what the optimizer moves, and what the model computes with because of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmsparse.grid import Grid

Views = Callable[[Tensor], dict[str, Tensor]]  # a tensor like the parameter -> (out, in) views by weight name


class Trained(Protocol):
    """``masters`` are what is trained; the model's parameter gets ``value``, and its gradient comes to ``take``."""

    @property
    def masters(self) -> list[nn.Parameter]: ...

    def value(self) -> Tensor: ...

    def take(self, grad: Tensor) -> None: ...


@dataclass(eq=False)
class Kept:
    """The numbers that ``mask`` keeps (of the parameter's shape; None: all of them); the others stay zero."""

    parameter: Tensor
    mask: Tensor | None = None
    masters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.masters = [nn.Parameter(self.parameter)]

    def value(self) -> Tensor:
        """The master itself, its zeros put back where the optimizer moved them."""
        master = self.masters[0].data
        return master if self.mask is None else master.masked_fill_(~self.mask, 0.0)

    def take(self, grad: Tensor) -> None:
        self.masters[0].grad = grad if self.mask is None else grad.masked_fill_(~self.mask, 0.0)


@dataclass(eq=False)
class Spliced:
    """A dense shadow, of which ``mask`` lets a part through; the gradient moves all of it.

    Dynamic network surgery (Guo et al., arXiv 1608.04493) with the feedback of Lin et al. (arXiv 2006.07253): the
    gradient is that of the sparse model, and what was pruned may come back.
    """

    parameter: Tensor
    mask: Tensor
    masters: list[nn.Parameter] = field(init=False)
    fixed: bool = False

    def __post_init__(self) -> None:
        self.masters = [nn.Parameter(self.parameter.clone())]

    def value(self) -> Tensor:
        return self.masters[0].data.masked_fill(~self.mask, 0.0)

    def take(self, grad: Tensor) -> None:
        self.masters[0].grad = grad.masked_fill_(~self.mask, 0.0) if self.fixed else grad

    def choose(self, views: Views, patterns: dict[str, Any]) -> int:
        """Take the largest of the shadow, each weight by its pattern; how many numbers came back."""
        shadow, masks = views(self.masters[0].data), views(self.mask)
        revived = 0
        for name, pattern in patterns.items():
            chosen = pattern.select(shadow[name].abs())
            revived += int((chosen & ~masks[name]).count_nonzero())
            masks[name].copy_(chosen)
        return revived


@dataclass(eq=False)
class LowRank:
    """``parameter`` + 2 B A under ``mask`` (LoRA, Hu et al., arXiv 2106.09685): A (..., rank, in) and B (..., out, rank).

    B begins at zero. The mask lies over the sum, so that nothing is lost when they are merged.
    """

    parameter: Tensor
    mask: Tensor | None
    rank: int
    seed: int
    masters: list[nn.Parameter] = field(init=False)
    base: Tensor = field(init=False)

    SCALE = 2.0

    def __post_init__(self) -> None:
        *stack, rows, columns = self.parameter.shape
        self.base = self.parameter.clone()
        rank = min(self.rank, rows, columns)
        random = torch.Generator().manual_seed(self.seed)
        down = (2 * torch.rand(*stack, rank, columns, generator=random) - 1) * columns**-0.5
        up = self.base.new_zeros(*stack, rows, rank)
        self.masters = [nn.Parameter(down.to(self.base)), nn.Parameter(up)]

    def value(self) -> Tensor:
        down, up = (master.data for master in self.masters)
        whole = self.base + self.SCALE * (up @ down)
        return whole if self.mask is None else whole.masked_fill_(~self.mask, 0.0)

    def take(self, grad: Tensor) -> None:
        down, up = self.masters
        if self.mask is not None:
            grad = grad.masked_fill_(~self.mask, 0.0)
        up.grad = self.SCALE * (grad @ down.data.mT)
        down.grad = self.SCALE * (up.data.mT @ grad)


@dataclass(eq=False)
class Rounded:
    """What ``grids`` leave of ``inner``: gradients go straight through the rounding (Bengio et al., arXiv 1308.3432)."""

    inner: Trained
    views: Views
    grids: dict[str, Grid]  # by weight name; a weight without one stays as it is
    scales: dict[str, Tensor]  # (out, groups) each

    @property
    def masters(self) -> list[nn.Parameter]:
        return self.inner.masters

    def value(self) -> Tensor:
        rounded = self.inner.value().clone()
        shown = self.views(rounded)
        for name, grid in self.grids.items():
            codes = grid.codes(shown[name].float(), self.scales[name])
            shown[name].copy_(grid.values(codes, self.scales[name]))
        return rounded

    def take(self, grad: Tensor) -> None:
        self.inner.take(grad)
