"""benchmarks.pareto: the rows of a tiny model's forms, none measured twice; the table and the plot."""

import sys

import pytest

from benchmarks import pareto, recover, rows
from llmsparse.eval.models import weight_bytes
from tests.tiny import save_tiny
from tests.tokenizers_tiny import cut_as_gpt2

FORMS = ("bf16", "Q8_0", "as-is+int4:32", "50%+int8")


@pytest.mark.long
def test_each_form_has_its_rows_its_bytes_and_its_place_in_the_plot(
    tmp_path, data_folder, text, monkeypatch, capsys
):
    pytest.importorskip("gguf")
    folder = cut_as_gpt2(save_tiny("llama", tmp_path / "tiny"))
    small = f"--data {text} --judged-on {text} --context 64 --windows 2 --samples 4 --sequence-length 32 --device cpu"
    given = f"{small} --solver magnitude --tokens 3k --limit 4 --options sequence_length=32 dtype=float32"
    places = f"--keep {tmp_path}/kept --results {tmp_path}/rows.json --speeds {tmp_path}/speeds.json"
    drawn = f"--plot {tmp_path}/pareto.svg --forms {' '.join(FORMS)}"
    monkeypatch.setattr(sys, "argv", ["pareto", f"tiny={folder}", *f"{given} {places} {drawn}".split()])
    pareto.main()
    measured = rows.read(tmp_path / "rows.json")
    assert [(row["solver"], row["pattern"], row["tokens"]) for row in measured] == [
        ("dense", "", 0),
        ("Q8_0", "", 0),
        ("sparsegpt+values=int4:32", "as-is", 0),
        ("sparsegpt+values=int4:32", "as-is", 3000),
        ("magnitude+values=int8", "50%", 0),
        ("magnitude+values=int8", "50%", 3000),
    ]
    assert [task["task"] for task in measured[-1]["tasks"]] == ["lambada_openai"]
    dense, file, *packed = measured
    assert dense["texts"][0]["perplexity"] == pytest.approx(file["texts"][0]["perplexity"], rel=0.01)
    assert dense["texts"][0]["perplexity"] != file["texts"][0]["perplexity"]
    for row in packed[1::2]:
        assert row["kl"]["after"] < row["kl"]["before"]
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[0].strip("| "), line[1]) for line in lines] == [
        ("bf16", ""), ("Q8_0", ""), *((form, n) for form in FORMS[2:] for n in ("", "3,000"))
    ]  # fmt: skip
    size = weight_bytes(pareto.Checkpoint.open(folder)) / 1e6
    assert lines[0][2] == f"{size:.1f}"
    drawn_text = (tmp_path / "pareto.svg").read_text()
    assert all(f"<!-- {form} -->" in drawn_text for form in FORMS)
    monkeypatch.setattr(recover, "judged", lambda *_: pytest.fail("measured again"))
    pareto.main()
