"""Text that a recovery trains on, and text that is held apart to judge it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsparse.calibration import shares

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


def held_apart(windows: Tensor, source_of: list[int]) -> Text:
    """Windows to train on, then those held out: from each source its part, evenly.

    ``source_of``: a number for each window.
    """
    held = held_of(round(len(windows) / (1 + HELD)))
    sources = torch.tensor(source_of)
    own = [(sources == number).nonzero().flatten() for number in sources.unique()]
    chosen = torch.zeros(len(windows), dtype=torch.bool)
    for rows, part in zip(own, shares([len(rows) / len(windows) for rows in own], held), strict=True):
        places = torch.linspace(0, len(rows) - 1, part + 2)[1:-1].round().long()
        chosen[rows[places]] = True
    return Text(torch.cat((windows[~chosen], windows[chosen])), int(chosen.sum()))
