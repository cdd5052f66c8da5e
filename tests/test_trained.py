"""What stands behind a trained parameter: its gradients against automatic differentiation, its zeros."""

import pytest
import torch

from llmsparse.grid import Grid
from llmsparse.pattern import NM, Unstructured
from llmsparse.trained import Kept, LowRank, Rounded, Spliced


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(*shape):
    return values(*shape, seed=7) > 0


@pytest.mark.parametrize("shape", [(12, 16), (3, 12, 16)])  # a weight, and stacked experts
@pytest.mark.parametrize("masked", [True, False])
def test_low_rank_gradients_are_those_of_the_masked_sum(shape, masked):
    mask = half(*shape) if masked else None
    start = values(*shape) * (1 if mask is None else mask)
    trained = LowRank(start.clone(), mask, 4, seed=0)
    assert torch.equal(trained.value(), start)  # B begins at zero
    down, up = trained.masters
    up.data = values(*up.shape, seed=2)
    grad = values(*shape, seed=3)
    whole = start + 2 * (up @ down)
    (whole if mask is None else torch.where(mask, whole, 0.0)).backward(grad)
    wanted = [master.grad.clone() for master in trained.masters]
    trained.take(grad.clone())
    for master, expected in zip(trained.masters, wanted, strict=True):
        torch.testing.assert_close(master.grad, expected)
    if mask is not None:
        assert bool((trained.value()[~mask] == 0).all()) and not bool((whole[~mask] == 0).any())


def test_kept_numbers_stay_where_the_mask_is():
    mask = half(8, 16)
    parameter = values(8, 16) * mask
    trained = Kept(parameter, mask)
    trained.take(torch.ones(8, 16))
    assert torch.equal(trained.masters[0].grad, mask.float())
    trained.masters[0].data += 1  # an optimizer that moves everything
    assert torch.equal(trained.value() != 0, mask) and trained.value().data_ptr() == parameter.data_ptr()


def test_a_shadow_gets_the_whole_gradient_until_it_is_fixed_and_what_grows_comes_back():
    score = values(8, 16).abs() + 1
    mask = NM(2, 4).select(score)
    trained, grad = Spliced(values(8, 16) * mask, mask.clone()), values(8, 16, seed=1)
    trained.take(grad.clone())
    assert torch.equal(trained.masters[0].grad, grad)
    shadow = trained.masters[0].data
    lost = (~mask[0]).nonzero()[0, 0]
    shadow[0, lost] = 9.0

    def views(tensor):
        return {"w": tensor}

    assert trained.choose(views, {"w": NM(2, 4)}) == 1
    assert bool(trained.mask[0, lost]) and trained.value()[0, lost] == 9.0
    group = trained.mask[0, lost // 4 * 4 : lost // 4 * 4 + 4]
    assert int(group.sum()) == 2 and NM(2, 4).allows(trained.mask)
    gone = (mask & ~trained.mask).nonzero()[0]
    assert trained.value()[tuple(gone)] == 0 and shadow[tuple(gone)] != 0  # and may return
    trained.fixed = True
    trained.take(grad.clone())
    assert torch.equal(trained.masters[0].grad, grad * trained.mask)


def test_rounding_lets_gradients_through_and_gives_grid_points():
    grid, mask = Grid.parse("int4:32"), half(8, 64)
    inner = Kept(values(8, 64) * mask, mask)
    scales = {"w": grid.fit(inner.value(), mask)}
    trained = Rounded(inner, lambda tensor: {"w": tensor}, {"w": grid}, scales)
    rounded = trained.value()
    codes = rounded / grid.spread(scales["w"], 64)
    torch.testing.assert_close(codes, codes.round())
    assert float(codes.min()) >= -8 and float(codes.max()) <= 7 and bool((rounded[~mask] == 0).all())
    torch.testing.assert_close(rounded, inner.value(), rtol=0, atol=float(scales["w"].abs().max()) * 1.01)
    trained.take(torch.ones(8, 64))
    assert torch.equal(trained.masters[0].grad, mask.float())


def test_a_pattern_of_rows_keeps_its_count_when_chosen_again():
    pattern = Unstructured(0.25, "row")
    mask = pattern.select(values(8, 16))
    trained = Spliced(values(8, 16, seed=3), mask)
    trained.choose(lambda tensor: {"w": tensor}, {"w": pattern})
    assert bool((trained.mask.sum(1) == 12).all())
