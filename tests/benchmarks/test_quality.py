"""benchmarks.quality: what a method says, and cells one after the other or several at once."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import models, quality, rows
from tests.tiny import save_tiny

METHODS = ["magnitude", "refit:wanda+refit.steps=5+targets=dense"]


def measured(folder: Path, text: str, results: Path, monkeypatch, *given: str) -> dict[str, dict]:
    asked = [
        "quality",
        f"tiny={folder}",
        "--solvers",
        *METHODS,
        "--patterns",
        "50%",
        "--contexts",
        "512",
        "--data",
        text,
    ]
    small = [
        "--windows-512",
        "2",
        "--calibration",
        text,
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*asked, *small, "--results", str(results), *given])
    quality.main()
    return {row["solver"]: row for row in rows.read(results)}


@pytest.mark.long
def test_cells_at_once_are_those_one_after_the_other_without_times(tmp_path, text, monkeypatch) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    alone = measured(folder, text, tmp_path / "alone.json", monkeypatch)
    beside = measured(folder, text, tmp_path / "beside.json", monkeypatch, "--beside", "2")
    assert set(alone) == set(beside) == {"dense", *METHODS}
    for method, row in alone.items():
        assert beside[method]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
        assert beside[method]["note"] == models.BESIDE and "note" not in row
    assert all(alone[method]["prune_seconds"] is not None for method in METHODS)  # rounded, so perhaps 0.0
    assert all(beside[method]["prune_seconds"] is None for method in METHODS)
    there = [{**row, "prune_seconds": 1.0 + i} for i, row in enumerate(alone.values())]
    (tmp_path / "alone.json").write_text(json.dumps(there))
    monkeypatch.setattr(models, "pruned", lambda *_: pytest.fail("measured again"))
    plot = tmp_path / "contest.svg"
    again = measured(folder, text, tmp_path / "alone.json", monkeypatch, "--plot", str(plot))
    assert list(again.values()) == there
    assert all(f"<!-- {method} -->" in plot.read_text() for method in METHODS)


@pytest.mark.long
def test_a_cell_that_fails_stops_no_other_and_is_named(tmp_path, text, monkeypatch) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")  # its context is too short: every evaluation is refused
    with pytest.raises(SystemExit, match=r"cells that failed\n(.*\n)*.*magnitude 50%: UserError: .*512"):
        measured(folder, text, tmp_path / "rows.json", monkeypatch, "--beside", "2")


def test_a_method_is_a_solver_with_options_of_prune_and_of_set() -> None:
    assert models.method("alps") == ("alps", {})
    assert models.method(METHODS[1]) == ("refit:wanda", {"targets": "dense", "set": ["refit.steps=5"]})


def test_rows_name_no_folder_of_the_machine(monkeypatch) -> None:
    monkeypatch.setenv("LLMSPARSE_DATA", "/data")
    assert rows.public("/data/text/a.jsonl") == "$LLMSPARSE_DATA/text/a.jsonl"
    assert rows.public("a model=/home/me/a") == "a model=a"
    mixed = "/data/a.jsonl=0.5,/home/me/b.jsonl=0.25,hub/id:train=0.25"
    assert rows.public(mixed) == "$LLMSPARSE_DATA/a.jsonl=0.5,b.jsonl=0.25,hub/id:train=0.25"
