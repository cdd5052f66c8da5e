"""What every solver in the folder must do, whatever its method: the listing is the list of tests."""

import pytest
import torch

from llmsparse import plugins
from llmsparse.errors import SolverError, UserError
from llmsparse.pattern import NM, Unstructured, parse
from llmsparse.statistics import Gram
from tests.solvers.layer import layer, solve

SOLVERS = plugins.names("solvers")
CALIBRATED = [name for name in SOLVERS if plugins.load("solvers", name).solver.statistics is not None]
FROM_GRAM = [name for name in SOLVERS if plugins.load("solvers", name).solver.statistics is Gram]
PATTERNS = [
    parse("50%"),
    parse("60%", scope="row"),
    parse("60%", scope="layer"),
    *(parse(text) for text in ("2:4", "4:8", "1:4", "3:4", "8:16")),
]
INPUTS = 176  # more than a chunk of 128, divisible by 16 and not by 5
every_solver = pytest.mark.parametrize("name", SOLVERS)
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda p: f"{p}{getattr(p, 'scope', '') or ''}"
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def negative_zeros(tensor: torch.Tensor) -> int:
    return int((tensor.eq(0) & tensor.signbit()).sum())


@every_solver
@every_pattern
@every_dtype
def test_solution_keeps_the_contract(name: str, pattern: Unstructured | NM, dtype: torch.dtype) -> None:
    case = layer(24, INPUTS)
    weight, inputs = case.weight.to(dtype), case.inputs.float()
    before = weight.clone(), inputs.clone()
    solution = solve(name, weight, inputs, pattern)

    assert solution.mask.dtype == torch.bool and solution.mask.shape == weight.shape
    assert pattern.allows(solution.mask), "the mask does not have the pattern"
    assert not solution.weight[~solution.mask].any(), "a pruned weight is not zero"
    assert negative_zeros(solution.weight[~solution.mask]) == 0, "a pruned weight is -0.0"
    assert solution.weight.dtype == dtype and solution.weight.shape == weight.shape
    assert solution.weight.isfinite().all()
    assert torch.equal(weight, before[0]) and torch.equal(inputs, before[1]), "an input was changed"

    again = solve(name, weight, inputs, pattern)
    assert torch.equal(again.weight, solution.weight) and torch.equal(again.mask, solution.mask)


@every_solver
@pytest.mark.parametrize(("text", "density"), [("1:4", 0.25), ("3:4", 0.75), ("2:4", 0.5), ("1:8", 0.125)])
def test_first_number_of_nm_is_what_is_kept(name: str, text: str, density: float) -> None:
    case = layer(16, 64)
    assert solve(name, case.weight, case.inputs, parse(text)).mask.double().mean() == density


@every_solver
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.637, 0.99])
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("inputs", [1, 7, 129])
def test_unstructured_count_is_exact_in_odd_shapes(
    name: str, sparsity: float, scope: str, inputs: int
) -> None:
    case = layer(5, inputs, tokens=300)
    pruned = (~solve(name, case.weight, case.inputs, Unstructured(sparsity, scope)).mask).sum(1)
    if scope == "row":
        assert pruned.tolist() == [round(sparsity * inputs)] * 5
    else:
        assert int(pruned.sum()) == round(sparsity * 5 * inputs)


@every_solver
@every_pattern
@pytest.mark.parametrize("value", [0.5, -0.5, 0.0])
def test_constant_matrix_is_pruned_to_the_exact_count(
    name: str, pattern: Unstructured | NM, value: float
) -> None:
    weight = torch.full((8, INPUTS), value)
    solution = solve(name, weight, layer(8, INPUTS).inputs.float(), pattern)
    assert pattern.allows(solution.mask)
    assert negative_zeros(solution.weight[~solution.mask]) == 0


# a splitting goes on between equal supports, pulled by what it pruned last
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("admm", "alps")])
@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if getattr(p, "scope", "row") == "row"], ids=lambda p: str(p)
)
def test_ties_keep_the_lowest_index(name: str, pattern: Unstructured | NM) -> None:
    inputs = 96  # inside one chunk
    group = pattern.width or inputs
    kept = pattern.n if isinstance(pattern, NM) else inputs - round(pattern.sparsity * inputs)
    first = torch.arange(inputs).remainder(group).lt(kept).expand(4, inputs)
    solution = solve(name, torch.ones(4, inputs), 3 * torch.eye(inputs), pattern)
    assert torch.equal(solution.mask, first)


@pytest.mark.parametrize("name", CALIBRATED)
@every_pattern
def test_calibrated_solver_beats_magnitude(name: str, pattern: Unstructured | NM) -> None:
    for seed in range(3):
        case = layer(24, INPUTS, seed=seed)
        mine = case.error(solve(name, case.weight, case.inputs, pattern).weight)
        theirs = case.error(solve("magnitude", case.weight, case.inputs, pattern).weight)
        assert 0 < mine < theirs


@every_solver
@every_pattern
def test_bfloat16_weights_are_scored_at_full_precision(name: str, pattern: Unstructured | NM) -> None:
    case = layer(24, INPUTS)
    weight, inputs = case.weight.bfloat16(), case.inputs.float()
    assert torch.equal(
        solve(name, weight, inputs, pattern).mask, solve(name, weight.float(), inputs, pattern).mask
    )


@every_solver
@every_pattern
def test_dead_inputs_are_no_obstacle(name: str, pattern: Unstructured | NM) -> None:
    case = layer(24, INPUTS)
    dead = torch.zeros(INPUTS, dtype=torch.bool)
    dead[[0, 3, 5, 128, 129, 130, 131, INPUTS - 1]] = True  # a whole group of four among them
    inputs = case.inputs.masked_fill(dead, 0.0).float()
    solution = solve(name, case.weight.float(), inputs, pattern)
    assert pattern.allows(solution.mask)
    assert solution.weight.isfinite().all()
    if name in CALIBRATED:
        alive_kept = solution.mask[:, ~dead].double().mean()
        assert alive_kept > solution.mask[:, dead].double().mean(), "dead inputs must be pruned first"


@pytest.mark.parametrize("name", FROM_GRAM)
@every_pattern
def test_fewer_tokens_than_inputs_still_solve(name: str, pattern: Unstructured | NM) -> None:
    case = layer(24, INPUTS, tokens=20)
    solution = solve(name, case.weight.float(), case.inputs.float(), pattern)
    assert pattern.allows(solution.mask) and solution.weight.isfinite().all()
    assert solution.notes["damping"] > 0
    assert solution.weight.abs().max() < 20 * case.weight.abs().max(), "damping must keep weights in range"


@pytest.mark.parametrize("name", FROM_GRAM)
@pytest.mark.parametrize(("lowest", "needed"), [(0.0, 0.01), (-0.02, 0.03), (-0.05, 0.1), (-0.7, 1.0)])
def test_damping_escalates_until_the_gram_is_definite_and_is_recorded(
    name: str, lowest: float, needed: float
) -> None:
    """A Gram whose lowest eigenvalue is ``lowest`` times its mean diagonal needs damping above minus that."""
    pattern = parse("2:4")
    case = layer(16, 64)
    statistics = Gram(indefinite(case.gram, lowest), tokens=1)
    solution = plugins.load("solvers", name).solver(damping=0.01)(case.weight, statistics, pattern)
    assert solution.notes["damping"] == pytest.approx(needed)
    assert pattern.allows(solution.mask) and solution.weight.isfinite().all()


def indefinite(gram: torch.Tensor, lowest: float) -> torch.Tensor:
    """``gram`` with its lowest eigenvalue moved to ``lowest`` times the mean diagonal that it then has."""
    values, vectors = torch.linalg.eigh(gram)
    values[0] = lowest * values[1:].sum() / (len(values) - lowest)
    return vectors * values @ vectors.T


@pytest.mark.parametrize("name", FROM_GRAM)
@pytest.mark.parametrize("fault", ["nan", "infinity", "indefinite"])
def test_hopeless_gram_fails_loudly(name: str, fault: str) -> None:
    case = layer(16, 64)
    matrix = case.gram
    if fault == "indefinite":
        matrix = indefinite(matrix, -20.0)
    else:
        matrix[3, 3] = float(fault)
    with pytest.raises(SolverError) as caught:
        plugins.load("solvers", name).solver()(case.weight, Gram(matrix, tokens=1), parse("50%"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", FROM_GRAM)
@pytest.mark.parametrize("damping", [0.0, -0.1])
def test_damping_must_be_positive(name: str, damping: float) -> None:
    with pytest.raises(UserError, match="damping must be positive"):
        plugins.load("solvers", name).solver(damping=damping)
