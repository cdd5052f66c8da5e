"""Patterns: what they read, what they keep, and what they say about it."""

import pytest
import torch

from llmsparse.errors import UserError
from llmsparse.pattern import MANY, NM, STRIDE, Unstructured, describe, keep_largest, parse

NMS = [(2, 4), (4, 8), (1, 4), (3, 4), (8, 16), (1, 2), (5, 7)]


def scores(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("50%", Unstructured(0.5)),
        ("62.5%", Unstructured(0.625)),
        (" 2:4 ", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("8:16", NM(8, 16)),
    ],
)
def test_text_is_read_and_written_back(text: str, pattern: Unstructured | NM) -> None:
    assert parse(text) == pattern
    assert str(pattern) == text.strip()
    assert parse(str(pattern)) == pattern


def test_scope_belongs_to_unstructured_patterns() -> None:
    assert parse("60%", scope="row") == Unstructured(0.6, "row")
    assert Unstructured(0.6).scope is None
    assert Unstructured(0.6).scoped("layer") == Unstructured(0.6, "layer")
    assert Unstructured(0.6, "row").scoped("layer").scope == "row"
    with pytest.raises(UserError, match="2:4"):
        parse("2:4", scope="row")
    with pytest.raises(UserError, match="column.*row.*layer"):
        parse("50%", scope="column")


@pytest.mark.parametrize("text", ["", "50", "0.5", "2of4", "2:", ":4", "-1:4", "a:b", "50%%", "2:4:8", "-5%"])
def test_unreadable_text_is_refused_with_the_two_forms(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert "50%" in str(caught.value) and "2:4" in str(caught.value)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0:0", "0%", "100%", "150%"])
def test_patterns_that_keep_nothing_or_all_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("1:4", "keeps 25 %"), ("3:4", "keeps 75 %"), ("2:4", "keeps 50 %"), ("60%", "keeps 40 %")],
)
def test_description_says_what_is_kept(text: str, said: str) -> None:
    assert describe(parse(text)) == f"{text} ({said})"


def test_width_is_the_columns_decided_together() -> None:
    assert NM(2, 4).width == 4 and NM(1, 16).width == 16
    assert Unstructured(0.5).width is None


@pytest.mark.parametrize(("n", "m"), NMS)
def test_nm_keeps_the_n_largest_of_every_m(n: int, m: int) -> None:
    score = scores(6, 5 * m)
    mask = NM(n, m).select(score)
    assert mask.dtype == torch.bool and mask.shape == score.shape
    for values, kept in zip(score.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        assert [value for value, keep in zip(values, kept, strict=True) if keep] == [
            value for value in values if value in sorted(values)[-n:]
        ]
    assert mask.double().mean().item() == pytest.approx(n / m)


@pytest.mark.parametrize(("n", "m"), NMS)
def test_nm_ties_keep_the_lowest_index(n: int, m: int) -> None:
    expected = torch.arange(3 * m).remainder(m).lt(n).expand(4, -1)
    assert torch.equal(NM(n, m).select(torch.zeros(4, 3 * m)), expected)
    partly = torch.zeros(1, m)
    partly[0, -1] = 1.0  # the one winner is last; the other n - 1 are the first of the tied
    expected = (torch.arange(m) < n - 1) | (torch.arange(m) == m - 1)
    assert torch.equal(NM(n, m).select(partly)[0], expected)


@pytest.mark.parametrize(("n", "m"), NMS)
def test_nm_allows_what_it_selects_and_nothing_else(n: int, m: int) -> None:
    mask = NM(n, m).select(scores(4, 3 * m))
    assert NM(n, m).allows(mask)
    for flipped in range(0, mask.numel(), 5):
        other = mask.clone()
        other.view(-1)[flipped] ^= True
        assert not NM(n, m).allows(other)
    assert not NM(n, m).allows(mask[:, :-1])


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.5, 0.637, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 33), (16, 128)], ids=str)
@pytest.mark.parametrize("kind", ["random", "constant", "few values"])
def test_unstructured_counts_are_exact(sparsity: float, shape: tuple[int, int], kind: str) -> None:
    score = scores(*shape)
    if kind != "random":
        score = (score * (3 if kind == "few values" else 0)).floor()
    rows, columns = shape
    layer, row = Unstructured(sparsity, "layer"), Unstructured(sparsity, "row")
    assert int((~layer.select(score)).sum()) == round(sparsity * rows * columns)
    assert (~row.select(score)).sum(1).tolist() == [round(sparsity * columns)] * rows
    assert layer.allows(layer.select(score)) and row.allows(row.select(score))


def test_unstructured_keeps_the_largest_and_ties_by_lowest_index() -> None:
    score = torch.tensor([[3.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.0]])
    layer = Unstructured(0.5, "layer").select(score)
    assert layer.tolist() == [[True, True, True, False], [True, False, False, False]]
    row = Unstructured(0.5, "row").select(score)
    assert row.tolist() == [[True, True, False, False], [True, True, False, False]]


def test_unstructured_selects_what_a_stable_sort_would() -> None:
    score = (scores(9, 50) * 10).floor()  # ten values: many ties at the threshold
    flat = score.flatten()
    order = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))
    kept = set(order[: len(flat) - round(0.37 * len(flat))])
    mask = Unstructured(0.37, "layer").select(score).flatten().tolist()
    assert mask == [i in kept for i in range(len(flat))]


LONG = 2 * MANY  # entries: a row that is sampled first


@pytest.mark.parametrize(
    "score",
    [
        torch.randn(LONG, generator=torch.Generator().manual_seed(0)),
        torch.randint(4, (LONG,), generator=torch.Generator().manual_seed(0)).float(),
        torch.arange(LONG, dtype=torch.float64),
        torch.ones(LONG).index_fill(
            0, torch.arange(0, LONG, STRIDE), 9.0
        ),  # the sample is of the few large ones
        torch.cat((torch.zeros(LONG - 3), torch.tensor([1.0, 2.0, float("inf")]))),
    ],
    ids=["normal", "ties", "sorted", "unlike its sample", "nearly constant"],
)
@pytest.mark.parametrize("kept", [1, 2, 1000, LONG // 2, LONG - 2, LONG - 1])
def test_long_rows_are_selected_as_a_stable_sort_would(score: torch.Tensor, kept: int) -> None:
    wanted = torch.zeros(LONG, dtype=torch.bool)
    wanted[score.sort(descending=True, stable=True).indices[:kept]] = True
    assert torch.equal(keep_largest(score[None], kept)[0], wanted)


def test_row_scope_allows_only_equal_rows() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert Unstructured(0.5, "layer").allows(mask)
    assert not Unstructured(0.5, "row").allows(mask)
    assert not Unstructured(0.25, "layer").allows(mask)


def test_low_precision_scores_are_compared_exactly() -> None:
    score = scores(8, 64).bfloat16()
    assert torch.equal(
        Unstructured(0.5, "layer").select(score), Unstructured(0.5, "layer").select(score.double())
    )
    assert torch.equal(NM(2, 4).select(score), NM(2, 4).select(score.double()))
