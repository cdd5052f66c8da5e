"""Which groups of inputs go, and how the rest makes up for them: against trying each, and lstsq, in float64."""

import itertools

import pytest
import torch

from llmsparse.channels import fluctuation, largest, least_error, refit
from llmsparse.cuts import CHANNELS, Cut
from llmsparse.moments import Moments
from llmsparse.narrow import remove
from llmsparse.shrinking import Width
from llmsparse.skeleton import Weight


def problem(out, groups, unit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, groups * unit, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups * unit, groups * unit, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, groups * unit, generator=generator, dtype=torch.float64) @ mixing + 0.5
    return weight, inputs


def lost(weight, inputs, kept):
    """The least that the outputs change when only ``kept`` inputs may be used, by lstsq."""
    wanted = inputs @ weight.T
    return (inputs[:, kept] @ torch.linalg.lstsq(inputs[:, kept], wanted).solution - wanted).square().sum()


@pytest.mark.parametrize(("groups", "unit"), [(7, 1), (5, 3)])
def test_the_greedy_order_is_that_of_trying_every_group_anew(groups, unit):
    for seed in range(4):
        weight, inputs = problem(6, groups, unit, seed)
        members = torch.arange(groups * unit).view(groups, unit)
        alive = list(range(groups))
        inverse = torch.linalg.inv(inputs.T @ inputs / len(inputs))
        while len(alive) > 1:
            costs = {
                g: float(lost(weight, inputs, members[[a for a in alive if a != g]].flatten())) for g in alive
            }
            alive.remove(min(costs, key=costs.__getitem__))
            assert least_error(weight, inverse, groups, len(alive)).tolist() == alive


def test_removing_one_group_is_the_best_of_all_choices():
    weight, inputs = problem(4, 6, 2)
    members = torch.arange(12).view(6, 2)
    choices = itertools.combinations(range(6), 5)
    best = min(choices, key=lambda kept: float(lost(weight, inputs, members[list(kept)].flatten())))
    inverse = torch.linalg.inv(inputs.T @ inputs / len(inputs))
    assert least_error(weight, inverse, 6, 5).tolist() == list(best)


def test_a_batch_is_those_that_cost_least_at_its_start():
    weight, inputs = problem(4, 8, 1)
    inverse = torch.linalg.inv(inputs.T @ inputs / len(inputs))
    costs = [float(lost(weight, inputs, [i for i in range(8) if i != g])) for g in range(8)]
    expected = sorted(sorted(range(8), key=costs.__getitem__)[3:])
    assert least_error(weight, inverse, 8, 5, batch=3).tolist() == expected


def test_refit_is_least_squares():
    weight, inputs = problem(5, 9, 1)
    kept = torch.tensor([0, 2, 3, 7])
    found = refit(weight, inputs.T @ inputs / len(inputs), kept)
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_fluctuation_is_the_variance_of_each_input_times_the_norm_of_its_column():
    weight, inputs = problem(5, 4, 2)
    moments = Moments.zeros(8)
    for part in inputs.split(50):
        moments.update(part[None])
    found = fluctuation(weight, moments.variance.double(), 4)
    for group in range(4):
        terms = [
            float(((inputs[:, j] - inputs[:, j].mean()) ** 2).mean() * (weight[:, j] ** 2).sum())
            for j in (2 * group, 2 * group + 1)
        ]
        assert float(found[group]) == pytest.approx(sum(terms), rel=1e-4)
    order = found.argsort(descending=True)[:2].sort().values
    assert torch.equal(largest(found, 2), order)
    torch.testing.assert_close(moments.mean.double(), inputs.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.gram().matrix.double(), inputs.T @ inputs / 200, rtol=1e-4, atol=1e-4)


def test_moments_of_parts_merge_into_those_of_the_whole():
    _, inputs = problem(1, 6, 1)
    whole, first, second = Moments.zeros(6), Moments.zeros(6), Moments.zeros(6)
    whole.update(inputs)
    first.update(inputs[:120])
    second.update(inputs[120:])
    first.merge(second)
    assert first.tokens == whole.tokens == 200
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.gram().matrix, whole.gram().matrix)


@pytest.mark.parametrize("score", ["obs", "flap"])
def test_a_bias_takes_the_mean_of_what_is_gone_and_the_error_is_that_of_the_outputs(score):
    weight, inputs = (tensor.float() for tensor in problem(5, 8, 1))
    bias, moments = torch.arange(5.0), Moments.zeros(8)
    moments.update(inputs)
    cut = Cut(CHANNELS, Weight("w", "w", None, "w", 5, 8, False, 0), "b", (), 8, 5)
    found = remove(cut, weight, bias, moments, Width(0.4, score=score, compensation="bias", batch=1))
    assert torch.equal(found.weight, weight[:, found.groups])
    gone = [j for j in range(8) if j not in found.groups.tolist()]
    expected = bias + sum(weight[:, j] * inputs[:, j].mean() for j in gone)
    torch.testing.assert_close(found.bias, expected)
    change = inputs[:, found.groups] @ found.weight.T + found.bias - inputs @ weight.T - bias
    error = change.square().sum() / (inputs @ weight.T).square().sum()
    assert found.record["error"] == pytest.approx(float(error), rel=1e-3)
