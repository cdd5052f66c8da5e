"""Tiny tokenizers, built in memory: words to ids, with or without BOS, EOS and a chat template."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK = 0, 1, 2
CHAT = "{{ bos_token or '' }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"


def word_tokenizer(
    words: int = 61, *, bos: bool = False, eos: bool = True, chat: bool = False
) -> PreTrainedTokenizerFast:
    """``w0`` ... become ids from 5 on (a, user and assistant are known too); ``bos``: added by itself."""
    names = ["<s>", "</s>", "<unk>", "user", "assistant", "a", *(f"w{i}" for i in range(words))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "unk_token": "<unk>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT if chat else None, model_max_length=8, **special
    )


def cut_as_gpt2(folder: Path) -> Path:
    """Change a checkpoint's tokenizer into one that llama.cpp knows: byte-level, words cut as GPT-2 does, one merge."""
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text())
    parts["pre_tokenizer"]["use_regex"] = True
    words = parts["model"]["vocab"]
    for word in sorted(words, key=lambda word: words[word])[-8:]:
        del words[word]  # room for the special tokens that transformers' Qwen and Gemma classes add
    words["th"] = len(words)
    parts["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(parts))
    return folder
