"""Rows of tokens in which several continuations share one prefix, each seeing the prefix and itself alone."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PREFIX, PADDING = -1, -2  # what a column is that belongs to no branch


class Path(NamedTuple):
    """One request: the tokens that a model reads, and the targets that its last positions predict."""

    number: int  # its place in the order asked
    inputs: list[int]
    targets: list[int]


class Row(NamedTuple):
    """A prefix and what follows it in each path."""

    prefix: int  # tokens
    paths: list[Path]

    @property
    def branches(self) -> int:
        """Paths that go on behind the prefix; with more than one they must be kept apart."""
        return sum(len(path.inputs) > self.prefix for path in self.paths)

    def __len__(self) -> int:
        return self.prefix + sum(len(path.inputs) - self.prefix for path in self.paths)


class Batch(NamedTuple):
    """Rows as tensors: ids, positions and branches (rows, width), and where each target is predicted."""

    ids: Tensor
    positions: Tensor
    branches: Tensor  # number of the path in its row, or PREFIX, PADDING
    rows: Tensor  # (targets,)
    columns: Tensor  # (targets,)
    targets: Tensor  # (targets,), path after path
    paths: list[Path]


def share(paths: Sequence[Path], most: int) -> list[Row]:
    """Join neighbours whose inputs begin alike over at least half of the context.

    A row has up to ``most`` tokens, or twice those of its last path where that is more.
    """
    rows: list[Row] = []
    for path in paths:
        joined = _joined(rows[-1], path) if rows else None
        if joined is not None and len(joined) <= max(most, 2 * len(path.inputs)):
            rows[-1] = joined
        else:
            rows.append(Row(len(path.inputs), [path]))
    return rows


def _joined(row: Row, path: Path) -> Row | None:
    other = row.paths[0].inputs[: row.prefix]
    common = next((i for i, (a, b) in enumerate(zip(other, path.inputs, strict=False)) if a != b), None)
    prefix = min(len(other), len(path.inputs)) if common is None else common
    context = len(path.inputs) - len(path.targets) + 1  # what was read before the first prediction
    return Row(prefix, [*row.paths, path]) if 2 * prefix >= context and prefix else None


def batches(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """Rows of similar length together, the longest first, at most ``most`` tokens with padding (or one row)."""
    batch: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def collate(rows: Sequence[Row]) -> Batch:
    """Lay the rows out: the prefix, then what is left of each path, then padding."""
    width = max(map(len, rows))
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.int64)
    branches = torch.full((len(rows), width), PADDING)
    places: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        end = row.prefix
        ids[number, :end] = torch.tensor(row.paths[0].inputs[:end])
        positions[number, :end], branches[number, :end] = torch.arange(end), PREFIX
        for branch, path in enumerate(row.paths):
            rest = path.inputs[row.prefix :]
            span, shift = slice(end, end + len(rest)), end - row.prefix
            ids[number, span] = torch.tensor(rest, dtype=torch.int64)
            positions[number, span] = torch.arange(row.prefix, len(path.inputs))
            branches[number, span] = branch
            predicting = range(len(path.inputs) - len(path.targets), len(path.inputs))
            places += [(number, k if k < row.prefix else k + shift) for k in predicting]
            end += len(rest)
    where = torch.tensor(places)
    paths = [path for row in rows for path in row.paths]
    targets = torch.tensor([target for path in paths for target in path.targets])
    return Batch(ids, positions, branches, where[:, 0], where[:, 1], targets, paths)


def attention_mask(branches: Tensor, dtype: torch.dtype) -> Tensor:
    """What each column may look at, to be added to attention scores: (rows, 1, width, width).

    Itself and earlier columns of the prefix and of its own branch.
    """
    seen, seeing = branches[:, None, :], branches[:, :, None]
    allowed = ((seen == PREFIX) | (seen == seeing)).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=branches.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
