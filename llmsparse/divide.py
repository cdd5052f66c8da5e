"""Divide a budget: the level that each weight takes so that the damage is least and the total is exact."""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 100  # of the bisection: to the last bit of a float
STATES = 1_000_000  # totals that the search for an exact one looks at


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


def exactly(curves: Sequence[Curve], levels: Sequence[int], rest: int) -> tuple[list[int], int]:
    """Levels that cost ``rest`` more, by as few steps as do it, and what of it remains where none do.

    Costs are whole numbers, and every step of one curve costs the same.
    """
    units = [int(curve.cost[0] - curve.cost[1]) if len(curve.cost) > 1 else 0 for curve in curves]
    reached = _fewest(sorted({unit for unit in units if unit}), rest)
    for wanted in sorted((total for total in reached if 0 < total <= rest), reverse=True):
        found = _taken(curves, list(levels), units, _moves(reached, wanted))
        if found is not None:
            return found, rest - wanted
    return list(levels), rest


def _fewest(units: list[int], rest: int) -> dict[int, int]:
    """Total -> the last of the fewest steps (signed units) that lead there, of totals around 0 and ``rest``."""
    room = 2 * max(units, default=0)
    reached, queue = {0: 0}, deque([0])
    while queue and len(reached) < STATES and rest not in reached:
        total = queue.popleft()
        for step in (*units, *(-unit for unit in units)):
            if -room <= total + step <= rest + room and total + step not in reached:
                reached[total + step] = step
                queue.append(total + step)
    return reached


def _moves(reached: dict[int, int], total: int) -> list[int]:
    moves = []
    while total:
        moves.append(reached[total])
        total -= reached[total]
    return moves


def _taken(
    curves: Sequence[Curve], levels: list[int], units: list[int], moves: list[int]
) -> list[int] | None:
    """``levels`` after ``moves``, each by the weight of that unit that it harms least; None where none has room."""
    for move in sorted(moves):
        towards = -1 if move > 0 else 1
        free = [
            i
            for i, unit in enumerate(units)
            if unit == abs(move) and 0 <= levels[i] + towards < len(curves[i].cost)
        ]
        if not free:
            return None
        best = min(free, key=lambda i: curves[i].damage[levels[i] + towards] - curves[i].damage[levels[i]])
        levels[best] += towards
    return levels
