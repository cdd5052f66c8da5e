"""Reading what a RUN argument names, and saying what is wrong with it."""

from pathlib import Path

import pytest

from llmsparse.errors import UserError
from llmsparse.figures import plain, with_error
from llmsparse.measures import measures, paired_error, with_dense
from llmsparse.runs import load_runs
from tests.results import evaluation, full_evaluation, pruned_folder, report, source, task, write


def test_a_folder_gives_its_report_and_every_evaluation_in_it(tmp_path: Path) -> None:
    other = evaluation(sources=[source(name="c4")])
    (run,) = load_runs([pruned_folder(tmp_path / "pruned", evaluation(), other)])
    assert run.name == "pruned"
    assert (run.solver, run.pattern, run.sparsity) == ("sparsegpt", "50%", 0.5)
    assert [row["name"] for row in run.sources] == ["wikitext2", "c4"]
    assert run.sources[1]["context"] == 2048  # each row knows its evaluation's conditions


def test_a_file_brings_the_report_of_the_folder_that_it_evaluated(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "pruned", solver="wanda")
    (run,) = load_runs([write(tmp_path / "figures.json", evaluation(model=folder))])
    assert (run.name, run.solver) == ("figures", "wanda")
    (alone,) = load_runs([write(tmp_path / "alone.json", evaluation(model="owner/elsewhere"))])
    assert alone.report is None


def test_a_run_can_be_named_and_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "a=b")
    assert [run.name for run in load_runs([f"mine={folder}", folder])] == ["mine", "a=b"]


def test_names_are_unique_by_their_folders_and_then_by_number(tmp_path: Path) -> None:
    files = [write(tmp_path / side / "eval.json", evaluation()) for side in ("left", "right")]
    names = [run.name for run in load_runs([*files, f"x={files[0]}", f"x={files[1]}", files[0]])]
    assert names == ["left/eval", "right/eval", "x", "x (2)", "left/eval (2)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no .*run.json; name a folder that llmsparse prune wrote"),
        ("{", "run.json cannot be read as JSON"),
        ("[1]", "run.json is JSON but no object"),
        ('{"results": {}}', 'without "kind": "llmsparse eval".*--out wrote'),
        ('{"kind": "llmsparse eval", "tasks": 3}', 'should hold "tasks", a list of objects'),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_runs([file])


def test_a_folder_without_results_and_a_damaged_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither report.json nor eval.*llmsparse eval"):
        load_runs([tmp_path])
    write(tmp_path / "report.json", report(weights=[{"name": "w"}]))
    with pytest.raises(
        UserError, match='should hold "weights", a list of objects with name, shape, sparsity'
    ):
        load_runs([tmp_path])


def test_of_two_evaluations_of_one_thing_the_larger_one_counts(tmp_path: Path) -> None:
    small = evaluation(sources=[source(50.0, tokens=100)], tasks=[task(value=0.9, items=10)])
    (run,) = load_runs([pruned_folder(tmp_path / "p", small, evaluation(tasks=[task(value=0.36)]))])
    assert [measure.value for measure in measures(run).values()] == [30.1, 0.36]


def test_the_dense_model_is_made_of_what_evaluations_say_of_it(tmp_path: Path) -> None:
    runs = load_runs([pruned_folder(tmp_path / name, full_evaluation(2.0)) for name in "ab"])
    columns, dense = with_dense(runs)
    assert [run.name for run in columns] == ["dense", "a", "b"]
    assert dense["a"] is dense["b"] is columns[0]
    assert columns[0].weight_bytes == 269_060_552
    assert {str(m) for m in measures(columns[0]).values()} >= {"20.70 ± 0.83", "43.0 ± 2.2"}


def test_the_dense_model_is_the_run_that_was_compared_with(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = str(tmp_path / "base")
    itself = write(tmp_path / "itself.json", evaluation(model=model, against=None))
    other = pruned_folder(tmp_path / "p", evaluation(against=f"{model}/../base"))
    columns, dense = with_dense(load_runs([other, itself]))
    assert [run.name for run in columns] == ["itself", "p"]
    assert dense["p"].name == "itself"


def test_two_dense_models_have_two_names(tmp_path: Path) -> None:
    runs = load_runs([pruned_folder(tmp_path / n, evaluation(against=f"hub/{n}-base")) for n in "ab"])
    assert [run.name for run in with_dense(runs)[0]] == ["dense (a-base)", "dense (b-base)", "a", "b"]


def test_the_capability_that_lost_most_is_known_over_several_evaluations(tmp_path: Path) -> None:
    (run,) = load_runs([pruned_folder(tmp_path / "p", evaluation(), full_evaluation(1.4))])
    assert run.lost_most == "reasoning"
    assert run.capabilities["knowledge"]["status"] == "not measurable"


def test_figures_are_written_as_far_as_their_errors_reach() -> None:
    assert with_error(30.123, 1.234) == "30.1 ± 1.2"
    assert with_error(2552.3, 141.2) == "2552 ± 141"
    assert with_error(0.4321, 0.0224, 100) == "43.2 ± 2.2"
    assert with_error(9.99, 0.999) == "10.0 ± 1.0"
    assert with_error(30.123, None) == "30.12"
    assert with_error(None, None) == with_error(float("inf"), float("nan")) == "not finite"
    assert with_error(1.0, float("inf")) == "1"
    assert with_error(1e200, 1e199) == "1e+200"
    assert plain(123456.7) == "123457"


def test_the_paired_error_is_that_of_the_differences() -> None:
    changes = [-1] * 60 + [1] * 25 + [0] * 415
    mean = sum(changes) / 500
    variance = sum((change - mean) ** 2 for change in changes) / 499
    assert paired_error(60, 25, 500) == pytest.approx((variance / 500) ** 0.5)
    assert paired_error(None, 25, 500) is None
