"""Statistics against their definitions in float64: sums over tokens, in odd sizes, batches and dtypes."""

import pytest
import torch

from llmsparse.errors import SolverError
from llmsparse.statistics import FirstTokens, Gram, SquaredNorm

SIZES = [1, 33, 130, 256, 257, 700, 1030]


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("width", SIZES)
def test_gram_is_the_mean_outer_product(width: int) -> None:
    inputs = tokens(3 * 37 + 1, width)
    statistics = Gram.zeros(width)
    statistics.update(inputs[:111].float().view(3, 37, width))  # (batch, time, in)
    statistics.update(inputs[111:].float())  # (tokens, in)
    exact = inputs.T @ inputs / 112
    assert statistics.tokens == 112
    assert statistics.matrix.dtype == torch.float32
    assert torch.equal(statistics.matrix, statistics.matrix.T)
    assert relative(statistics.matrix, exact) < 1e-5


def test_gram_of_float64_stays_float64() -> None:
    inputs = tokens(50, 300)
    statistics = Gram.zeros(300, dtype=torch.float64)
    statistics.update(inputs)
    assert statistics.matrix.dtype == torch.float64
    assert relative(statistics.matrix, inputs.T @ inputs / 50) < 1e-13


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
@pytest.mark.parametrize("width", [33, 700])
def test_batches_of_any_size_give_the_same_sum(kind: type[Gram] | type[SquaredNorm], width: int) -> None:
    inputs = tokens(120, width).float()
    whole, parts = kind.zeros(width), kind.zeros(width)
    whole.update(inputs)
    for part in inputs.split([1, 2, 40, 77]):
        parts.update(part)
    assert parts.tokens == whole.tokens == 120
    assert torch.allclose(read(parts), read(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
@pytest.mark.parametrize("width", [33, 700])
def test_merge_equals_one_pass(kind: type[Gram] | type[SquaredNorm], width: int) -> None:
    inputs = tokens(120, width).float()
    whole, first, second = (kind.zeros(width) for _ in range(3))
    whole.update(inputs)
    first.update(inputs[:50])
    second.update(inputs[50:])
    before = read(second).clone()
    first.merge(second)
    assert first.tokens == 120 and second.tokens == 70
    assert torch.allclose(read(first), read(whole), rtol=1e-5, atol=1e-6)
    assert torch.equal(read(second), before)


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
def test_sums_and_tokens_are_all_that_an_all_reduce_needs(kind: type[Gram] | type[SquaredNorm]) -> None:
    inputs = tokens(60, 300).float()
    whole, mine, theirs = (kind.zeros(300) for _ in range(3))
    whole.update(inputs)
    mine.update(inputs[:20])
    theirs.update(inputs[20:])
    mine.sums().add_(theirs.sums())
    mine.tokens += theirs.tokens
    assert torch.allclose(read(mine), read(whole), rtol=1e-5, atol=1e-6)


def read(statistics: Gram | SquaredNorm) -> torch.Tensor:
    return statistics.matrix if isinstance(statistics, Gram) else statistics.value


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_float32(
    kind: type[Gram] | type[SquaredNorm], dtype: torch.dtype
) -> None:
    inputs = tokens(4000, 70).to(dtype)
    statistics = kind.zeros(70)
    for part in inputs.split(500):
        statistics.update(part)
    exact = inputs.double().T @ inputs.double() / 4000
    if kind is SquaredNorm:
        exact = exact.diagonal()
    assert read(statistics).dtype == torch.float32
    assert relative(read(statistics), exact) < 1e-5


def test_update_leaves_its_input_alone_and_takes_strided_ones() -> None:
    inputs = tokens(40, 260).float()
    before = inputs.clone()
    plain, strided = Gram.zeros(130), Gram.zeros(130)
    plain.update(inputs[:, ::2].contiguous())
    strided.update(inputs[:, ::2])
    assert torch.equal(inputs, before)
    assert torch.allclose(plain.matrix, strided.matrix, rtol=1e-5, atol=1e-6)


def test_squared_norm_is_the_diagonal_of_the_gram() -> None:
    inputs = tokens(77, 300).float()
    norm, gram = SquaredNorm.zeros(300), Gram.zeros(300)
    norm.update(inputs.view(7, 11, 300))
    gram.update(inputs)
    assert norm.tokens == 77
    assert norm.value.shape == (300,)
    assert torch.allclose(norm.value, gram.matrix.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
def test_statistics_without_tokens_are_zero(kind: type[Gram] | type[SquaredNorm]) -> None:
    assert not read(kind.zeros(5)).any()


@pytest.mark.parametrize("width", [1, 33, 300])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_factor_squares_to_the_inverse_of_the_damped_gram(width: int, damping: float) -> None:
    inputs = tokens(4 * width + 3, width)
    statistics = Gram.zeros(width, dtype=torch.float64)
    statistics.update(inputs)
    factor = statistics.factor(damping)
    exact = inputs.T @ inputs / len(inputs)
    exact += damping * exact.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    assert factor.damping == damping
    assert not factor.dead.any()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    assert relative(factor.upper.T @ factor.upper, torch.linalg.inv(exact)) < 1e-9


def test_factor_is_remembered_until_the_gram_changes() -> None:
    statistics = Gram.zeros(20)
    statistics.update(tokens(100, 20).float())
    first = statistics.factor(0.01)
    assert statistics.factor(0.01) is first
    assert statistics.factor(0.02) is not first
    statistics.update(tokens(100, 20, seed=1).float())
    assert not torch.equal(statistics.factor(0.01).upper, first.upper)
    other = Gram.zeros(20)
    other.update(tokens(9, 20, seed=2).float())
    merged = statistics.factor(0.01)
    statistics.merge(other)
    assert not torch.equal(statistics.factor(0.01).upper, merged.upper)


def test_dead_inputs_are_named_and_touch_no_other() -> None:
    inputs = tokens(200, 30).float()
    inputs[:, [2, 29]] = 0.0
    statistics = Gram.zeros(30)
    statistics.update(inputs)
    factor = statistics.factor(0.01)
    assert factor.dead.nonzero().flatten().tolist() == [2, 29]
    others = factor.upper.clone().fill_diagonal_(0.0)
    assert not others[[2, 29]].any() and not others[:, [2, 29]].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_inputs_that_cannot_be_solved_are_refused(value: float) -> None:
    statistics = Gram.zeros(8)
    statistics.update(torch.full((4, 8), value))
    with pytest.raises(SolverError):
        statistics.factor(0.01)


@pytest.mark.parametrize("width", [5, 200])
def test_the_first_token_of_each_window_counts_as_often_as_asked(width: int) -> None:
    windows = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0))
    gram = FirstTokens(20.0).zeros(width)
    for window in windows:
        before = window.clone()
        gram.update(window)
        assert torch.equal(window, before)
    times = torch.ones(3, 7)
    times[:, 0] = 20
    expected = torch.einsum("wt,wti,wtj->ij", times.double(), windows.double(), windows.double()) / 21
    torch.testing.assert_close(gram.matrix.double(), expected, rtol=1e-5, atol=1e-5)
    assert gram.tokens == 21
