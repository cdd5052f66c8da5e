"""Orders of a weight's inputs in which an n:m pattern keeps more (Zhang et al., ICLR 2024, section 4.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.pattern import NM

SWEEPS = 32  # at most, each over every place in a group
ENOUGH = 1e-3  # of all scores; after some sweeps in a row that gain less, the order stays
TOGETHER = 128  # groups that exchange with one another in a sweep: 512 took 2.5 times as long for 0.0007 more of all scores
ROUNDING = 1e-12  # of a sum of float64


class Arrangement(NamedTuple):
    """``order`` (in,): the input that comes to each place; the scores that are kept in the order before and in this one."""

    order: Tensor
    before: float
    after: float


def arrange(scores: Tensor, pattern: NM) -> Arrangement:
    """An order of the columns of ``scores`` (rows, in) in which the n largest of each m hold more of the whole.

    Columns, the strongest first, are dealt to the groups to and fro; then groups exchange columns as long as that raises
    what is kept. Never less is kept than in the order that was given. ``scores`` are not negative; ``m`` divides in.
    """
    scores = scores.double()
    given = torch.arange(scores.shape[1], device=scores.device).view(-1, pattern.m)  # (groups, m)
    dealt = deal(scores.sum(0), pattern.m)
    before = retained(scores, given, pattern.n)
    better = dealt if retained(scores, dealt, pattern.n) > before else given
    better = better.sort(
        1
    ).values  # one form of the same groups, so that rounding cannot choose between two searches
    order = exchange_all(scores.T.contiguous(), better[better[:, 0].argsort()], pattern.n)
    after = retained(scores, order, pattern.n)
    if after <= before:
        order, after = given, before
    return Arrangement(order.sort(1).values.flatten(), before, after)


def retained(scores: Tensor, order: Tensor, n: int) -> float:
    """The sum of the ``n`` largest of each group in each row of ``scores`` (rows, in); ``order``: (groups, m)."""
    return sum(float(part.topk(n, dim=-1).values.sum()) for part in scores[:, order].split(256))


def deal(strength: Tensor, m: int) -> Tensor:
    """(groups, m) columns, the strongest of ``strength`` (in,) first, dealt to and fro: each group gets strong and weak."""
    rounds = strength.argsort(descending=True, stable=True).view(m, -1)
    return torch.stack([row.flip(0) if number % 2 else row for number, row in enumerate(rounds)], 1)


def exchange_all(columns: Tensor, order: Tensor, n: int) -> Tensor:
    """``order`` (groups, m) after exchanges between groups, each of which raises what is kept of ``columns`` (in, rows)."""
    chance = torch.Generator().manual_seed(0)
    groups, m = order.shape
    idle, least = 0, ENOUGH * float(columns.sum())
    patience = (
        m if groups > TOGETHER else 3 * m
    )  # of few groups nearly every exchange is tried before the end
    for _ in range(SWEEPS):
        gained = 0.0
        for part in torch.randperm(groups, generator=chance).to(order.device).split(TOGETHER):
            mixed = order[part].gather(
                1, torch.rand(len(part), m, generator=chance).argsort(1).to(order.device)
            )
            for place in range(m):
                mixed, gain = exchange(columns, mixed, place, n)
                gained += gain
            order = order.index_copy(0, part, mixed)
        idle = idle + 1 if gained <= least else 0
        if idle == patience:
            break
    return order


def exchange(columns: Tensor, order: Tensor, place: int, n: int) -> tuple[Tensor, float]:
    """Exchange the columns at ``place`` of pairs of groups while that gains; the new order, and what was gained.

    With t the n-th largest of a group's other columns, a column s adds sum(max(s - t, 0)) to what the group keeps, and t
    does not depend on s: so all exchanges at one place are known from one matrix, and stay so while they are made.
    """
    m = order.shape[1]
    others = columns[order[:, [i for i in range(m) if i != place]]]  # (groups, m - 1, rows)
    limit = others.kthvalue(m - n, dim=1).values  # the n-th largest, (groups, rows)
    own = columns[order[:, place]]  # (groups, rows)
    # sum(max(s - t, 0)) = (sum|s - t| + sum(s) - sum(t)) / 2, [group, column]
    adds = (torch.cdist(limit, own, p=1) + own.sum(1) - limit.sum(1, keepdim=True)) / 2
    holds = torch.arange(len(order), device=order.device)
    noise = ROUNDING * float(own.sum() + limit.sum())
    gained = 0.0
    while True:
        now = adds[:, holds]
        kept = now.diagonal()
        gains = now + now.T - kept[:, None] - kept[None, :]  # of an exchange between two groups
        best, partner = gains.max(1)
        agreed = (partner[partner] == torch.arange(len(order), device=order.device)) & (best > noise)
        if not bool(agreed.any()):
            return order.index_copy(
                1, torch.tensor([place], device=order.device), order[holds, place][:, None]
            ), gained
        gained += float(best[agreed].sum()) / 2
        holds = torch.where(agreed, holds[partner], holds)
