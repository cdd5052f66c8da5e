"""Levels, budgets and totals of weights that no model is needed for."""

import numpy as np
import pytest
import torch

from llmsparse.allocation import Target
from llmsparse.costs import DENSITIES, Costs, packed_bytes
from llmsparse.errors import UserError
from llmsparse.packed import smallest
from llmsparse.pattern import NM, Unstructured, parse
from llmsparse.skeleton import Weight
from llmsparse.values import Values

SHAPES = {
    "even": [(64, 64), (64, 64), (32, 64), (160, 64), (64, 160)],
    "odd": [(7, 30), (11, 20), (13, 20)],
    "one": [(12, 40), (12, 40)],
}


def target(shapes, pattern, costs=None):
    weights = {str(i): Weight(str(i), str(i), None, str(i), *s, False, 0) for i, s in enumerate(shapes)}
    return Target(weights, dict.fromkeys(weights, pattern), costs or Costs("parameters", {}))


def damages(levels, seed=0):
    """Convex curves at random heights."""
    random = np.random.default_rng(seed)
    return {
        name: (np.arange(len(each.cost)) ** 2) * random.random() * 10 ** random.uniform(-2, 2)
        for name, each in levels.items()
    }


def pruned(goal, patterns):
    sizes = {name: w.out_features * w.in_features for name, w in goal.weights.items()}
    return sum(
        sizes[name] * (p.m - p.n) // p.m if isinstance(p, NM) else p.pruned(sizes[name])
        for name, p in patterns.items()
    )


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("percent", [10, 33.3, 50, 60, 61.7, 90])
def test_unstructured_totals_are_exact_and_most_weights_prune_whole_rows(shapes, percent):
    goal = target(shapes, Unstructured(percent / 100))
    for seed in range(5):
        levels = goal.levels(0.2)
        patterns = goal.chosen(levels, goal.divide(levels, damages(levels, seed)))
        assert pruned(goal, patterns) == round(percent / 100 * sum(o * i for o, i in shapes))
        uneven = [
            name for name, p in patterns.items()
            if p.pruned(goal.weights[name].out_features * goal.weights[name].in_features)
            % goal.weights[name].out_features
        ]  # fmt: skip
        assert len(uneven) <= 1
        for name, pattern in patterns.items():
            assert abs(pattern.sparsity - percent / 100) <= 0.2 + 1 / goal.weights[name].in_features


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "5:16"])
def test_nm_totals_are_exact_and_m_stays(pattern):
    goal = target([(64, 64), (64, 64), (32, 64), (160, 64), (64, 160)], parse(pattern))
    asked = goal.patterns["0"]
    for seed in range(5):
        levels = goal.levels(0.1)
        patterns = goal.chosen(levels, goal.divide(levels, damages(levels, seed)))
        size = sum(w.out_features * w.in_features for w in goal.weights.values())
        assert pruned(goal, patterns) == size * (asked.m - asked.n) // asked.m
        assert {p.m for p in patterns.values()} == {asked.m}
        assert max(abs(p.n - asked.n) for p in patterns.values()) <= max(1, asked.m // 10)


def test_rows_that_must_be_alike_take_the_nearest_total_below():
    goal = target([(7, 30), (14, 20)], Unstructured(0.61, "row"))
    levels = goal.levels(0.3)
    patterns = goal.chosen(levels, goal.divide(levels, damages(levels)))
    got = sum(w.out_features * round(patterns[n].sparsity * w.in_features) for n, w in goal.weights.items())
    assert pruned(goal, patterns) == got and 0 <= got - round(0.61 * 490) < 7


def test_weights_of_other_patterns_keep_their_own_budget():
    one, other = Unstructured(0.5), Unstructured(0.7)
    goal = target([(10, 20)] * 4, one)
    goal.patterns.update({"2": other, "3": other})
    levels = goal.levels(0.2)
    patterns = goal.chosen(levels, goal.divide(levels, damages(levels)))
    assert patterns["0"].sparsity != patterns["1"].sparsity
    for pair, asked in ((("0", "1"), 200), (("2", "3"), 280)):
        assert sum(patterns[name].pruned(200) for name in pair) == asked


def test_a_percent_of_few_inputs_is_refused():
    goal = target([(8, 8), (8, 8)], Unstructured(0.01))
    levels = goal.levels()
    with pytest.raises(
        UserError, match="pattern 1% cannot be divided among its 2 weights: .* 127 were asked"
    ):
        goal.divide(levels, damages(levels))


@pytest.mark.parametrize("values", ["bf16", "fp32", "int8", "int4:32"])
@pytest.mark.parametrize("pattern", ["30%", "50%", "90%", "2:4", "1:4", "3:8", "1:16"])
@pytest.mark.parametrize("shape", [(24, 64), (9, 48)])
def test_bytes_are_those_of_the_layout_that_packs_such_a_weight(shape, pattern, values):
    kind, chosen = Values.parse(values), parse(pattern, "row" if pattern.endswith("%") else None)
    mask = chosen.select(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    numbers = mask.to(kind.dtype if kind.float_dtype else torch.int8)
    packed = smallest(numbers, kind)
    expected = numbers.nbytes if packed is None else packed.bytes
    said = packed_bytes(shape, kind, chosen, np.array([int(mask.sum())])).tolist()
    if packed is not None and packed.layout == "nm" and isinstance(chosen, Unstructured):
        assert said[0] > expected  # places by chance in no more than n of each m
    else:
        assert said == [expected]


def test_rows_of_any_count_take_at_most_the_bytes_that_are_said():
    kind, shape = Values.parse("int4:32"), (9, 48)
    for count in (0, 5, 100, 301, 432):
        numbers = torch.zeros(shape, dtype=torch.int8)
        numbers.view(-1)[torch.randperm(9 * 48, generator=torch.Generator().manual_seed(count))[:count]] = 1
        said = int(packed_bytes(shape, kind, Unstructured(0.5), np.array([count]))[0])
        assert 0 <= said - smallest(numbers, kind, ["bitmask", "dense"]).bytes <= 9


@pytest.mark.parametrize("pattern", ["60%", "4:8"])
@pytest.mark.parametrize("values", ["bf16", "int4:32"])
def test_a_budget_of_bytes_is_kept_within_a_step(pattern, values):
    shapes = [(64, 64), (32, 64), (160, 64)] * 2
    goal = target(shapes, parse(pattern), Costs("bytes", dict.fromkeys("012345", Values.parse(values))))
    levels = goal.levels(0.2)
    choices = goal.divide(levels, damages(levels))
    patterns = goal.chosen(levels, choices)
    asked = sum(goal.cost(name, parse(pattern)) for name in goal.weights)
    left = asked - sum(goal.cost(name, p) for name, p in patterns.items())
    assert asked == goal.asked(parse(pattern)) and left >= 0
    assert len(set(map(str, patterns.values()))) > 1
    for name, each in levels.items():
        place = choices[name].parts - each.low
        assert place == 0 or each.cost[place - 1] - each.cost[place] > left


def test_a_budget_of_time_is_interpolated_between_what_was_measured():
    times = {"64x64 bf16": [1.0, 2.0, 3.0, 4.0, 8.0]}
    costs = Costs("time", {"0": Values.parse("bf16")}, times)
    goal = target([(64, 64)], Unstructured(0.5), costs)
    middle = (DENSITIES[3] + DENSITIES[4]) / 2
    assert goal.cost("0", Unstructured(0.5)) == 3.0
    assert goal.cost("0", Unstructured(1 - middle)) == pytest.approx(6.0, abs=0.01)
