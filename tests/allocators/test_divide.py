"""Budgets are divided as brute force divides them, and to the last unit."""

from itertools import product

import numpy as np
import pytest

from llmsparse.divide import Curve, divide, exactly, optimal


def convex(random, levels, unit):
    """A curve that falls by ``unit`` a level, each level doing more damage than the one before."""
    damage = np.concatenate(([0.0], np.sort(random.random(levels - 1)).cumsum()))
    return Curve(np.arange(levels, 0, -1) * unit, damage * random.random() * 10)


def totals(curves, levels):
    pairs = list(zip(curves, levels, strict=True))
    return sum(c.cost[i] for c, i in pairs), sum(c.damage[i] for c, i in pairs)


def optimum(curves, budget):
    every = (totals(curves, levels) for levels in product(*(range(len(c.cost)) for c in curves)))
    return min(damage for cost, damage in every if cost <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_one_size_get_the_least_damage_of_all_divisions(seed):
    random = np.random.default_rng(seed)
    curves = [convex(random, 6, 3) for _ in range(4)]
    budget = 3 * int(random.integers(4, 24))
    cost, damage = totals(curves, divide(curves, budget))
    assert cost == budget
    assert damage == pytest.approx(optimum(curves, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_other_sizes_lose_at_most_what_one_step_is_worth(seed):
    random = np.random.default_rng(seed)
    units = [2, 3, 5, 7]
    curves = [convex(random, 6, unit) for unit in units]
    budget = int(random.integers(sum(units) + max(units), 6 * sum(units)))
    levels = divide(curves, budget)
    cost, damage = totals(curves, levels)
    assert cost <= budget
    assert all(unit > budget - cost for unit, level in zip(units, levels, strict=True) if level)
    assert optimum(curves, budget) <= damage + 1e-12 <= optimum(curves, budget - max(units)) + 2e-12


@pytest.mark.parametrize("seed", range(20))
def test_few_levels_of_any_sizes_get_the_least_damage_of_the_exact_total(seed):
    random = np.random.default_rng(seed)
    curves = [Curve(np.arange(3, 0, -1) * unit, random.random(3)) for unit in (2, 6, 6, 10, 15)]
    budget = int(random.integers(39, 3 * 39 + 1))
    levels = optimal(curves, budget)
    every = [totals(curves, levels) for levels in product(range(3), repeat=5)]
    most = max(cost for cost, _ in every if cost <= budget)
    cost, damage = totals(curves, levels)
    assert cost == most
    assert damage == pytest.approx(min(d for c, d in every if c == most), rel=1e-12)


def test_too_many_totals_are_left_to_prices(monkeypatch):
    monkeypatch.setattr("llmsparse.divide.OPERATIONS", 5)
    assert optimal([Curve(np.array([9, 8, 7]), np.zeros(3))] * 2, 16) is None


def test_a_budget_is_used_up_where_that_does_damage_too():
    # the least damage lies at level 3 of each, but three levels in all are asked for
    curves = [Curve(np.arange(6, 0, -1), (np.arange(6) - 3.0) ** 2) for _ in range(2)]
    levels = divide(curves, 12 - 3)
    assert sum(levels) == 3 and totals(curves, levels)[1] == 1 + 4


def test_a_step_that_costs_nothing_is_taken():
    assert divide([Curve(np.array([4, 4, 2]), np.array([0.0, 1.0, 2.0]))], 4) == [0]


def test_a_budget_below_the_sparsest_levels_is_refused():
    with pytest.raises(ValueError, match="sparsest levels cost more than 0"):
        divide([Curve(np.array([2, 1]), np.array([0.0, 1.0]))], 0)


@pytest.mark.parametrize("units", [(4, 6, 15), (3, 5), (192, 576, 1536), (7, 7)])
def test_an_exact_total_takes_the_fewest_steps(units):
    random = np.random.default_rng(0)
    curves = [convex(random, 9, unit) for unit in units for _ in range(2)]
    sizes = [unit for unit in units for _ in range(2)]
    unit = int(np.gcd.reduce(units))
    for rest in range(unit, max(units), max(unit, 3)):
        levels, left = exactly(curves, [4] * len(curves), rest)
        moves = [4 - level for level in levels]
        assert sum(move * size for move, size in zip(moves, sizes, strict=True)) == rest - left
        assert left == rest % unit
        fewest = min(
            sum(map(abs, steps))
            for steps in product(range(-8, 9), repeat=len(units))
            if sum(s * u for s, u in zip(steps, units, strict=True)) == rest - left
        )
        assert sum(map(abs, moves)) == fewest


def test_what_no_steps_reach_is_left_and_told():
    full = Curve(np.array([6, 3]), np.array([0.0, 1.0]))  # dense already: no step down in sparsity is left
    assert exactly([full, full], [0, 0], 3) == ([0, 0], 3)
    assert exactly([full, full], [0, 1], 5) == ([0, 0], 2)
