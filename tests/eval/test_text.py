"""The texts that models are evaluated on: their joins, hashes and refusals."""

import hashlib
import json

import datasets
import pytest

from llmsparse.documents import builtin_documents
from llmsparse.errors import UserError
from llmsparse.eval.text import load_text


def test_wikitext2_is_the_published_join(data_folder):
    text, sha256, label = load_text("wikitext2")
    assert sha256 == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert len(text.encode()) == 1_296_370
    assert label == "WikiText-2 (raw, test): rows joined by blank lines"


def test_wikitext2_comes_from_the_hub_without_local_data_and_joins_alike(monkeypatch, tmp_path):
    rows = ["", " = Title = \n", "", " Text . \n"]
    (tmp_path / "text" / "wikitext2").mkdir(parents=True)
    (tmp_path / "text" / "wikitext2" / "test.txt").write_text(" \n = Title = \n \n Text . \n")
    asked = []

    def load_dataset(*args, split, **options):
        asked.append((*args, split))
        return datasets.Dataset.from_list([{"text": row} for row in rows]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("LLMSPARSE_DATA", raising=False)
    from_hub = load_text("wikitext2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    monkeypatch.setenv("LLMSPARSE_DATA", str(tmp_path))
    assert load_text("wikitext2") == from_hub
    assert from_hub[0] == "\n\n".join(rows)


def test_local_data_without_wikitext2_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMSPARSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="has no text/wikitext2/test.txt; put it there or unset the variable"):
        load_text("wikitext2")


def test_a_text_file_is_scored_as_it_is(tmp_path):
    raw = b" one\r\n\r\n\r\ntwo \xc3\xa9\n"
    (tmp_path / "as_is.txt").write_bytes(raw)
    text, sha256, label = load_text(str(tmp_path / "as_is.txt"))
    assert text.encode() == raw and sha256 == hashlib.sha256(raw).hexdigest()
    assert label.endswith("as_is.txt: as it is")


def test_rows_are_joined_by_blank_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    assert load_text(str(tmp_path / "rows.jsonl"))[0] == "one\n\ntwo"


def test_builtin_is_the_held_out_part():
    text, _, label = load_text("builtin")
    assert text == "\n\n".join(builtin_documents(held_out=True))
    assert "held-out fifth of pydoc's topics, Python 3" in label


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", "  \n", "holds no text to evaluate on"),
        ("talk.jsonl", '{"messages": [{"role": "user"}]}', "evaluation scores texts"),
        ("body.jsonl", '{"body": "x"}', "no column text or messages; found: body"),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_text(str(tmp_path / name))


def test_an_unknown_text_is_refused_with_the_forms():
    with pytest.raises(
        UserError, match="'no such thing' is not a source of text; sources are wikitext2, builtin, a .txt"
    ):
        load_text("no such thing")
