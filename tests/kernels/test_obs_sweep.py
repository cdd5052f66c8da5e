"""SparseGPT's sweep in one launch: equal to a plain loop written here, alone and inside the solver."""

import logging
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmsparse.grid import Grid
from llmsparse.kernels import grid_fit, obs_sweep
from llmsparse.pattern import NM, Existing, Pattern, parse
from llmsparse.solution import Solution
from llmsparse.solvers import sparsegpt
from llmsparse.solvers.sparsegpt import SparseGPT
from llmsparse.statistics import Gram
from tests.solvers.layer import Layer, layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [None, (2, 4), (4, 8), (1, 4), (8, 16), (3, 6), (20, 36)]
BITS = [0, 4, 8]
every_kind = pytest.mark.parametrize("nm", KINDS, ids=lambda nm: "{}:{}".format(*nm) if nm else "mask")
every_bits = pytest.mark.parametrize("bits", BITS)


class Swept(NamedTuple):
    columns: Tensor
    kept: Tensor
    errors: Tensor
    codes: Tensor


class Case(NamedTuple):
    """A chunk: ``columns`` and ``kept`` (chunk, out), ``upper`` (chunk, chunk), ``scale`` (out,)."""

    columns: Tensor
    kept: Tensor
    upper: Tensor
    scale: Tensor

    def sweep(self, nm: tuple[int, int] | None, bits: int) -> Swept:
        """The kernel's outputs, on the CPU; what it is to fill is poisoned."""
        columns, upper = self.columns.to(DEVICE, copy=True), self.upper.to(DEVICE)
        kept = (torch.ones_like(self.kept) if nm else self.kept).to(DEVICE, copy=True)
        errors = torch.full_like(columns, torch.nan)
        codes = torch.full(columns.shape, 99, dtype=torch.int8, device=DEVICE)
        rounding = (
            obs_sweep.Rounding(self.scale.to(DEVICE), codes, *Grid(bits, bits * 8).range) if bits else None
        )
        obs_sweep.sweep(columns, kept, upper, errors, nm, rounding)
        return Swept(*(tensor.cpu() for tensor in (columns, kept, errors, codes)))

    def plain(self, nm: tuple[int, int] | None, bits: int) -> Swept:
        """The same by Python's loops over numbers, in float64."""
        columns, upper = self.columns.double(), self.upper.double()
        kept, errors, codes = self.kept.clone(), torch.zeros_like(columns), torch.full(columns.shape, 99)
        for row in range(columns.shape[1]):
            weights = columns[:, row]
            for j in range(len(weights)):
                if nm and j % nm[1] == 0:
                    scores = [(float(weights[i] / upper[i, i]) ** 2, -i) for i in range(j, j + nm[1])]
                    largest = [-index for _, index in sorted(scores)[-nm[0] :]]
                    kept[j : j + nm[1], row] = torch.tensor([i in largest for i in range(j, j + nm[1])])
                value = float(weights[j]) if kept[j, row] else 0.0
                if bits:
                    low, high = Grid(bits, bits * 8).range
                    codes[j, row] = min(max(round(value / float(self.scale[row])), low), high)
                    value = int(codes[j, row]) * float(self.scale[row])
                errors[j, row] = (weights[j] - value) / upper[j, j]
                weights[j + 1 :] -= upper[j, j + 1 :] * errors[j, row]
        return Swept(columns, kept, errors, codes.to(torch.int8))


def exact(count: int, outputs: int, seed: int = 0) -> Case:
    """Integers, few links between columns: every number of the sweep is exact in float32, and scores tie often."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random).float()

    links = torch.rand(count, count, generator=random) < 2 / count
    upper = (integers(-1, 2, count, count) * links).triu(1) + torch.diag(2 ** integers(-1, 2, count))
    kept = torch.rand(count, outputs, generator=random) < 0.5
    return Case(integers(-9, 10, count, outputs), kept, upper, 2 ** integers(-1, 2, outputs))


def real(count: int, outputs: int) -> Case:
    """The factor of a random layer's damped Gram, and its weight."""
    case = layer(outputs, count)
    gram = case.gram + 0.01 * case.gram.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    columns = case.weight.T.contiguous()
    kept = columns**2 / upper.diagonal()[:, None] ** 2
    scale = (columns.abs().amax(0) / 7).bfloat16()
    return Case(columns.float(), kept > kept.median(), upper.float(), scale.float())


def whole(columns: int, nm: tuple[int, int] | None) -> int:
    """The largest number of groups' columns up to ``columns``."""
    return columns // nm[1] * nm[1] if nm else columns


@every_kind
@every_bits
def test_exact_numbers_are_equal(nm: tuple[int, int] | None, bits: int) -> None:
    check_exact(exact(whole(40, nm), 7), nm, bits)


@pytest.mark.parametrize(("nm", "bits"), [(None, 8), ((2, 4), 0)], ids=str)
@pytest.mark.parametrize("outputs", [1, 16, 65])
def test_any_number_of_rows_is_swept(nm: tuple[int, int] | None, bits: int, outputs: int) -> None:
    check_exact(exact(20, outputs), nm, bits)


def check_exact(case: Case, nm: tuple[int, int] | None, bits: int) -> None:
    mine, theirs = case.sweep(nm, bits), case.plain(nm, bits)
    assert theirs.columns.abs().max() < 2**20, "not exact in float32: the test is at fault"
    assert torch.equal(mine.kept, theirs.kept)
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.columns.double(), theirs.columns)
    assert torch.equal(mine.errors.double(), theirs.errors)


@pytest.mark.parametrize("nm", [None, (2, 4), (8, 16)], ids=str)
@every_bits
def test_random_numbers_agree(nm: tuple[int, int] | None, bits: int) -> None:
    case = real(48, 7)
    mine, theirs = case.sweep(nm, bits), case.plain(nm, bits)
    assert torch.equal(mine.kept, theirs.kept) and torch.equal(mine.codes, theirs.codes)
    for ours, exactly in ((mine.columns, theirs.columns), (mine.errors, theirs.errors)):
        assert (ours.double() - exactly).norm() < 1e-5 * exactly.norm()


@every_bits
@pytest.mark.parametrize("nm", [None, (2, 4), (8, 16)], ids=str)
def test_the_reference_does_the_same(nm: tuple[int, int] | None, bits: int) -> None:
    case = exact(48, 5)
    columns, kept, codes = case.columns.double(), case.kept.clone(), torch.zeros(48, 5, dtype=torch.int8)
    errors, scale = torch.zeros_like(columns), case.scale.double()
    rounding = obs_sweep.Rounding(scale, codes, *Grid(bits, bits * 8).range) if bits else None
    obs_sweep.reference(columns, kept, case.upper.double(), errors, nm, rounding)
    mine = case.sweep(nm, bits)
    assert torch.equal(mine.kept, kept) and torch.equal(mine.errors.double(), errors)
    assert torch.equal(mine.columns.double(), columns)
    assert not bits or torch.equal(mine.codes, codes)


@pytest.mark.parametrize("count", [1, 4, 20, 36, 128])
def test_short_chunks_and_tails_are_swept(count: int) -> None:
    case = exact(count, 3)
    for nm in (None, (1, 4)):
        if nm is None or count % 4 == 0:
            assert torch.equal(case.sweep(nm, 0).errors.double(), case.plain(nm, 0).errors)


@pytest.mark.parametrize("value", [-0.5, -0.0])
@pytest.mark.parametrize("nm", [(2, 4), (3, 6), (5, 36)], ids=str)
def test_ties_keep_the_lowest_index(nm: tuple[int, int], value: float) -> None:
    case = exact(72, 5)._replace(columns=torch.full((72, 5), value), upper=torch.eye(72))
    first = torch.arange(72).remainder(nm[1]) < nm[0]
    assert torch.equal(case.sweep(nm, 0).kept, first[:, None].expand(72, 5))


def test_halves_are_rounded_to_even_and_codes_end_at_the_range() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5, 1e30, -1e30, 0.49999997, -0.0])[:, None]
    case = Case(values, torch.ones_like(values, dtype=torch.bool), torch.eye(12), torch.ones(1))
    assert case.sweep(None, 4).codes.flatten().tolist() == [0, 2, 2, 0, -2, -2, 6, 7, 7, -8, 0, 0]
    assert case.sweep(None, 8).codes.flatten().tolist() == [0, 2, 2, 0, -2, -2, 6, 8, 127, -127, 0, 0]


def test_a_scale_of_zero_gives_code_zero() -> None:
    case = exact(16, 4)._replace(scale=torch.zeros(4))
    assert not case.sweep(None, 8).codes.any()


def test_nothing_beyond_the_chunk_is_written() -> None:
    columns, kept = (
        torch.full((24, 7), 3.0, device=DEVICE),
        torch.ones(24, 7, dtype=torch.bool, device=DEVICE),
    )
    errors, before = torch.full_like(columns, 5.0), columns.clone()
    obs_sweep.sweep(columns[4:12], kept[4:12], torch.eye(8, device=DEVICE), errors[4:12], (1, 4))
    outside = [*range(4), *range(12, 24)]
    assert (
        torch.equal(columns[outside], before[outside])
        and kept[outside].all()
        and (errors[outside] == 5).all()
    )
    assert kept[4:12].sum() == 2 * 7 and (errors[4:12] != 5).all()


def test_a_factor_that_is_not_contiguous_is_read_right() -> None:
    case = exact(20, 3)
    whole = torch.full((40, 50), torch.nan)
    whole[10:30, 20:40] = case.upper.T
    other = case._replace(upper=whole[10:30, 20:40].T)
    assert torch.equal(other.sweep((2, 4), 0).errors, case.sweep((2, 4), 0).errors)


@every_bits
def test_sweeps_are_deterministic(bits: int) -> None:
    case = real(36, 20)
    first, second = case.sweep((2, 4), bits), case.sweep((2, 4), bits)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_it_cannot_sweep_is_refused() -> None:
    columns, kept, upper = torch.ones(8, 4), torch.ones(8, 4, dtype=torch.bool), torch.eye(8)
    with pytest.raises(ValueError, match="float32"):
        obs_sweep.sweep(columns.double(), kept, upper, torch.zeros(8, 4))
    with pytest.raises(ValueError, match="divide 8 columns"):
        obs_sweep.sweep(columns, kept, upper, torch.zeros(8, 4), (2, 5))


# the solver


def gram_of(case: Layer, dead: tuple[int, ...] = ()) -> Gram:
    inputs = case.inputs.float()
    inputs[:, list(dead)] = 0.0
    gram = Gram.zeros(inputs.shape[1], device=DEVICE)
    gram.update(inputs.to(DEVICE))
    return gram


def both(
    monkeypatch: pytest.MonkeyPatch,
    case: Layer,
    pattern: Pattern,
    grid: Grid | None,
    dead: tuple[int, ...] = (),
) -> tuple[Solution, Solution]:
    """The solver's solutions in float32, from launches and from the plain loop."""
    found = []
    for devices in ((DEVICE,), ()):
        monkeypatch.setattr(sparsegpt, "LAUNCHED", devices)
        solution = SparseGPT()(case.weight.float().to(DEVICE), gram_of(case, dead), pattern, grid)
        found.append(Solution(*(t if t is None else t.cpu() for t in solution[:4])))
    return found[0], found[1]


@pytest.mark.parametrize("pattern", [parse("50%"), NM(2, 4), NM(8, 16), Existing()], ids=str)
@pytest.mark.parametrize("values", [None, "int8", "int4:32"])
def test_the_solver_gives_the_same_with_launches(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, values: str | None
) -> None:
    case = layer(12, 144)
    launched, plain = both(monkeypatch, case, pattern, Grid.parse(values) if values else None)
    assert pattern.allows(launched.mask)
    assert (launched.mask == plain.mask).double().mean() >= 0.999
    assert case.error(launched.weight) == pytest.approx(case.error(plain.weight), rel=1e-3)
    if values:
        assert launched.codes is not None and plain.codes is not None
        assert (launched.codes == plain.codes).double().mean() >= 0.99  # sums in another order
        assert not launched.codes[~launched.mask].any()


def test_the_solver_gives_the_same_with_dead_inputs_and_constant_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = layer(5, 80)
    dead = (0, 3, 17, 64, 65, 66, 67, 79)
    for weight in (case.weight, torch.full_like(case.weight, 0.5), torch.full_like(case.weight, -0.0)):
        for pattern in (parse("50%"), NM(2, 4)):
            launched, plain = both(monkeypatch, case._replace(weight=weight), pattern, None, dead)
            assert torch.equal(launched.mask, plain.mask)
            assert (launched.weight - plain.weight).abs().max() < 1e-5
            assert not launched.weight[~launched.mask].signbit().any()


def test_every_launch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is one launch, with grouped scales two for each group: the plain loop is not taken by mistake."""
    launches: list[tuple[str, int]] = []

    def counted(module: ModuleType, name: str) -> None:
        launch = getattr(module, name)

        def count(columns: Tensor, *rest: object) -> object:
            launches.append((name, len(columns)))
            return launch(columns, *rest)

        monkeypatch.setattr(module, name, count)

    case = layer(4, 192)
    assert not sparsegpt._does_not_run(gram_of(case).total.device)  # remembered: it launches as well
    monkeypatch.setattr(sparsegpt, "LAUNCHED", (DEVICE,))
    counted(obs_sweep, "sweep")
    counted(grid_fit, "fit")
    for grid, expected in (
        (None, [("sweep", 128), ("sweep", 64)]),
        (Grid(4, 32), [("fit", 32), ("sweep", 32)] * 6),
    ):
        launches.clear()
        SparseGPT()(case.weight.float().to(DEVICE), gram_of(case), NM(2, 4), grid)
        assert launches == expected


@pytest.mark.parametrize(
    ("pattern", "grid", "dtype", "reason"),
    [
        (NM(2, 4), None, torch.float32, ""),
        (NM(8, 16), Grid(4, 32), torch.float32, ""),
        (NM(3, 6), Grid(8), torch.float32, ""),
        (None, Grid(4, 32), torch.float32, ""),
        (parse("50%"), Grid(4, 64), torch.float32, ""),
        (NM(2, 4), None, torch.float64, "float64"),
        (NM(3, 6), Grid(4, 32), torch.float32, "cross"),
        (parse("50%"), Grid(4, 256), torch.float32, "groups of up to 128"),
        (NM(2, 130), None, torch.float32, "m up to 128"),
    ],
    ids=str,
)
def test_what_is_launched(
    pattern: Pattern | None, grid: Grid | None, dtype: torch.dtype, reason: str
) -> None:
    found = sparsegpt._not_launched(dtype, pattern, grid)
    assert reason in found if reason else not found
    assert sparsegpt.WIDEST == obs_sweep.WIDEST == grid_fit.WIDEST


def test_nothing_is_launched_on_a_cpu() -> None:
    assert sparsegpt._kernels(torch.ones(4, 4), NM(2, 4), None) is None


def test_a_kernel_that_does_not_run_is_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(sparsegpt, "LAUNCHED", ("cpu",))
    monkeypatch.setattr(obs_sweep, "sweep", fails)
    sparsegpt._does_not_run.cache_clear()
    sparsegpt._say.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "llmsparse"):
            for _ in range(2):
                assert sparsegpt._kernels(torch.ones(4, 4), NM(2, 4), None) is None
    finally:
        sparsegpt._does_not_run.cache_clear()
        sparsegpt._say.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "sparsegpt sweeps column by column, slower than its GPU kernel: RuntimeError: Failed to find C compiler"
    ]


def test_what_is_wrong_on_a_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obs_sweep.wrong(torch.device(DEVICE)) is None
    assert grid_fit.wrong(torch.device(DEVICE)) is None
    sweep, fit = obs_sweep.sweep, grid_fit.fit

    def without_a_grid(columns, kept, upper, errors, nm, rounding):  # noqa: ANN001, ANN202
        sweep(columns, kept, upper, errors, nm)

    monkeypatch.setattr(obs_sweep, "sweep", without_a_grid)
    monkeypatch.setattr(grid_fit, "fit", lambda *given: fit(*given) * 1.1)
    assert "a given mask and a grid is wrong by" in str(obs_sweep.wrong(torch.device(DEVICE)))
    assert "scales of groups of 32" in str(grid_fit.wrong(torch.device(DEVICE)))
