"""The benchmark of single layers, on one that is tiny."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import solve_speed
from llmsparse.pattern import parse_mask
from llmsparse.solvers.magnitude import solver as magnitude


def test_each_pattern_and_solver_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--shapes", "32x64", "--solvers", "magnitude", "alps", "--runs", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["solve_speed", *asked, "--results", str(tmp_path / "rows.json")])
    solve_speed.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["pattern"], row["solver"]) for row in rows] == [
        (pattern, solver) for pattern in ("50%", "2:4") for solver in ("magnitude", "alps")
    ]
    assert all(0 < row["lowest"] <= row["seconds"] <= row["highest"] for row in rows)
    assert [row["iterations"] is None for row in rows] == 2 * [True, False]
    assert rows[0]["error"] > rows[1]["error"] > 0
    assert capsys.readouterr().out.count("| 32 x 64 |") == 4


def test_the_error_is_that_of_the_layers_outputs() -> None:
    weight, gram = solve_speed.problem(8, 16, torch.device("cpu"))
    root = torch.linalg.cholesky(gram.double())  # inputs whose Gram this is
    pruned = torch.where(magnitude()(weight, gram, parse_mask("50%")).mask, weight, 0.0)
    before, after = weight.double() @ root, pruned.double() @ root
    expected = (before - after).square().sum() / before.square().sum()
    assert solve_speed.solve(weight, gram, "magnitude", "50%")["error"] == pytest.approx(float(expected))
