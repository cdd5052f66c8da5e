"""generate: the same text from dense, pruned and packed folders, streamed as it comes; and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmsparse.cli import app
from llmsparse.errors import UserError
from llmsparse.generate import generate
from tests.packed_tiny import packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("generate"))


def test_packed_and_pruned_write_the_same_and_stream_what_they_return(folder: Path) -> None:
    pieces: list[str] = []
    options = {"prompt": "hello there", "max_new_tokens": 12, "dtype": "float32"}
    result = generate(folder, write=pieces.append, **options)
    assert result["text"] == generate(folder.parent / "sparse", **options)["text"]
    assert "".join(pieces).rstrip("\n") == result["text"].rstrip("\n")
    assert (result["prompt_tokens"], result["new_tokens"]) == (12, 12)
    assert result["prompt_tokens_per_second"] > 0 and result["tokens_per_second"] > 0


def test_drawing_with_a_seed_repeats_itself_and_another_seed_differs(folder: Path) -> None:
    texts = [
        generate(folder, prompt="abc", max_new_tokens=16, temperature=2.0, seed=seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_one_token_has_no_decode_speed(folder: Path) -> None:
    assert generate(folder, prompt="abc", max_new_tokens=1)["tokens_per_second"] is None


def test_what_cannot_be_continued_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        generate(folder, prompt="")
    with pytest.raises(UserError, match="beyond the 128 positions of .*; use --max-new-tokens 27"):
        generate(folder, prompt="a" * 100, max_new_tokens=100)
    with pytest.raises(UserError, match="shorten the prompt"):
        generate(folder, prompt="a" * 200)
    with pytest.raises(UserError, match="has no chat template; leave --chat out"):
        generate(folder, prompt="a", chat=True)
    with pytest.raises(UserError, match="--temperature -1"):
        generate(folder, prompt="a", temperature=-1.0)
    with pytest.raises(UserError, match="--max-new-tokens 0"):
        generate(folder, prompt="a", max_new_tokens=0)


def test_the_command_prints_the_text_and_the_speed_or_one_document(folder: Path) -> None:
    command = ["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "4"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "tokens/s" in shown.stdout
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["text"].strip() in shown.stdout and document["new_tokens"] == 4
    refused = CliRunner().invoke(app, ["generate", str(folder)])
    assert refused.exit_code == 2 and "give --prompt" in refused.stderr


def test_export_is_a_command(folder: Path, tmp_path: Path) -> None:
    command = ["export", str(folder.parent / "sparse"), str(tmp_path / "out"), "--values", "int8"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "bits for each linear weight" in shown.stdout
    document = json.loads(CliRunner().invoke(app, [*command, "--overwrite", "--json"]).stdout)
    assert document["format"] == "packed" and document["bytes"]["after"] < document["bytes"]["before"]
