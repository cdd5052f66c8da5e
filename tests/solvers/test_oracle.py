"""Each solver against a plain loop written here from its published equations, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmsparse.pattern import NM, Unstructured, parse
from tests.solvers.layer import Layer, layer, solve

CHUNK = 128
PATTERNS = [
    parse("50%"),
    parse("63.7%"),
    parse("60%", scope="row"),
    parse("60%", scope="layer"),
    *(parse(text) for text in ("2:4", "4:8", "1:4", "3:4", "8:16")),
]
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda p: f"{p}{getattr(p, 'scope', '') or ''}"
)


def mark_lowest(scores: Sequence[float], count: int) -> list[bool]:
    """True for all but the ``count`` lowest scores; among equals the highest index goes first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    pruned = set(order[:count])
    return [i not in pruned for i in range(len(scores))]


def mask_of(scores: Tensor, pattern: Unstructured | NM, scope: str) -> Tensor:
    """The mask of ``scores`` (out, in) with one comparison per row, per group of m, or over everything."""
    rows, columns = scores.shape
    if isinstance(pattern, NM):
        groups = scores.reshape(-1, pattern.m).tolist()
        return torch.tensor([mark_lowest(group, pattern.m - pattern.n) for group in groups]).reshape(
            rows, columns
        )
    if (pattern.scope or scope) == "row":
        return torch.tensor([mark_lowest(row, round(pattern.sparsity * columns)) for row in scores.tolist()])
    flat = scores.flatten().tolist()
    return torch.tensor(mark_lowest(flat, round(pattern.sparsity * len(flat)))).reshape(rows, columns)


def plain_sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Unstructured | NM,
    damping: float = 0.01,
    chunk: int = CHUNK,
    group_by_group: bool = True,
) -> tuple[Tensor, Tensor]:
    """SparseGPT column by column; ``group_by_group=False`` picks a chunk's n:m masks before it is swept."""
    weight, gram = weight.clone(), gram.clone()
    rows, inputs = weight.shape
    dead = gram.diagonal() == 0
    strength = damping * gram.diagonal().mean()
    gram[dead, dead] = 1.0
    weight[:, dead] = 0.0
    gram += strength * torch.eye(inputs, dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    initial = weight**2 / upper.diagonal() ** 2
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, inputs, chunk):
        end = min(start + chunk, inputs)
        if isinstance(pattern, Unstructured):
            scores = weight[:, start:end] ** 2 / upper.diagonal()[start:end] ** 2
            mask[:, start:end] = chunk_mask(scores, initial, pattern, start, end)
        for j in range(start, end):
            if isinstance(pattern, NM):
                span = pattern.m if group_by_group else chunk
                if j % span == 0:
                    stop = min(j + span, inputs)
                    scores = weight[:, j:stop] ** 2 / upper.diagonal()[j:stop] ** 2
                    mask[:, j:stop] = mask_of(scores, pattern, "")
            pruned = ~mask[:, j]
            error = weight[:, j] * pruned / upper[j, j]
            for later in range(j + 1, inputs):
                weight[:, later] -= error * upper[j, later]
            weight[pruned, j] = 0.0
    return weight, mask


def chunk_mask(scores: Tensor, initial: Tensor, pattern: Unstructured, start: int, end: int) -> Tensor:
    """The unstructured mask of columns start..end: the scope says how many go, the scores say which."""
    rows = len(scores)
    if pattern.scope == "row":
        count = round(pattern.sparsity * end) - round(pattern.sparsity * start)
        return torch.tensor([mark_lowest(row, count) for row in scores.tolist()])
    if pattern.scope == "layer":
        count = int((~mask_of(initial, pattern, "layer"))[:, start:end].sum())
    else:
        count = round(pattern.sparsity * (rows * end)) - round(pattern.sparsity * (rows * start))
    return torch.tensor(mark_lowest(scores.flatten().tolist(), count)).reshape(scores.shape)


def expected(name: str, case: Layer, pattern: Unstructured | NM) -> tuple[Tensor, Tensor]:
    if name == "sparsegpt":
        return plain_sparsegpt(case.weight, case.gram, pattern)
    scores = case.weight.abs()
    if name == "wanda":
        scores = scores * case.inputs.norm(dim=0)
    mask = mask_of(scores, pattern, {"magnitude": "layer", "wanda": "row"}[name])
    return case.weight * mask, mask


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@every_pattern
@pytest.mark.parametrize("shape", [(16, 272), (33, 128), (7, 48)], ids=str)
def test_solver_equals_the_plain_loop(name: str, pattern: Unstructured | NM, shape: tuple[int, int]) -> None:
    case = layer(*shape)
    weight, mask = expected(name, case, pattern)
    solution = solve(name, case.weight, case.inputs, pattern)
    assert torch.equal(solution.mask, mask)
    assert (solution.weight - weight).abs().max() < 1e-6


@every_pattern
def test_sparsegpt_with_dead_inputs_equals_the_plain_loop(pattern: Unstructured | NM) -> None:
    case = layer(12, 144)
    inputs = case.inputs.clone()
    inputs[:, [0, 17, 18, 19, 130, 143]] = 0.0
    weight, mask = plain_sparsegpt(case.weight, Layer(case.weight, inputs).gram, pattern)
    solution = solve("sparsegpt", case.weight, inputs, pattern)
    assert torch.equal(solution.mask, mask)
    assert (solution.weight - weight).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 32, 100, 1000])
def test_sparsegpt_chunk_option_equals_the_plain_loop(chunk: int) -> None:
    case = layer(12, 144)
    for pattern in (parse("50%"), parse("60%", scope="row"), parse("60%", scope="layer")):
        weight, mask = plain_sparsegpt(case.weight, case.gram, pattern, damping=0.05, chunk=chunk)
        solution = solve("sparsegpt", case.weight, case.inputs, pattern, damping=0.05, chunk=chunk)
        assert torch.equal(solution.mask, mask)
        assert (solution.weight - weight).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@every_pattern
def test_float32_agrees_with_float64(name: str, pattern: Unstructured | NM) -> None:
    case = layer(64, 384)
    exact = solve(name, case.weight, case.inputs, pattern)
    single = solve(name, case.weight.float(), case.inputs.float(), pattern)
    assert (single.mask == exact.mask).double().mean() >= 0.999
    assert case.error(single.weight) == pytest.approx(case.error(exact.weight), rel=1e-3)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_masks_chosen_a_chunk_at_once_are_clearly_worse(text: str) -> None:
    """The fault that contract tests cannot see: n:m masks from weights that the sweep has yet to update."""
    pattern = parse(text)
    ours = hasty = 0.0
    for seed in range(3):
        case = layer(32, 256, seed=seed)
        ours += case.error(solve("sparsegpt", case.weight, case.inputs, pattern).weight)
        hasty += case.error(plain_sparsegpt(case.weight, case.gram, pattern, group_by_group=False)[0])
    assert hasty > 1.05 * ours


@pytest.mark.parametrize(("sparsity", "rows", "inputs"), [(0.637, 5, 300), (0.5, 3, 257), (0.301, 1, 513)])
def test_sparsegpt_has_pruned_its_share_after_every_chunk(sparsity: float, rows: int, inputs: int) -> None:
    case = layer(rows, inputs)
    whole = ~solve("sparsegpt", case.weight, case.inputs, Unstructured(sparsity)).mask
    by_row = ~solve("sparsegpt", case.weight, case.inputs, Unstructured(sparsity, "row")).mask
    for end in [*range(CHUNK, inputs, CHUNK), inputs]:
        assert int(whole[:, :end].sum()) == round(sparsity * (rows * end))
        assert by_row[:, :end].sum(1).tolist() == [round(sparsity * end)] * rows


def test_sparsegpt_layer_scope_prunes_more_where_the_initial_scores_are_lower() -> None:
    case = layer(16, 256)
    weight = case.weight.clone()
    weight[:, :CHUNK] *= 0.3
    pruned = ~solve("sparsegpt", weight, case.inputs, parse("50%", scope="layer")).mask
    assert int(pruned.sum()) == 16 * 256 // 2
    assert pruned[:, :CHUNK].double().mean() > 0.6 > 0.4 > pruned[:, CHUNK:].double().mean()


def test_own_scopes_are_layer_row_and_chunk() -> None:
    case = layer(16, 256)
    weight = case.weight.clone()
    weight[:8] *= 0.2
    counts = {
        name: (~solve(name, weight, case.inputs, parse("50%")).mask)
        for name in ("magnitude", "wanda", "sparsegpt")
    }
    assert counts["wanda"].sum(1).unique().tolist() == [128]
    assert counts["magnitude"].sum(1).unique().numel() > 1
    assert counts["sparsegpt"][:, :CHUNK].sum() == counts["sparsegpt"][:, CHUNK:].sum() == 16 * CHUNK // 2
    assert counts["sparsegpt"].sum(1).unique().numel() > 1


@pytest.mark.parametrize("text", ["50%", "2:4", "4:8"])
def test_errors_order_as_the_methods_do(text: str) -> None:
    case = layer(48, 384)
    errors = [
        case.error(solve(name, case.weight, case.inputs, parse(text)).weight)
        for name in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors[0] < 0.9 * errors[1] < errors[2]
