"""Losses and perplexity against plain loops over the model's own whole logits."""

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

from llmsparse.eval import forward as module
from llmsparse.eval.fidelity import NLL, window_scores
from llmsparse.eval.forward import forward_of
from llmsparse.eval.perplexity import mean_and_error, perplexities, perplexity
from llmsparse.eval.windows import Windows

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


def losses_of(model, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    return window_scores(forward_of(model, ids[:1]), None, ids, torch.full((len(ids),), first))[NLL]


@pytest.mark.parametrize("family", CONFIGS)
def test_chunked_losses_equal_a_plain_loop_over_whole_logits(family, ids):
    model = tiny(family)
    assert forward_of(model, ids[:1]).chunked
    found = losses_of(model, ids).double().mean(1)
    expected = torch.tensor([plain_nll(model, window) for window in ids], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    value, _ = perplexity(16 * found, torch.full((4,), 16))
    assert value == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_what_comes_before_the_first_scored_prediction_is_zero_and_the_rest_unchanged(ids):
    model = tiny()
    whole, part = losses_of(model, ids), losses_of(model, ids, first=9)
    assert part[:, :9].abs().max() == 0
    torch.testing.assert_close(part[:, 9:], whole[:, 9:])


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
    logits = 2 * original(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(losses_of(model, ids), losses)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(ids):
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    forward = forward_of(model, ids[:1])
    seen.clear()
    window_scores(forward, None, ids, torch.zeros(4, dtype=torch.int64))
    assert max(seen) == 5 and sum(seen) == 4 * 16


def test_the_standard_error_is_the_delta_method_s():
    nll = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean = 7 / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (1.0, 2.0, 4.0)) / 2)
    value, error = perplexity(10 * nll, torch.full((3,), 10))
    assert value == pytest.approx(math.exp(mean))
    assert error == pytest.approx(math.exp(mean) * deviation / math.sqrt(3))
    assert mean_and_error(nll[:1], torch.ones(1)) == (1.0, None)


def test_with_unequal_counts_the_error_is_near_the_bootstrap_s():
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 30, (200,), generator=random)
    totals = counts * (2 + torch.rand(200, generator=random, dtype=torch.float64))
    mean, error = mean_and_error(totals, counts)
    drawn = torch.randint(200, (4000, 200), generator=random)
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    assert mean == pytest.approx((totals.sum() / counts.sum()).item())
    assert error == pytest.approx(means.std().item(), rel=0.1)


def test_word_and_byte_perplexity_divide_the_same_loss_by_words_and_bytes():
    nll = torch.tensor([[0.0, 2.0, 3.0], [1.0, 2.0, 4.0]])
    sizes = torch.tensor([[9, 4, 2], [3, 3, 3]])
    windows = Windows(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 0]), sizes, sizes // 3)
    found = perplexities(nll, windows)
    assert (found["tokens"], found["bytes"], found["words"]) == (5, 15, 4)
    assert found["perplexity"] == pytest.approx(math.exp(12 / 5))
    assert found["byte_perplexity"] == pytest.approx(math.exp(12 / 15))
    assert found["word_perplexity"] == pytest.approx(math.exp(12 / 4))
    assert found["byte_standard_error"] > 0
    unknown = perplexities(nll, windows._replace(bytes=None, words=None))
    assert unknown["byte_perplexity"] is None and unknown["words"] is None
