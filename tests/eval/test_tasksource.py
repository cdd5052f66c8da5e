"""Local files become tasks by their name and schema; what is none is refused with the reason."""

import json

import pytest

from llmsparse.errors import UserError

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'llmsparse[eval]')"
)

from llmsparse.eval import tasksource
from llmsparse.eval.tasksource import find_tasks, load_tasks, local_tasks

CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 1}


def write(folder, name, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (CHOICE, "multiple_choice"),
        ({"context_options": ["a", "b"], "continuation": "c", "gold": 0}, "multiple_choice"),
        ({"text": "some words here"}, "loglikelihood"),
    ],
)
def test_a_file_is_a_task_by_its_fields(tmp_path, row, kind):
    write(tmp_path, "mine", {**row, "id": 7}, row)
    (found,) = find_tasks("mine", tmp_path)
    assert (found.name, found.label) == ("mine", "mine.jsonl") and len(found.sha256) == 64
    task = load_tasks([found])["tasks"]["mine"]
    assert task.get_config("output_type") == kind and list(task.test_docs()) == [row, row]


def test_the_default_folder_is_zeroshot_of_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "zeroshot").mkdir()
    write(tmp_path / "zeroshot", "mine", CHOICE)
    monkeypatch.setenv("LLMSPARSE_DATA", str(tmp_path))
    assert [*local_tasks()] == ["mine"]
    monkeypatch.delenv("LLMSPARSE_DATA")
    assert local_tasks() == {}


def test_a_local_file_wins_over_the_harness_s_task_of_that_name(tmp_path):
    write(tmp_path, "boolq", CHOICE)
    assert find_tasks("boolq", tmp_path)[0].label == "boolq.jsonl"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("minne", "task 'minne' is unknown; did you mean mine; local: mine; lm-evaluation-harness knows"),
        ("mine,helaswag", "task 'helaswag' is unknown; did you mean hellaswag"),
        (" , ", "names no task; local ones: mine"),
    ],
)
def test_an_unknown_task_gets_the_nearest_and_the_known_ones(tmp_path, names, message):
    write(tmp_path, "mine", CHOICE)
    with pytest.raises(UserError, match=message):
        find_tasks(names, tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no items"),
        (["{"], "line 1 is no JSON"),
        (["[1]"], "line 1 is no JSON object"),
        ([{"question": "a"}], "line 1 has the fields question, which fit no schema"),
        ([CHOICE, {**CHOICE, "gold": 2}], "line 2 is no item of the schema multiple_choice: query is a text"),
        ([CHOICE, {**CHOICE, "gold": True}], "line 2 is no item"),
        ([CHOICE, {**CHOICE, "choices": ["b"]}], "line 2 is no item"),
        ([CHOICE, {**CHOICE, "query": 1}], "line 2 is no item"),
        ([CHOICE, {"text": "a b"}], "line 2 is no item"),
        ([{"text": "word"}], "line 1 is no item of the schema last_word: text is two words or more"),
        ([{"context_options": ["a"], "continuation": "b", "gold": 0}], "schema partial_evaluation"),
    ],
)
def test_a_file_that_fits_no_schema_is_refused_with_its_line(tmp_path, rows, message):
    write(tmp_path, "mine", *rows)
    with pytest.raises(UserError, match=message):
        find_tasks("mine", tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--task-data .*absent is no folder"):
        find_tasks("mine", tmp_path / "absent")


def test_a_task_whose_data_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="task boolq could not be loaded: .*put boolq.jsonl into the folder"):
        load_tasks(find_tasks("boolq", tmp_path))


def test_tasks_that_run_written_code_are_refused(tmp_path, monkeypatch):
    write(tmp_path, "mine", CHOICE)
    unsafe = tasksource.definition("multiple_choice") | {"unsafe_code": True}
    monkeypatch.setattr(tasksource, "definition", lambda schema: unsafe)
    with pytest.raises(UserError, match="task mine runs code that the model writes"):
        load_tasks(find_tasks("mine", tmp_path))


def test_without_the_harness_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'llmsparse\[eval\]'"):
        find_tasks("mine", tmp_path)
