"""Scores of local tasks against a plain loop over the model's own logits."""

import io
import json
import math
import random

import datasets
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.compare import compare
from llmsparse.errors import UserError
from llmsparse.eval import ability
from llmsparse.eval.evaluate import evaluate
from llmsparse.eval.show import show
from llmsparse.page import report
from tests.tiny import save_tiny

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'llmsparse[eval]')"
)


def words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(
        "".join(draw.choices("abcdefgh", k=draw.randint(1, 4))) for _ in range(draw.randint(least, most))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task of each schema, of 30 items."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("tasks")
    tasks = {
        "pick": [
            {
                "query": words(draw, 3, 6),
                "choices": [words(draw, 1, 3) for _ in range(n)],
                "gold": draw.randrange(n),
            }
            for n in draw.choices([2, 3, 4], k=30)
        ],
        "coref": [
            {
                "context_options": [words(draw, 3, 5) for _ in "ab"],
                "continuation": words(draw, 1, 3),
                "gold": i % 2,
            }
            for i in range(30)
        ],
    }
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_tiny("llama", tmp_path_factory.mktemp("models") / str(seed), seed=seed) for seed in (0, 1)]


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


def plain(folder, model_folder, task: str) -> dict[str, list[bool]]:
    """Which items are right, by each metric."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in map(json.loads, (folder / f"{task}.jsonl").read_text().splitlines()):
        pairs = (
            [(row["query"], choice) for choice in row["choices"]]
            if "query" in row
            else [(context, row["continuation"]) for context in row["context_options"]]
        )
        scores = [log_likelihood(model, tokenizer, context, " " + text) for context, text in pairs]
        norm = [score / len(text) for score, (_, text) in zip(scores, pairs, strict=True)]
        right["acc"].append(scores.index(max(scores)) == row["gold"])
        right["acc_norm"].append(norm.index(max(norm)) == row["gold"])
    return right


def test_scores_and_answers_equal_a_plain_loop(folder, models):
    found = evaluate(models[0], tasks="coref,pick", task_data=folder, device="cpu")
    assert "sources" not in found and [row["task"] for row in found["tasks"]] == ["coref", "pick"]
    for row, metrics in zip(found["tasks"], (["acc"], ["acc", "acc_norm"]), strict=True):
        right = plain(folder, models[0], row["task"])
        assert row["metric"] == metrics[-1] and [*row["metrics"]] == metrics
        assert row["answers"] == "".join(str(int(r)) for r in right[metrics[-1]])
        for metric in metrics:
            share = sum(right[metric]) / 30
            value, error = row["metrics"][metric]
            assert value == pytest.approx(share)
            assert error == pytest.approx(math.sqrt(share * (1 - share) / 29))
        assert (row["items"], row["of"], row["data"]) == (30, 30, f"{row['task']}.jsonl")
    coref, pick = found["tasks"]
    sizes = [len(json.loads(line)["choices"]) for line in (folder / "pick.jsonl").read_text().splitlines()]
    assert coref["chance"] == 0.5 and pick["chance"] == pytest.approx(sum(1 / n for n in sizes) / 30)


def test_a_last_word_is_right_when_each_of_its_tokens_is_the_likeliest(models, tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models[0]),
        AutoTokenizer.from_pretrained(models[0]),
    )
    rows = []
    for number, context in enumerate(("abc de", "fgh abc", "hg fe dc")):
        ids = tokenizer(context + " ")["input_ids"]
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        word = tokenizer.decode(ids[-2:])
        rows.append({"text": f"{context} {word if number else 'zz'}"})
    (tmp_path / "last.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = ""
    for row in rows:
        context, _, word = row["text"].rpartition(" ")
        start = len(tokenizer(context)["input_ids"])
        ids = tokenizer(f"{context} {word}")["input_ids"]
        greedy = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        expected += str(int(greedy[start - 1 : -1] == ids[start:]))
    (found,) = evaluate(models[0], tasks="last", task_data=tmp_path, device="cpu")["tasks"]
    assert found["answers"] == expected and found["chance"] == 0 and found["metric"] == "acc"


def test_against_pairs_the_answers(folder, models):
    found = evaluate(models[0], tasks="pick", task_data=folder, against=models[1], device="cpu")
    (dense,) = evaluate(models[1], tasks="pick", task_data=folder, device="cpu")["tasks"]
    (row,) = found["tasks"]
    assert row["dense_answers"] == dense["answers"] and row["dense_value"] == dense["value"]
    assert row["gained"] - row["lost"] == row["answers"].count("1") - dense["answers"].count("1")
    group = found["capabilities"][-1]
    assert (group["capability"], group["tasks"], group["measurable"]) == ("ungrouped", ["pick"], ["pick"])
    assert group["ability_kept"] == row["ability_kept"]["value"] < 1 and found["lost_most"] == "ungrouped"


def test_results_as_they_are_written_are_read_by_report_and_compare(folder, models, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = {"context": 32, "windows": 3, "generate": 2, "task_data": folder, "device": "cpu"}
    options |= {"data": str(tmp_path / "text.txt"), "against": models[1]}
    monkeypatch.setattr(ability, "ability_kept", lambda *_: {"value": 0.5, "low": -1.0, "high": math.inf})
    evaluate(models[0], tasks="pick,coref", out=tmp_path / "eval.json", **options)
    assert json.loads((tmp_path / "eval.json").read_text())["tasks"][0]["ability_kept"]["high"] is None
    run = f"sparse={tmp_path / 'eval.json'}"
    report((run,), html=tmp_path / "page.html", markdown=tmp_path / "page.md")
    page = (tmp_path / "page.html").read_text()
    for expected in ("pick", "coref", "KL divergence", "Greedy continuations", "Ability kept, by task"):
        assert expected in page
    found = compare((run, f"other={tmp_path / 'eval.json'}"))
    assert found["warnings"] == [] and [flip["lost"] for flip in found["flips"]] == [0, 0]
    assert "lm_eval" in json.loads((tmp_path / "eval.json").read_text())["versions"]


def test_a_group_of_the_harness_has_its_tasks_and_its_own_figure(models, monkeypatch):
    rows = [
        {"question": "abc", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": "x"}
        for i in range(8)
    ]
    whole = datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ("test", "dev", "validation")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    monkeypatch.delenv("LLMSPARSE_DATA", raising=False)
    found = evaluate(models[0], tasks="mmlu_stem", against=models[1], device="cpu")
    *tasks, group = found["tasks"]
    assert len(tasks) > 10 and all(row["capability"] == "knowledge" and row["items"] == 8 for row in tasks)
    assert (group["task"], group["group"], group["metric"]) == ("mmlu_stem", True, "acc")
    assert group["value"] == pytest.approx(sum(row["value"] for row in tasks) / len(tasks))
    assert group["capability"] == "knowledge" and "dense_value" in group
    Console(file=io.StringIO()).print(show(found))


def test_a_limit_takes_the_first_items(folder, models):
    (whole,) = evaluate(models[0], tasks="pick", task_data=folder, device="cpu")["tasks"]
    (part,) = evaluate(models[0], tasks="pick", task_data=folder, limit=7, device="cpu")["tasks"]
    assert part["answers"] == whole["answers"][:7] and (part["items"], part["of"]) == (7, 30)
    assert part["sha256"] == whole["sha256"]


def test_an_unknown_task_is_refused_before_the_model_is_read(folder, tmp_path, models):
    with pytest.raises(UserError, match="task 'pik' is unknown; did you mean pick"):
        evaluate(models[0], tasks="pik", task_data=folder)


def test_a_tokenizer_of_a_larger_model_is_refused(folder, models, tmp_path):
    import shutil

    shutil.copytree(models[0], tmp_path / "model")
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / "model")
    larger = AutoTokenizer.from_pretrained(models[0])
    larger.add_tokens([f"token{i}" for i in range(5)])
    larger.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has 133 tokens, and its model a vocabulary of 128"):
        evaluate(tmp_path / "model", tasks="pick", task_data=folder)


def test_a_metric_on_a_scale_of_its_own_is_no_share():
    from llmsparse.eval.zeroshot import unit_of

    assert [unit_of(m) for m in ("acc_norm", "acc (strict)", "word_perplexity", "bleu")] == [
        "share", "share", "score", "score",
    ]  # fmt: skip


@pytest.mark.long
def test_smollm2_on_real_items_is_above_chance(smollm2, data_folder):
    found = evaluate(smollm2, tasks="arc_easy,lambada_openai", limit=60, context=512)
    arc, lambada = found["tasks"]
    assert arc["value"] - 2 * arc["standard_error"] > arc["chance"] > 0.2
    assert lambada["value"] > 0.15 and found["shared_prefixes"]
