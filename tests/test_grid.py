"""Codes and scales: exact in every format, zeros stay zero, and fitted as well as a search by force."""

import numpy as np
import pytest
import torch

from llmsparse.errors import UserError
from llmsparse.grid import Grid

GRIDS = [Grid.parse(text) for text in ("int8", "int4:32", "int4:64")]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def weights(outputs: int, inputs: int, scale: float = 0.05, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=random) * scale


@every_grid
def test_a_grid_reads_what_it_writes(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize("text", ["int2", "int4", "int8:32", "fp8", "", "int4:0", "int4:12", "int4:x"])
def test_unknown_values_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="values|group"):
        Grid.parse(text)


def test_other_grids_are_refused() -> None:
    with pytest.raises(UserError, match="bits"):
        Grid(2)
    with pytest.raises(UserError, match="symmetric"):
        Grid(8, symmetric=False)


@every_grid
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-4, 0.05, 30.0, 1e5])
def test_scales_are_the_same_number_in_fp16_and_bf16(grid: Grid, scale: float) -> None:
    scales = grid.fit(weights(16, 128, scale))
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    mantissa = torch.frexp(scales).mantissa * 256
    assert torch.equal(mantissa, mantissa.round()), "more than 8 significant bits"


@every_grid
@pytest.mark.parametrize("inputs", [1, 31, 64, 70, 129])
def test_codes_are_whole_numbers_in_range_and_the_nearest(grid: Grid, inputs: int) -> None:
    weight = weights(9, inputs)
    codes, scales = grid.nearest(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scales.shape == (9, grid.groups(inputs))
    low, high = grid.range
    assert low <= int(codes.min()) and int(codes.max()) <= high
    values = grid.values(codes, scales).numpy()
    group = grid.group or inputs
    for i in range(9):
        for j in range(inputs):  # an independent, plain reading of what a code means
            step = np.float32(scales[i, j // group])
            assert values[i, j] == np.float32(codes[i, j]) * step
            points = np.arange(low, high + 1, dtype=np.float32) * step
            assert abs(values[i, j] - float(weight[i, j])) <= abs(points - float(weight[i, j])).min() * 1.0001


@every_grid
def test_what_is_pruned_is_plus_zero_with_code_zero(grid: Grid) -> None:
    weight = -weights(8, 128).abs()
    mask = weights(8, 128, seed=1) > 0
    codes, scales = grid.nearest(weight, mask)
    values = grid.values(codes, scales)
    assert not codes[~mask].any() and not values[~mask].any()
    assert not values[values == 0].signbit().any()


@every_grid
def test_scales_are_fitted_to_the_kept_weights_alone(grid: Grid) -> None:
    weight = weights(8, 128)
    mask = weights(8, 128, seed=1) > 0
    loud = torch.where(mask, weight, 100.0)
    assert torch.equal(grid.fit(loud, mask), grid.fit(weight, mask))


@every_grid
def test_unfitted_scales_hold_every_weight_within_half_a_step(grid: Grid) -> None:
    weight = weights(8, 128)
    codes, scales = grid.unfitted(weight)
    step = grid.spread(scales, 128)
    assert ((grid.values(codes, scales) - weight).abs() <= 0.51 * step + weight.abs() / 256).all()


@every_grid
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_fit_is_near_the_best_scale_that_force_finds(grid: Grid, density: float) -> None:
    weight = weights(64, 512)
    mask = torch.rand(64, 512, generator=torch.Generator().manual_seed(2)) < density
    kept = weight * mask
    group = grid.group or 512
    codes, scales = grid.nearest(weight, mask)
    mine = (grid.values(codes, scales) - kept).square().unflatten(1, (-1, group)).sum(-1)
    grouped = kept.unflatten(1, (-1, group))
    low, high = grid.range
    best = torch.full_like(mine, torch.inf)
    for ratio in torch.linspace(0.5, 1.3, 400):
        for sign in (1, -1):
            step = (sign * ratio * grouped.abs().amax(-1, keepdim=True) / high).bfloat16().float()
            rounded = (grouped / step).round().clamp(low, high) * step
            best = torch.minimum(best, (rounded - grouped).square().sum(-1))
    assert float(mine.sum() / best.sum()) < 1.06


@every_grid
def test_importance_moves_the_error_to_where_it_costs_less(grid: Grid) -> None:
    weight, importance = weights(32, 128), torch.ones(128)
    importance[::2] = 100.0

    def cost(scales: torch.Tensor) -> float:
        wrong = grid.values(grid.codes(weight, scales), scales) - weight
        return float((wrong.square() * importance).sum())

    assert cost(grid.fit(weight, importance=importance)) < cost(grid.fit(weight))


@every_grid
def test_rows_and_groups_of_zeros_are_zero(grid: Grid) -> None:
    weight = weights(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    codes, scales = grid.nearest(weight)
    values = grid.values(codes, scales)
    assert scales.isfinite().all() and not values[1].any() and not values[2, :64].any()
