"""Runs side by side: what stands in the table, which warnings come, what a terminal shows."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmsparse.compare import compare, show
from llmsparse.errors import UserError
from tests.results import evaluation, full_evaluation, pruned_folder, source, task, write

Pair = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """The comparison of two evaluations."""

    def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return compare((write(tmp_path / "one.json", one), write(tmp_path / "other.json", other)))

    return compared


def text_of(result: dict[str, Any]) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(show(result))
    return console.export_text()


def test_one_run_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more and was given 1; name another RUN"):
        compare((pruned_folder(tmp_path / "p"),))


def test_each_run_has_a_row_of_what_it_is_and_what_it_reached(tmp_path: Path) -> None:
    folders = [
        pruned_folder(tmp_path / n, evaluation(tasks=[task()]), solver=n) for n in ("wanda", "magnitude")
    ]
    result = compare(tuple(folders))
    assert result["columns"] == ["wikitext2", "wikitext2, per word", "wikitext2, per byte", "hellaswag"]
    row = result["rows"][1]
    assert (row["run"], row["solver"], row["pattern"]) == ("magnitude", "magnitude", "50%")
    assert (row["sparsity"], row["weight_bytes"]) == (0.5, 269_060_552)
    assert row["measures"]["wikitext2"]["value"] == 30.1
    assert row["measures"]["hellaswag"]["standard_error"] == 0.022
    assert result["warnings"] == []
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"context": 512}, "wikitext2: contexts differ: 2,048 (one); 512 (other)"),
        ({"stride": 256}, "wikitext2: strides differ: none (one); 256 (other)"),
        ({"bos": "BOS in each"}, "wikitext2, hellaswag: BOS rules differ"),
        ({"dtype": "bfloat16"}, "wikitext2, hellaswag: number formats of the forward pass differ"),
        ({"sources": [source(sha256="ab" * 32)]}, "696cca6b696c (one); abababababab (other)"),
        ({"sources": [source(tokens=100)]}, "wikitext2: numbers of tokens scored differ: 32,752 (one); 100"),
        ({"tasks": [task(items=100)]}, "hellaswag: numbers of items differ: 500 (one); 100 (other)"),
        ({"tasks": [task(metric="acc")]}, "hellaswag: metrics differ: acc_norm (one); acc (other)"),
        ({"tasks": [task(sha256="ab" * 32)]}, "hellaswag: data hashes"),
    ],
)
def test_what_must_not_be_compared_is_said(pair: Pair, change: dict[str, Any], warning: str) -> None:
    one = evaluation(tasks=[task()])
    (line,) = pair(one, one | change)["warnings"]
    assert warning in line


def test_figures_under_other_conditions_stand_on_lines_of_their_own(pair: Pair) -> None:
    result = pair(evaluation(), evaluation(context=512))
    texts = [column for column in result["columns"] if "per " not in column]
    assert texts == ["wikitext2, context 2048", "wikitext2, context 512"]


def test_runs_that_share_a_context_are_compared_in_it(tmp_path: Path) -> None:
    both = pruned_folder(tmp_path / "both", evaluation())
    write(tmp_path / "both" / "eval-512.json", evaluation(context=512))
    other = pruned_folder(tmp_path / "other", evaluation())
    assert compare((both, other))["warnings"] == []
    third = pruned_folder(tmp_path / "third", evaluation(context=512))
    (line,) = compare((both, other, third))["warnings"]
    assert line.startswith("wikitext2: contexts differ")


def test_a_task_under_another_rule_for_bos_is_not_compared(pair: Pair) -> None:
    one = evaluation(sources=[], tasks=[task()])
    (line,) = pair(one, one | {"bos": "none"})["warnings"]
    assert line.startswith("hellaswag: BOS rules differ")


def test_flips_are_counted_on_the_same_items_only(pair: Pair) -> None:
    one = evaluation(tasks=[task(answers="1100"), task("arc_easy", answers="1111")])
    other = evaluation(tasks=[task(answers="1010"), task("arc_easy", answers="111")])
    (flip,) = pair(one, other)["flips"]
    assert flip == {"run": "other", "against": "one", "task": "hellaswag", "lost": 1, "gained": 1, "items": 4}
    moved = evaluation(tasks=[task(answers="1010", sha256="ab" * 32)])
    assert pair(one, moved)["flips"] == []


def test_hub_data_without_a_hash_is_the_same_by_name(pair: Pair) -> None:
    hub = {"sha256": None, "answers": "10"}
    one, other = (
        evaluation(tasks=[task(data=name, **hub)]) for name in ("owner/set (hub)", "owner/else (hub)")
    )
    assert len(pair(one, one)["flips"]) == 1
    assert pair(one, other)["flips"] == []


def test_eight_runs_stay_readable_on_a_hundred_columns(tmp_path: Path) -> None:
    runs = [pruned_folder(tmp_path / f"smollm2-{i}", full_evaluation(1 + i / 4)) for i in range(1, 9)]
    text = text_of(compare(tuple(runs)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("wikitext2 ") == 2  # two tables, which share their first run
    assert text.count("25.9 ± 1.0") == 2 and "62.1 ± 2.5" in text
    assert "…" not in text


def test_what_is_missing_leaves_its_place_empty(pair: Pair) -> None:
    text = text_of(pair(evaluation(tasks=[task()]), evaluation(sources=[])))
    assert "36.0 ± 2.2" in text
    assert "None" not in text
