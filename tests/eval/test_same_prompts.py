"""Local task files ask what lm-evaluation-harness's own tasks ask, of the original rows in the hub's form."""

import json

import pytest

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'llmsparse[eval]')"
)

import datasets

from llmsparse.eval.tasksource import TaskSource, find_tasks, load_tasks

ORIGINALS = {  # task -> the file of its rows as the hub has them, and their split
    "arc_easy": ("arc_easy_test.docs.jsonl", "test"),
    "winogrande": ("winogrande_xl_validation.jsonl", "validation"),
    "copa": ("copa_validation.jsonl", "validation"),
}


def requests(source: TaskSource, limit: int | None = None) -> list[tuple[str, str]]:
    (task,) = load_tasks([source])["tasks"].values()
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [request.args for request in task.instances]


def as_on_the_hub(name: str, row: dict) -> dict:
    """ARC's copy has its prompt made already; the hub has question, choices and a key."""
    if name != "arc_easy":
        return row
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = "ABCDE"[: len(row["choices"])]
    choices = {"text": row["choices"], "label": list(labels)}
    return {"question": question, "choices": choices, "answerKey": labels[row["gold"]]}


def golds(source: TaskSource) -> list[int]:
    """The right choice of every item."""
    (task,) = load_tasks([source])["tasks"].values()
    target = task.doc_to_text if task.multiple_input else task.doc_to_target
    right = [(task.doc_to_choice(doc), target(doc)) for doc in task.eval_docs]
    return [gold if isinstance(gold, int) else choices.index(gold) for choices, gold in right]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "copa" else pytest.mark.long) for n in ORIGINALS]
)
def test_prompts_choices_and_right_answers_are_the_harness_s(name, data_folder, monkeypatch):
    file, split = ORIGINALS[name]
    lines = (data_folder / "zeroshot" / "original" / file).read_text().splitlines()
    rows = [as_on_the_hub(name, json.loads(line)) for line in lines]
    whole = datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ("train", split)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    (local,) = find_tasks(name, data_folder / "zeroshot")
    own = TaskSource(name, name, "the harness's", None)
    asked, expected = requests(local), requests(own)
    if name == "copa":  # the harness has two blanks between the premise and the choice
        expected = [(context, choice.replace("  ", " ")) for context, choice in expected]
    assert len(asked) == len(expected) > 100
    assert asked == expected
    assert golds(local) == golds(own)
