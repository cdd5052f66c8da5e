"""Greedy continuations, dense beside sparse, for a person to look at; how often they loop or end."""

from typing import Any

import torch
from torch import Tensor

NEW_TOKENS = 64
PROMPT_TOKENS = 32
GRAM = 4  # tokens that make a repetition


def prompts_of(ids: Tensor, count: int) -> list[Tensor]:
    """The beginnings of ``count`` windows, spread evenly over ``ids`` (windows, context)."""
    picked = torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()
    return [ids[i, : min(PROMPT_TOKENS, ids.shape[1] - 1)] for i in picked]


def continuations(models: list[Any], prompts: list[Tensor], tokenizer: Any) -> dict[str, Any]:
    """Continue each prompt by up to ``NEW_TOKENS`` tokens, always taking the likeliest.

    ``repetition``: share of the four-token sequences of a continuation that occurred in it before, over all
    continuations; ``terminated``: share that ended by themselves. The same for the second model, the dense one.
    """
    samples = [{"prompt": tokenizer.decode(prompt, skip_special_tokens=True)} for prompt in prompts]
    result: dict[str, Any] = {"new_tokens": NEW_TOKENS, "samples": samples}
    for prefix, model in zip(("", "dense_"), models, strict=False):
        written = [_continue(model, prompt.to(model.device)) for prompt in prompts]
        for sample, tokens in zip(samples, written, strict=True):
            sample[f"{prefix}continuation"] = tokenizer.decode(tokens, skip_special_tokens=True)
        result[f"{prefix}repetition"] = sum(map(repetition, written)) / len(written)
        ended = [len(tokens) < NEW_TOKENS or tokens[-1] in _ends(model) for tokens in written]
        result[f"{prefix}terminated"] = sum(ended) / len(ended)
    return result


def repetition(tokens: list[int]) -> float:
    """Share of the sequences of ``GRAM`` tokens that occurred before; 0 for a text too short to have two."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@torch.inference_mode()
def _continue(model: Any, prompt: Tensor) -> list[int]:
    """The likeliest next token again and again, until the model ends its text."""
    tokens: list[int] = []
    cache, ids = None, prompt[None]
    while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in _ends(model)):
        found = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = found.past_key_values, found.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens
