"""What the documents name and a test has to make: checkpoints, texts and tasks, all tiny."""

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from llmsparse.prune import prune
from tests import tiny
from tests.pruned import SMALL
from tests.tokenizers_tiny import CHAT, cut_as_gpt2


def dense(folder: Path) -> None:
    """A llama that every exporter takes: heads of 16 numbers, a tokenizer that llama.cpp knows, a chat template."""
    config = tiny.FAMILIES["llama"]()
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 192}
    for name, value in sizes.items():
        setattr(config, name, value)
    with mock.patch.dict(tiny.FAMILIES, llama=lambda: config):
        tiny.save_tiny("llama", folder, torch.bfloat16)
    cut_as_gpt2(folder)
    (folder / "chat_template.jinja").write_text(CHAT)


def pruned(folder: Path) -> None:
    """With codes and a report, as prune leaves it."""
    made = folder.parent / f".dense-of-{folder.name}"
    dense(made)
    prune(made, folder, pattern="50%", values="int8", **SMALL)


def text(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(random.Random(0).choices(string.ascii_letters + " .,;", k=4000)))


def texts(folder: Path) -> None:
    """A folder in the place of a hub dataset."""
    text(folder / "text.txt")


def rows(file: Path) -> None:
    write(file, [{"text": string.ascii_letters * 4} for _ in range(8)])


def chats(file: Path) -> None:
    said = {"role": "user", "content": string.ascii_letters * 4}
    write(file, [{"messages": [said, {**said, "role": "assistant"}]} for _ in range(8)])


def tasks(folder: Path) -> None:
    """A task of a kind of the documents for each name that they use."""
    folder.mkdir(parents=True)
    for name in ("arc_easy", "hellaswag", "mytask"):
        write(
            folder / f"{name}.jsonl",
            [{"query": "a b", "choices": ["c", "d"], "gold": n % 2} for n in range(8)],
        )
    coref = {"context_options": ["the cat", "the dog"], "continuation": "ran", "gold": 0}
    write(folder / "winogrande.jsonl", [coref] * 8)


def write(file: Path, found: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


MADE: dict[str, Callable[[Path], None]] = {
    "MODEL": dense,
    "DENSE": dense,
    "HuggingFaceTB/SmolLM2-135M": dense,
    "PRUNED": pruned,
    "pruned": pruned,
    "other": pruned,
    "notes.txt": text,
    "mine.jsonl": rows,
    "chats.jsonl": chats,
    "allenai/c4:en:train": texts,  # a path that exists is no hub id
    "tasks": tasks,
}


def make_what_is_named(source: str, place: Path) -> None:
    """In ``place`` everything that ``source``, a command or a block, names and that is not there yet."""
    for name, maker in MADE.items():
        if (
            re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w:-]|\.\w)", source)
            and not (place / name).exists()
        ):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            maker(place / name)
