"""A tokenizer as GGUF stores it: tokens, kinds, merges or scores, and the rule that cuts a text into words."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from llmsparse.calibration import window_prefix
from llmsparse.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (what cuts the text, whether whole words skip the merges) -> llama.cpp's name of the rule
RULES = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((TEKKEN,), True): "tekken",
    ((QWEN2,), False): "qwen2",
}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}


@dataclass
class Vocabulary:
    """What goes under tokenizer.ggml."""

    model: str  # gpt2: byte-level merges; llama: SentencePiece's
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)  # key before _token_id -> id
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of ``tokenizer``, filled up to the model's ``size``.

    Raises:
        UserError: it is no byte-pair tokenizer, or cuts words by a rule that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("GGUF needs the tokenizer's tokenizer.json; this one is written in Python")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise UserError(f"a tokenizer of type {model['type']} cannot be exported to GGUF; known: BPE")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise UserError(
            f"the tokenizer has token id {max(ids.values())}, and the model a vocabulary of {size}; "
            "it belongs to another model"
        )
    pieces = bool(model.get("byte_fallback"))
    found = Vocabulary("llama", "default", [], []) if pieces else Vocabulary("gpt2", _rule(parts), [], [])
    found.tokens, found.kinds = _tokens(ids, parts, size, pieces)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if pieces:
        found.scores = _scores(merges, found.tokens)
    else:
        found.merges = merges
    found.special = _special(tokenizer)
    found.flags = _flags(tokenizer) | ({"add_space_prefix": _adds_space(parts)} if pieces else {})
    template = getattr(tokenizer, "chat_template", None)
    found.chat_template = template.get("default") if isinstance(template, dict) else template
    return found


def _tokens(
    ids: dict[str, int], parts: dict[str, Any], size: int, pieces: bool
) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in ids.items():
        tokens[i] = token
        kinds[i] = BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL
    unknown = parts["model"].get("unk_token")
    if pieces and unknown in ids:
        kinds[ids[unknown]] = UNKNOWN  # unless it is named as special too, as in llama.cpp's own converter
    for added in parts["added_tokens"]:
        i = added["id"]
        kinds[i] = CONTROL if added["special"] else USER_DEFINED
        if pieces and not added["special"]:
            tokens[i] = added["content"].replace("▁", " ")  # llama.cpp looks for these in the text itself
    return tokens, kinds


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    """SentencePiece joins the pair whose whole has the highest score: the earlier merged, the higher."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _rule(parts: dict[str, Any]) -> str:
    normalizer = (parts.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp leaves NFC out, as its own converter does
        raise UserError(f"a byte-level tokenizer that normalises ({normalizer}) cannot be exported to GGUF")
    cuts = tuple(filter(None, map(_cut, _flat(parts.get("pre_tokenizer")))))
    rule = RULES.get((cuts, bool(parts["model"].get("ignore_merges"))))
    if rule is None:
        raise UserError(
            f"llama.cpp has no rule that cuts words as this tokenizer does ({'; '.join(cuts) or 'nowhere'}); "
            f"known: those of {', '.join(sorted(RULES.values()))}"
        )
    return rule


def _flat(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]


def _cut(rule: dict[str, Any]) -> str | None:
    """What one step cuts by: a regular expression, or a word for it; None where it cuts nothing."""
    if rule["type"] == "ByteLevel":
        spaced = " with a space in front" if rule.get("add_prefix_space") else ""
        return f"bytes{spaced}" if rule.get("use_regex", True) else spaced or None
    if rule["type"] == "Digits" and rule.get("individual_digits"):
        return "digits"
    if rule["type"] == "Split" and "Regex" in rule["pattern"]:
        return rule["pattern"]["Regex"]
    return rule["type"]


def _adds_space(parts: dict[str, Any]) -> bool:
    normalizer = parts.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _flat(parts.get("pre_tokenizer"))
    )


def _special(tokenizer: Any) -> dict[str, int]:
    ids = {key: getattr(tokenizer, f"{name}_token_id", None) for name, key in SPECIAL.items()}
    return {key: i for key, i in ids.items() if i is not None}


def _flags(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets BOS in front and EOS behind."""
    prefix = window_prefix(tokenizer)
    if prefix not in ([], [tokenizer.bos_token_id]):
        raise UserError(f"the tokenizer puts tokens {prefix} in front of a text; GGUF knows BOS alone")
    last = tokenizer("a", add_special_tokens=True)["input_ids"][-1]
    return {"add_bos_token": bool(prefix), "add_eos_token": last == tokenizer.eos_token_id}
