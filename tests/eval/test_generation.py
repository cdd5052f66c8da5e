"""Greedy continuations are transformers' own; loops and endings are counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.eval import generation
from llmsparse.eval.generation import continuations, prompts_of, repetition
from tests.tiny import EOS, save_tiny, tokenizer


def model_of(family, folder, seed=0):
    return AutoModelForCausalLM.from_pretrained(save_tiny(family, folder, seed=seed)).eval()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_continuations_are_those_of_generate(family, tmp_path):
    models = [model_of(family, tmp_path / str(seed), seed) for seed in (0, 1)]
    prompts = [torch.arange(5, 15), torch.arange(20, 31)]
    found = continuations(models, prompts, tokenizer())
    for key, model in zip(("continuation", "dense_continuation"), models, strict=True):
        for sample, prompt in zip(found["samples"], prompts, strict=True):
            options = {"max_new_tokens": generation.NEW_TOKENS, "do_sample": False, "pad_token_id": EOS}
            whole = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)[0]
            assert sample[key] == tokenizer().decode(whole[len(prompt) :], skip_special_tokens=True)


def test_a_text_that_ends_by_itself_is_counted(tmp_path, monkeypatch):
    model = model_of("llama", tmp_path / "llama")
    monkeypatch.setattr(generation, "NEW_TOKENS", 5)
    first = continuations([model], [torch.arange(5, 15)], tokenizer())
    assert first["terminated"] == 0 and "dense_terminated" not in first
    following = model(torch.arange(5, 15)[None]).logits[0, -1].argmax()
    model.generation_config.eos_token_id = [int(following), EOS]
    assert continuations([model], [torch.arange(5, 15)], tokenizer())["terminated"] == 1


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition(list(range(20))) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)


def test_prompts_are_beginnings_spread_over_the_windows():
    ids = torch.arange(10 * 64).view(10, 64)
    prompts = prompts_of(ids, 3)
    assert [int(prompt[0]) for prompt in prompts] == [0, 4 * 64, 9 * 64]
    assert {len(prompt) for prompt in prompts} == {32}
    assert len(prompts_of(ids, 99)) == 10 and len(prompts_of(ids[:, :8], 1)[0]) == 7
