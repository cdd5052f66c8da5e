"""A learning rate over a run: a line up, then a cosine down."""

import math


def share_of(step: int, steps: int, warm: float) -> float:
    """The share of the largest rate in ``step`` of ``steps``, counted from 1; it rises over the share ``warm`` of them."""
    done = step / steps
    return min(1.0, done / warm) * 0.5 * (1 + math.cos(math.pi * min(done, 1 - 0.5 / steps)))
