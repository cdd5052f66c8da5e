"""Text that a recovery trains on, and text that is held apart to judge it."""

from dataclasses import dataclass

import torch
from torch import Tensor

HELD, MOST = 1 / 16, 32  # windows that are held out, to those that are trained on, and at most


@dataclass
class Text:
    """Windows (count, length) of token ids: those that are ``trained`` on, then ``held`` ones that only judge."""

    windows: Tensor
    held: int

    @property
    def trained(self) -> int:
        return len(self.windows) - self.held


def held_of(windows: int) -> int:
    """How many windows are held out beside so many that are trained on."""
    return max(1, min(MOST, round(windows * HELD)))


def held_apart(windows: Tensor) -> Text:
    """Windows to train on, then those held out: evenly from the whole text, so that each source has its part."""
    held = held_of(round(len(windows) / (1 + HELD)))
    chosen = torch.zeros(len(windows), dtype=torch.bool)
    chosen[torch.linspace(0, len(windows) - 1, held + 2)[1:-1].round().long()] = True
    return Text(torch.cat((windows[~chosen], windows[chosen])), int(chosen.sum()))
