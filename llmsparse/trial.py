"""A whole model whose weights are pruned on trial: levels rebuilt from statistics, judged against the dense logits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmsparse.allocation import Choice, Levels
from llmsparse.eval.fidelity import kl_divergence
from llmsparse.pattern import Unstructured
from llmsparse.skeleton import Skeleton
from llmsparse.solvers.refit import refit

TOKENS = 256  # whose logits are compared at a time


class Source(NamedTuple):
    """What a weight is rebuilt from: ``importance`` (in,) of its inputs, and their damped Gram (in, in) or None."""

    importance: Tensor
    rows: bool  # whether every row is pruned alike
    gram: Tensor | None = None


@dataclass(frozen=True)
class Rebuilding:
    """Weights at any level: the largest w^2 x importance are kept, and refitted in ``steps`` where there is a Gram."""

    levels: dict[str, Levels]
    sources: dict[str, Source]
    steps: int

    def __call__(self, name: str, choice: Choice, dense: Tensor) -> Tensor:
        """``dense`` (out, in) float32 pruned to ``choice``."""
        source, pattern = self.sources[name], self.levels[name].at(choice)
        if isinstance(pattern, Unstructured):
            pattern = pattern.scoped("row" if source.rows else "layer")
        mask = pattern.select(dense.square() * source.importance)
        if source.gram is None:
            return dense.masked_fill(~mask, 0.0)
        return refit(dense, dense, mask, source.gram, self.steps)


class Trial:
    """``model``, whole and dense, and the ``windows`` (count, length) on which others are compared with it."""

    def __init__(self, skeleton: Skeleton, model: nn.Module, windows: Tensor, rebuilding: Rebuilding) -> None:
        self.model, self.windows, self.rebuilding = model, windows, rebuilding
        self.views = skeleton.views([each.weight for each in rebuilding.levels.values()])
        self.dense = {name: view.to("cpu", copy=True) for name, view in self.views.items()}
        self.placed: dict[str, Choice] = {}
        self.logits = [self._logits(window).cpu() for window in windows]

    def put(self, choices: dict[str, Choice]) -> None:
        """Prune the model to ``choices``; what is so already stays."""
        for name, choice in choices.items():
            if self.placed.get(name) != choice:
                view = self.views[name]
                view.copy_(self.rebuilding(name, choice, self.dense[name].to(view.device, torch.float32)))
                self.placed[name] = choice

    @contextmanager
    def tried(self, choices: dict[str, Choice]) -> Iterator[None]:
        """Be at ``choices`` for a while."""
        before = {name: self.placed[name] for name, choice in choices.items() if self.placed[name] != choice}
        values = {name: self.views[name].clone() for name in before}
        try:
            self.put(choices)
            yield
        finally:
            for name, value in values.items():
                self.views[name].copy_(value)
            self.placed.update(before)

    def divergence(self, limit: float = math.inf) -> float:
        """KL(dense || now) a token in nats over all windows; infinite as soon as it must be above ``limit``."""
        total, tokens = 0.0, self.windows.numel()
        for window, dense in zip(self.windows, self.logits, strict=True):
            now = self._logits(window)
            for expected, found in zip(dense.split(TOKENS), now.split(TOKENS), strict=True):
                total += float(
                    kl_divergence(expected.to(found.device).float(), found.float()).sum(dtype=torch.float64)
                )
            if not total <= limit * tokens:
                return math.inf
        return total / tokens

    def _logits(self, window: Tensor) -> Tensor:
        """(length, vocabulary)."""
        device = next(self.model.parameters()).device
        return self.model(input_ids=window[None].to(device), use_cache=False).logits[0]
