"""Divide a budget: the level that each weight takes so that the damage is least and the total is exact."""

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 100  # of the bisection: to the last bit of a float
STATES = 1_000_000  # totals that the search for an exact one looks at
OPERATIONS = 200_000_000  # of the division that tries all totals


class Curve(NamedTuple):
    """One weight's levels, the densest first: what each costs (never rising) and the damage that it does."""

    cost: np.ndarray  # (levels,)
    damage: np.ndarray  # (levels,) float64


def divide(curves: Sequence[Curve], budget: float) -> list[int]:
    """A level for each curve, with the least sum of damages that costs at most ``budget`` and within a step of it.

    Lagrange's multiplier, the damage that one unit of cost is worth, is bisected: at one price every weight takes the
    level with the least damage + price x cost, which is optimal for what it costs. What is left is spent step by step
    where it saves most a unit. The last level of all must fit; where damage falls with sparsity, prices are negative.
    """
    if sum(curve.cost[-1] for curve in curves) > budget:
        raise ValueError(f"the sparsest levels cost more than {budget}")
    steepest = max((_steepest(curve) for curve in curves), default=0.0)
    low, high = -2 * steepest - 1, 2 * steepest + 1
    levels = _at_price(curves, high)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        found = _at_price(curves, middle)
        if _total(curves, found) <= budget:
            high, levels = middle, found
        else:
            low = middle
    return _spend(curves, levels, budget)


def _steepest(curve: Curve) -> float:
    """The most damage that any step does a unit of cost."""
    saved, done = -np.diff(curve.cost), np.abs(np.diff(curve.damage))
    costly = saved > 0
    return float((done[costly] / saved[costly]).max(initial=0.0))


def _at_price(curves: Sequence[Curve], price: float) -> list[int]:
    return [int(np.argmin(curve.damage + price * curve.cost)) for curve in curves]


def _total(curves: Sequence[Curve], levels: Sequence[int]) -> float:
    return sum(curve.cost[level] for curve, level in zip(curves, levels, strict=True))


def _spend(curves: Sequence[Curve], levels: list[int], budget: float) -> list[int]:
    """Take steps towards denser levels while one fits, those that save most damage a unit of cost first."""
    levels, left = list(levels), budget - _total(curves, levels)
    queue = [
        (-_worth(curve, level), i)
        for i, (curve, level) in enumerate(zip(curves, levels, strict=True))
        if level
    ]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        step = curves[i].cost[levels[i] - 1] - curves[i].cost[levels[i]]
        if step > left:
            continue  # what is left only shrinks
        levels[i] -= 1
        left -= step
        if levels[i]:
            heapq.heappush(queue, (-_worth(curves[i], levels[i]), i))
    return levels


def _worth(curve: Curve, level: int) -> float:
    """The damage that one step towards density saves a unit of cost."""
    saved, step = curve.damage[level] - curve.damage[level - 1], curve.cost[level - 1] - curve.cost[level]
    return float(saved / step) if step > 0 else math.inf


def optimal(curves: Sequence[Curve], budget: int) -> list[int] | None:
    """The levels of least damage that cost exactly ``budget``, or the most below it that any levels cost.

    Costs are whole numbers. By dynamic programming over all totals; None where those are too many.
    """
    extra = [np.asarray(curve.cost - curve.cost[-1]) for curve in curves]  # beyond the sparsest level
    unit = math.gcd(*(int(cost) for each in extra for cost in each)) or 1
    room = (budget - sum(int(curve.cost[-1]) for curve in curves)) // unit
    if room * sum(len(each) for each in extra) > OPERATIONS or max(map(len, extra), default=0) > 256:
        return None
    least = np.full(room + 1, math.inf)  # by what is spent
    least[0], chosen = 0.0, []
    for curve, each in zip(curves, extra, strict=True):
        before, least = least, np.full(room + 1, math.inf)
        taken = np.zeros(room + 1, dtype=np.uint8)
        for level, spent in enumerate(each // unit):
            if spent <= room:
                found = before[: room + 1 - spent] + curve.damage[level]
                better = found < least[spent:]
                least[spent:][better], taken[spent:][better] = found[better], level
        chosen.append(taken)
    place, levels = int(np.flatnonzero(least < math.inf)[-1]), list[int]()
    for taken, each in zip(reversed(chosen), reversed(extra), strict=True):
        levels.append(int(taken[place]))
        place -= int(each[levels[-1]]) // unit
    return levels[::-1]


def exactly(curves: Sequence[Curve], levels: Sequence[int], rest: int) -> tuple[list[int], int]:
    """Levels that cost ``rest`` more, by as few steps as do it, and what of it remains where none do.

    Costs are whole numbers, and every step of one curve costs the same.
    """
    units = [int(curve.cost[0] - curve.cost[1]) if len(curve.cost) > 1 else 0 for curve in curves]
    room = Counter[int]()  # signed unit -> steps that can be taken
    for curve, level, unit in zip(curves, levels, units, strict=True):
        room[unit] += level
        room[-unit] += len(curve.cost) - 1 - level
    reached = _fewest({step: count for step, count in room.items() if step and count}, rest)
    wanted = max(total for total in reached if total <= rest and total >= 0)
    found = list(levels)
    for move in sorted(_moves(reached, wanted)):
        _take(curves, found, units, move)
    return found, rest - wanted


def _fewest(room: dict[int, int], rest: int) -> dict[int, int]:
    """Total -> the last of the fewest steps that lead there, of totals around 0 and ``rest``."""
    beyond = 2 * max(room, default=0, key=abs)
    reached, queue = {0: 0}, deque([0])
    while queue and len(reached) < STATES and rest not in reached:
        total = queue.popleft()
        taken = Counter(_moves(reached, total))
        for step, most in room.items():
            if taken[step] < most and -abs(beyond) <= total + step <= rest + abs(beyond):
                if total + step not in reached:
                    queue.append(total + step)
                reached.setdefault(total + step, step)
    return reached


def _moves(reached: dict[int, int], total: int) -> list[int]:
    moves = []
    while total:
        moves.append(reached[total])
        total -= reached[total]
    return moves


def _take(curves: Sequence[Curve], levels: list[int], units: list[int], move: int) -> None:
    """One step of ``move``, by the weight of that unit that it harms least."""
    towards = -1 if move > 0 else 1
    free = [
        i
        for i, (curve, unit) in enumerate(zip(curves, units, strict=True))
        if unit == abs(move) and 0 <= levels[i] + towards < len(curve.cost)
    ]
    best = min(free, key=lambda i: curves[i].damage[levels[i] + towards] - curves[i].damage[levels[i]])
    levels[best] += towards
