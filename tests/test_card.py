"""Model cards: read back by huggingface_hub's own classes, and what they say is what the reports say."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from llmsparse.card import card
from llmsparse.card_metadata import entries
from llmsparse.cli import app
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.runs import load_runs
from tests.pruned import SMALL, read_report
from tests.results import full_evaluation
from tests.tiny import save_tiny
from tests.tokenizers_tiny import cut_as_gpt2

SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A dense model\n"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("card")
    dense = save_tiny("llama", place / "dense")
    (dense / "README.md").write_text(SOURCE_CARD)
    prune(dense, place / "tiny-2of4", pattern="2:4", values="int8", **SMALL)
    (place / "tiny-2of4" / "eval.json").write_text(json.dumps(full_evaluation()))
    return place / "tiny-2of4"


def test_the_hubs_classes_read_back_what_the_report_says(pruned):
    made = card(pruned, repo="someone/tiny", base_model="owner/dense")
    data = ModelCard(made["card"]).data
    assert data.base_model == "owner/dense" and data.base_model_relation == "quantized"
    assert data.license == "apache-2.0" and data.pipeline_tag == "text-generation"
    assert {"llmsparse", "sparse", "2:4", "sparsegpt", "int8"} <= set(data.tags)
    assert made["warnings"] == []


def test_results_are_in_the_model_index_and_in_eval_results(pruned):
    measured = full_evaluation()
    results = ModelCard(card(pruned)["card"]).data.eval_results
    found = {result.dataset_name: (result.metric_type, result.metric_value) for result in results}
    for row in measured["sources"]:
        assert found[row["name"]] == ("perplexity", row["perplexity"])
    for row in measured["tasks"]:
        assert found[row["task"]] == (row["metric"], row["value"])
    listed = parse_eval_result_entries(yaml.safe_load(yaml.safe_dump(entries(load_runs([pruned])[0]))))
    wikitext = next(entry for entry in listed if entry.dataset_id == "Salesforce/wikitext")
    assert wikitext.value == measured["sources"][0]["perplexity"] and "context 2048" in wikitext.notes


def test_the_command_in_the_card_makes_the_same_weights(pruned, tmp_path):
    report = read_report(pruned)
    text = card(pruned)["card"]
    words = shlex.split(re.search(r"```console\n(llmsparse prune .*)\n```", text)[1])
    assert words[2:4] == ["dense", "tiny-2of4"]  # names, not places of this machine
    words[2:4] = [str(pruned.parent / "dense"), str(tmp_path / "again")]
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert read_report(tmp_path / "again")["files"] == report["files"]


def test_an_edited_card_is_kept_and_does_not_become_that_of_another_folder(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "m")
    edited = card(folder)["card"].replace("## Known losses", "## What I know of losses")
    (folder / "README.md").write_text(edited)
    assert card(folder) == {"card": edited, "warnings": []}
    export(folder, tmp_path / "packed")
    made = card(tmp_path / "packed")
    assert "llmsparse.load(" in made["card"] and "What I know" not in made["card"]
    assert any("lacks the mark of these weights" in text for text in made["warnings"])
    assert ModelCard(made["card"]).data.license == "apache-2.0"


def test_what_was_measured_on_the_source_is_not_said_of_what_is_made_of_it(pruned, tmp_path):
    assert (pruned / "eval.json").is_file()
    quantize(pruned, tmp_path / "again", values="int4:32", **SMALL)
    export(pruned, tmp_path / "packed")
    for folder in ("again", "packed"):
        assert not (tmp_path / folder / "eval.json").exists()
        assert "Not measured." in card(tmp_path / folder)["card"]


def test_a_model_of_the_hub_is_its_base_model(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "m")
    report = read_report(folder) | {"model": "owner/dense", "commit": "0123abc"}
    (folder / "report.json").write_text(json.dumps(report))
    assert ModelCard(card(folder)["card"]).data.base_model == "owner/dense"


def test_what_is_unknown_is_left_out_and_said(tmp_path):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "out", pattern="50%", solver="magnitude")
    made = card(tmp_path / "out")
    data = ModelCard(made["card"]).data
    assert data.license is None and data.base_model is None and not data.eval_results
    assert [text.partition(";")[0] for text in made["warnings"]] == [
        "the source's card names no licence", "the dense model's hub id is unknown", "nothing was evaluated"
    ]  # fmt: skip
    assert "Not measured." in made["card"]


@pytest.mark.parametrize(("format", "tag"), [("packed", "packed"), ("gguf", "gguf"), ("dense", "dense")])
def test_an_export_says_its_format_and_how_it_is_loaded(pruned, tmp_path, format, tag):
    folder = cut_as_gpt2(shutil.copytree(pruned, tmp_path / "copy"))
    export(folder, tmp_path / "out", format=format)
    text = card(tmp_path / "out", repo="someone/tiny")["card"]
    assert tag in ModelCard(text).data.tags
    lines = {
        "packed": 'llmsparse.load("someone/tiny")',
        "gguf": "-hf someone/tiny",
        "dense": "from_pretrained",
    }
    assert lines[format] in text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            "is not the file that its report describes",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "is gone"),
        (lambda folder: (folder / "journal.jsonl").write_text("{}\n"), "was cut off"),
        (lambda folder: (folder / "report.json").unlink(), "neither report.json nor export.json"),
        (lambda folder: (folder / "report.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "notes.txt").write_text("hf_" + "a1B2" * 9), "holds a hub token"),
        (lambda folder: (folder / "README.md").write_text("hf_" + "a1B2" * 9), "holds a hub token"),
    ],
)
def test_a_folder_that_must_not_be_published_is_refused(pruned, tmp_path, damage, says):
    folder = shutil.copytree(pruned, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=says):
        card(folder)


def test_a_folder_whose_run_is_unfinished_is_not_there_yet_and_that_is_said(tmp_path):
    (tmp_path / ".out.llmsparse-work").mkdir()
    with pytest.raises(UserError, match="was cut off; finish it"):
        card(tmp_path / "out")


def test_a_base_model_that_is_no_id_is_refused(pruned):
    with pytest.raises(UserError, match="is no hub id"):
        card(pruned, base_model="here")
