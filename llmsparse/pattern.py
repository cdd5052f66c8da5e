"""Sparsity patterns: which weights a mask may keep, and how scores choose them."""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmsparse import shrinking
from llmsparse.errors import UserError

SCOPES = ("row", "layer")


class Pattern(Protocol):
    """What a solver needs to know of a pattern; ``width`` is the number of columns decided together."""

    @property
    def width(self) -> int | None: ...

    def select(self, score: Tensor) -> Tensor: ...

    def allows(self, mask: Tensor) -> bool: ...


FEW = 32  # rows that leave a GPU's multiprocessors idle
MANY = 1 << 16  # entries of a lone row that is sampled before it is put in order
STRIDE = 101  # from one entry of the sample to the next


def keep_largest(score: Tensor, kept: int) -> Tensor:
    """Mask of exactly ``kept`` largest entries of each row of ``score`` (rows, n), ties by lowest index."""
    rows, count = score.shape
    if kept <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if kept >= count:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, count - kept + 1)  # the smallest kept value
    mask = score > threshold
    missing = kept - mask.sum(1, keepdim=True)
    tied = score == threshold
    if score.device.type == "cpu" and bool((tied.sum(1, keepdim=True) == missing).all()):
        return mask | tied  # the usual case; elsewhere asking for it would wait for the device
    return mask | (tied & (tied.cumsum(1) <= missing))


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest entry of each row, counted from 1, (rows, 1)."""
    # numpy takes a tenth of torch's time on a CPU
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        values = score.detach().numpy()
        if len(values) == 1 and values.size >= MANY:
            return torch.from_numpy(_kth_of_many(values[0], k)).reshape(1, 1)
        return torch.from_numpy(np.partition(values, k - 1)[:, k - 1 : k])
    if score.device.type == "cuda" and len(score) < FEW:
        return score.sort(dim=1).values[:, k - 1 : k]  # kthvalue gives a row to one multiprocessor
    return score.kthvalue(k, dim=1, keepdim=True).values


def _kth_of_many(values: NDArray[Any], k: int) -> NDArray[Any]:
    """The ``k``-th smallest of ``values`` (n,), counted from 1, (1,); a sample says which entries must be put in order."""
    sample = np.sort(values[::STRIDE])
    place, spread = k / len(values) * len(sample), 2 * len(sample) ** 0.5  # four standard deviations or more
    first, last = int(place - spread), int(place + spread)
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < len(sample) else np.inf
    before, near = int(np.count_nonzero(values < low)), values[(values >= low) & (values <= high)]
    if before < k <= before + len(near):  # else the sample misled, and all are put in order
        values, k = near, k - before
    return np.partition(values, k - 1)[k - 1 : k]


@dataclass(frozen=True)
class Unstructured:
    """``sparsity`` of the weights are zero, anywhere; ``scope`` says within what scores are compared.

    ``row``: every output row has the same count; ``layer``: one threshold for the weight;
    ``None``: the solver's own scope.
    """

    sparsity: float
    scope: str | None = None
    width: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(
                f"sparsity must lie between 0 % and 100 %; {self.sparsity:.6g} was given, e.g. use 50%"
            )
        if self.scope not in (None, *SCOPES):
            raise UserError(
                f"scope {self.scope!r} is unknown; use one of {', '.join(SCOPES)}, or leave it out"
            )

    def scoped(self, default: str) -> "Unstructured":
        """The same pattern with the solver's own scope filled in where none was asked for."""
        return self if self.scope else replace(self, scope=default)

    def pruned(self, count: int) -> int:
        """How many of ``count`` weights are zero (rounded to nearest)."""
        return round(self.sparsity * count)

    def select(self, score: Tensor) -> Tensor:
        """Keep the largest of ``score`` (out, in): per row with scope ``row``, else over the whole matrix."""
        if self.scope == "row":
            return keep_largest(score, score.shape[1] - self.pruned(score.shape[1]))
        return keep_largest(score.reshape(1, -1), score.numel() - self.pruned(score.numel())).view_as(score)

    def allows(self, mask: Tensor) -> bool:
        """True when ``mask`` (out, in) has exactly the pattern's count of zeros, in every row with scope ``row``."""
        if self.scope == "row":
            return bool(((~mask).sum(1) == self.pruned(mask.shape[1])).all())
        return int((~mask).sum()) == self.pruned(mask.numel())

    def __str__(self) -> str:
        return f"{self.sparsity * 100:.6g}%"


@dataclass(frozen=True)
class NM:
    """``n`` weights **kept** of every ``m`` consecutive inputs, as the hardware documents count."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m} consecutive weights; n must lie between 1 and m-1"
            )

    @property
    def width(self) -> int:
        return self.m

    def select(self, score: Tensor) -> Tensor:
        """Keep the n largest of each group of m of ``score`` (out, in), ties by lowest index."""
        # column by column: on a CPU comparing m x m inside each group takes five times as long
        columns = score.reshape(-1, self.m).T.contiguous()
        rank = torch.zeros_like(columns, dtype=torch.int16)  # how many of the group come before
        for j in range(self.m):
            rank[:j] += columns[j] > columns[:j]
            rank[j + 1 :] += columns[j] >= columns[j + 1 :]
        return (rank < self.n).T.reshape(score.shape).contiguous()

    def allows(self, mask: Tensor) -> bool:
        """True when every group of m of ``mask`` (out, in) keeps exactly n."""
        if mask.shape[-1] % self.m:
            return False
        return bool((mask.reshape(-1, self.m).sum(1) == self.n).all())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Existing:
    """The zeros that a weight already has, where it has the ``sparsity`` of a pruned one; else nothing is pruned."""

    sparsity: float = 0.2  # below it zeros are those that rounding made, and may get other values
    width: ClassVar[None] = None

    def select(self, score: Tensor) -> Tensor:
        """Keep what scores above zero; everything where fewer than ``sparsity`` score zero."""
        kept = score > 0
        return (
            kept if int(kept.count_nonzero()) <= (1 - self.sparsity) * kept.numel() else torch.ones_like(kept)
        )

    def allows(self, mask: Tensor) -> bool:
        """Any mask may be what a weight already has."""
        return True

    def __str__(self) -> str:
        return "as-is"


@dataclass(frozen=True)
class Fixed:
    """A mask (out, in) that was chosen before."""

    mask: Tensor
    width: ClassVar[None] = None

    def select(self, score: Tensor) -> Tensor:
        """The mask, whatever the scores."""
        return self.mask

    def allows(self, mask: Tensor) -> bool:
        """That mask alone."""
        return torch.equal(mask, self.mask)


def parse(text: str, scope: str | None = None) -> Unstructured | NM | Existing | shrinking.Shrink:
    """Read what ``parse_mask`` does, or ``width:25%`` or ``depth:2``, which are of the whole model.

    Raises:
        UserError: the text is neither, or its numbers make no pattern.
    """
    return shrinking.read(text) or parse_mask(text, scope)


def parse_mask(text: str, scope: str | None = None) -> Unstructured | NM | Existing:
    """Read ``50%``, ``n:m`` (n kept of m) or ``as-is``.

    Raises:
        UserError: the text is neither, or its numbers make no pattern.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        if scope:
            raise UserError(f"--scope {scope} goes with an unstructured pattern such as 50%, not with {text}")
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
        if scope is not None and scope not in SCOPES:
            raise UserError(f"--scope {scope} is unknown; use one of {', '.join(SCOPES)}, or leave it out")
        return Unstructured(float(match[1]) / 100, scope)
    if text.strip() == "as-is":
        return Existing()
    raise UserError(
        f"pattern {text!r} is unknown; use a percentage such as 50%, or n:m (n kept of m) such as 2:4"
    )


def describe(pattern: Pattern) -> str:
    """The pattern for a reader, with what it keeps: ``1:4 (keeps 25 %)``."""
    if isinstance(pattern, NM):
        return f"{pattern} (keeps {100 * pattern.n / pattern.m:.4g} %)"
    if isinstance(pattern, Unstructured):
        return f"{pattern} (keeps {100 * (1 - pattern.sparsity):.4g} %)"
    return str(pattern)
