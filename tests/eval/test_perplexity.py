"""Perplexity and fidelity against plain loops over the model's own whole logits."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from llmsparse.errors import UserError
from llmsparse.eval import perplexity as module
from llmsparse.eval.fidelity import divergence, window_fidelity
from llmsparse.eval.perplexity import cut_windows, forward_of, mean_and_error, perplexity, window_nll
from tests.tokenizers_tiny import BOS, word_tokenizer

VOCAB = 67
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZE, **HEADS, **IDS),
    "gemma2": Gemma2Config(**SIZE, **HEADS, **IDS, head_dim=16, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZE, **HEADS, **IDS, head_dim=16, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SIZE, **HEADS, **IDS, logit_scale=0.25),
    "granite": GraniteConfig(**SIZE, **HEADS, **IDS, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, **IDS),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, **IDS
    ),
}


def tiny(family: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    model = Auto.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # logits far from uniform, so that scales and caps show
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    with torch.no_grad():
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))


def plain_nll(model, window: torch.Tensor) -> float:
    logits = model(window[None]).logits[0].double()
    total = 0.0
    for place in range(len(window) - 1):
        row = logits[place]
        total += math.log(sum(math.exp(x) for x in row.tolist())) - row[window[place + 1]].item()
    return total / (len(window) - 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_chunked_losses_equal_a_plain_loop_over_whole_logits(family, ids):
    model = tiny(family)
    forward = forward_of(model, ids[:1])
    assert forward.chunked
    found = window_nll(forward, forward.states(ids), ids)
    expected = torch.tensor([plain_nll(model, window) for window in ids], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    value, _ = perplexity(found)
    assert value == pytest.approx(math.exp(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_logits_are_the_model_s_own(dtype, ids):
    model = tiny("gemma2").to(dtype)
    forward = forward_of(model, ids[:1])
    assert forward.chunked
    torch.testing.assert_close(
        forward.logits(forward.states(ids)), model(ids).logits.float(), rtol=0, atol=2e-2
    )


def test_a_model_that_does_something_else_to_its_logits_is_not_split(ids):
    model = tiny()
    original = model.forward

    def doubled(**options):
        found = original(**options)
        found.logits = found.logits * 2
        return found

    model.forward = doubled
    forward = forward_of(model, ids[:1])
    assert not forward.chunked
    found = window_nll(forward, forward.states(ids), ids)
    logits = 2 * original(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found, losses.mean(1).double())


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(ids):
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    forward = forward_of(model, ids[:1])
    seen.clear()
    window_nll(forward, forward.states(ids), ids)
    assert max(seen) == 5 and sum(seen) == 4 * 16


def test_the_standard_error_is_the_delta_method_s():
    nll = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean = 7 / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (1.0, 2.0, 4.0)) / 2)
    value, error = perplexity(nll)
    assert value == pytest.approx(math.exp(mean))
    assert error == pytest.approx(math.exp(mean) * deviation / math.sqrt(3))
    assert mean_and_error(nll[:1]) == (1.0, None)


def test_kl_and_agreement_equal_a_plain_loop(ids):
    dense, sparse = tiny(seed=0), tiny(seed=1)
    one, two = forward_of(dense, ids[:1]), forward_of(sparse, ids[:1])
    kl, agreement = window_fidelity(one, one.states(ids), two, two.states(ids))
    for window in range(len(ids)):
        total, same = 0.0, 0
        for place in range(ids.shape[1] - 1):
            p = dense(ids[window][None]).logits[0, place].double().softmax(-1)
            q = sparse(ids[window][None]).logits[0, place].double().softmax(-1)
            total += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            same += int(p.argmax() == q.argmax())
        assert kl[window].item() == pytest.approx(total / 16, rel=1e-4)
        assert agreement[window].item() == pytest.approx(same / 16)


def test_a_model_agrees_with_itself(ids):
    logits = tiny()(ids).logits[0]
    kl, same = divergence(logits, logits)
    assert kl.abs().max() == 0 and same.all()


def test_bos_starts_every_window_iff_the_tokenizer_adds_it():
    text = " ".join(f"w{i}" for i in range(23))
    with_bos, rule = cut_windows(text, word_tokenizer(bos=True), 5)
    assert with_bos.shape == (5, 5) and with_bos[:, 0].tolist() == [BOS] * 5
    assert rule == "<s> starts every window, as the tokenizer adds it: then 4 text tokens"
    plain, rule = cut_windows(text, word_tokenizer(), 5)
    assert rule == "the tokenizer adds no BOS: a window is 5 text tokens, all but the first predicted"
    expected = word_tokenizer()(text)["input_ids"]
    assert plain.flatten().tolist() == expected[:20] and with_bos[:, 1:].flatten().tolist() == expected[:20]


def test_the_first_windows_are_taken():
    text = " ".join(f"w{i}" for i in range(23))
    every, _ = cut_windows(text, word_tokenizer(), 5)
    assert cut_windows(text, word_tokenizer(), 5, windows=2)[0].equal(every[:2])


@pytest.mark.parametrize(
    ("context", "windows", "message"),
    [
        (64, None, "the text has 23 tokens, and 64 are needed for 1 window of 64 text tokens; use a shorter"),
        (8, 3, "has 23 tokens, and 24 are needed for 3 windows of 8 text tokens; use at most --windows 2"),
        (1, None, "--context 1 leaves nothing to predict; use at least 2"),
    ],
)
def test_a_text_that_is_too_short_says_found_and_needed(context, windows, message):
    with pytest.raises(UserError, match=message):
        cut_windows(" ".join(f"w{i}" for i in range(23)), word_tokenizer(), context, windows)
