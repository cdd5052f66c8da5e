"""What names this machine and its user does not leave it."""

import getpass
from pathlib import Path

import pytest

from llmsparse.local_paths import without_local_paths


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/jane/models/llama", "llama"),
        ("/home/Jane Doe/my models/llama 3/", "llama 3"),
        ("~/models/llama", "llama"),
        ("../jane/llama", "llama"),
        ("C:\\Users\\jane\\llama", "llama"),
        ("/data/a.txt=0.5,/data/b.txt=0.5", "a.txt=0.5,b.txt=0.5"),
        ("see /home/jane/out/export.json, then go on", "see export.json, then go on"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("allenai/c4:en:train", "allenai/c4:en:train"),
        ("wikitext2", "wikitext2"),
        ("model.layers.0.mlp/up", "model.layers.0.mlp/up"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("~40 tokens/s", "~40 tokens/s"),
        ("3 tokens/s, 1/2 of it", "3 tokens/s, 1/2 of it"),
    ],
)
def test_paths_become_their_last_part_and_other_text_stays(text, cleaned):
    assert without_local_paths(text) == cleaned


def test_home_folders_with_blanks_are_known_inside_text(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Jane Doe"))
    assert without_local_paths("warning: /home/Jane Doe/m/a.bin is gone") == "warning: a.bin is gone"


def test_a_users_name_is_taken_out_of_keys_and_values(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "janedoe")
    found = without_local_paths({"/home/janedoe/x": ["by janedoe", 3, None, 0.5, True]})
    assert found == {"x": ["by user", 3, None, 0.5, True]}
