"""Scales fitted in one launch: equal to the grid's own fit."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmsparse.grid import Grid
from llmsparse.kernels import grid_fit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [Grid(3, 32), Grid(4, 32), Grid(4, 64), Grid(4, 128)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def random_group(group: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """``columns`` (group, out) of many sizes, what is ``kept`` of them, ``importance`` (group,)."""
    random = torch.Generator().manual_seed(group + outputs)
    size = 10.0 ** torch.randint(-7, 4, (outputs,), generator=random)
    columns = torch.randn(group, outputs, generator=random) * size
    kept = torch.rand(group, outputs, generator=random) < 0.6
    return columns, kept, torch.rand(group, generator=random) + 0.1


def fit(columns: Tensor, kept: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    codes = grid_fit.Codes(grid.tried, *grid.range)
    return grid_fit.fit(columns.to(DEVICE), kept.to(DEVICE), importance.to(DEVICE), codes).cpu()


def wrong(columns: Tensor, kept: Tensor, importance: Tensor, grid: Grid, scales: Tensor) -> Tensor:
    """The weighed squared error (out,) of rounding with ``scales`` (out,), in float64."""
    values = (columns * kept).double().T
    codes = grid._codes(values, scales.double()[:, None])
    return ((values - codes * scales.double()[:, None]).square() * importance).sum(1)


@every_grid
@pytest.mark.parametrize(("columns", "outputs"), [(0, 33), (0, 1), (-8, 7)])
def test_scales_are_those_of_the_grid(grid: Grid, columns: int, outputs: int) -> None:
    """The last group of a row may have ``columns`` fewer."""
    assert grid.group is not None
    case = random_group(grid.group + columns, outputs)
    found = fit(*case, grid)
    expected = grid.fit(case[0].T.contiguous(), case[1].T, case[2])[:, 0]
    assert (found == expected).double().mean() >= 0.96, "sums in another order change few of them"
    best = wrong(*case, grid, grid.fit(case[0].double().T, case[1].T, case[2].double())[:, 0])
    assert (wrong(*case, grid, found) <= best * 1.001).all()


@every_grid
def test_the_reference_does_the_same(grid: Grid) -> None:
    assert grid.group is not None
    case = random_group(grid.group, 20)
    codes = grid_fit.Codes(grid.tried, *grid.range)
    expected = grid.fit(case[0].T.contiguous(), case[1].T, case[2])[:, 0]
    assert (grid_fit.reference(*case, codes) == expected).double().mean() >= 0.95


@every_grid
def test_numbers_of_the_grid_are_fitted_exactly(grid: Grid) -> None:
    """Codes times a scale with few bits: only that scale leaves no error."""
    assert grid.group is not None
    low, high = grid.range
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, (grid.group, 12), generator=random).float()
    codes[3] = low  # the whole range, so that no other scale will do
    scales = 2.0 ** torch.randint(-6, 3, (12,), generator=random) * 1.5
    kept = torch.ones_like(codes, dtype=torch.bool)
    assert torch.equal(fit(codes * scales, kept, torch.ones(grid.group), grid), scales)


def test_what_is_pruned_does_not_count_and_nothing_kept_gives_zero() -> None:
    columns, kept, importance = random_group(32, 18)
    kept[:, 4] = False
    other = torch.where(kept, columns, 1e6)
    found = fit(columns, kept, importance, Grid(4, 32))
    assert torch.equal(found, fit(other, kept, importance, Grid(4, 32)))
    assert found[4] == 0 and found.isfinite().all()


@pytest.mark.parametrize("value", [0.5, -0.5, -0.0, 2.0**-26, 1e9])
def test_constant_and_extreme_weights_are_fitted_as_by_the_grid(value: float) -> None:
    columns, kept = torch.full((32, 3), value), torch.ones(32, 3, dtype=torch.bool)
    expected = Grid(4, 32).fit(columns.T.contiguous(), kept.T, torch.ones(32))[:, 0]
    assert torch.equal(fit(columns, kept, torch.ones(32), Grid(4, 32)), expected)


def test_fits_are_deterministic_and_read_what_is_not_contiguous() -> None:
    columns, kept, importance = random_group(32, 20)
    other = columns.T.contiguous().T, kept.T.contiguous().T, importance
    first = fit(columns, kept, importance, Grid(4, 32))
    assert torch.equal(first, fit(columns, kept, importance, Grid(4, 32)))
    assert torch.equal(first, fit(*other, Grid(4, 32)))


def test_what_it_cannot_fit_is_refused() -> None:
    columns, kept, importance = random_group(144, 2)
    with pytest.raises(ValueError, match="144 columns"):
        fit(columns, kept, importance, Grid(4, 144))
    with pytest.raises(ValueError, match="float64"):
        fit(columns[:32].double(), kept[:32], importance[:32], Grid(4, 32))
