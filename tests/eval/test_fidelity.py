"""KL divergence and agreement against plain loops, over all tokens and by position."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmsparse.eval import forward as module
from llmsparse.eval.fidelity import divergence, fidelity, window_scores
from llmsparse.eval.forward import forward_of
from llmsparse.eval.windows import Windows

VOCAB, CONTEXT = 67, 75


def tiny(seed: int):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


def plain(dense, sparse, ids, first=0):
    """(window, position) -> KL, top-1, top-5 and both losses, one token after another."""
    found = {}
    for window, tokens in enumerate(ids):
        logits = [model(tokens[None]).logits[0].double() for model in (dense, sparse)]
        for position in range(first + 1, len(tokens)):
            p, q = (row[position - 1].softmax(-1).tolist() for row in logits)
            best = max(range(VOCAB), key=lambda token: p[token])
            order = sorted(range(VOCAB), key=lambda token: -q[token])
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            target = int(tokens[position])
            found[window, position] = (
                kl,
                best == order[0],
                best in order[:5],
                -math.log(q[target]),
                -math.log(p[target]),
            )
    return found


@pytest.mark.parametrize("first", [0, 40])
def test_fidelity_equals_a_plain_loop(ids, first):
    dense, sparse = tiny(0), tiny(0)
    sparse.lm_head.weight.add_(torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    windows = Windows(ids, torch.full((3,), first), None, None)
    scores = window_scores(forward_of(sparse, ids[:1]), forward_of(dense, ids[:1]), ids, windows.first)
    found, expected = fidelity(scores, windows), plain(dense, sparse, ids, first)

    def mean(column, positions=range(CONTEXT)):
        values = [row[column] for (_, position), row in expected.items() if position in positions]
        return sum(values) / len(values)

    assert found["kl"] == pytest.approx(mean(0), rel=1e-4) and found["kl"] > 0.01
    assert found["top1_agreement"] == pytest.approx(mean(1)) and 0 < mean(1) < mean(2) <= 1
    assert found["top5_agreement"] == pytest.approx(mean(2))
    assert found["dense_perplexity"] == pytest.approx(math.exp(mean(4)), rel=1e-4)
    spans = [(line["from"], line["to"]) for line in found["positions"]]
    assert spans == [(1, 31), (32, 63), (64, 74)][0 if first == 0 else 1 :]
    for line in found["positions"]:
        positions = range(line["from"], line["to"] + 1)
        assert line["kl"] == pytest.approx(mean(0, positions), rel=1e-4)
        assert line["top1_agreement"] == pytest.approx(mean(1, positions))
        assert line["top5_agreement"] == pytest.approx(mean(2, positions))
        assert line["perplexity"] == pytest.approx(math.exp(mean(3, positions)), rel=1e-4)
        assert line["dense_perplexity"] == pytest.approx(math.exp(mean(4, positions)), rel=1e-4)
    assert sum(line["tokens"] for line in found["positions"]) == len(expected)


def test_ranges_of_positions_double_up_to_4096():
    ids = torch.zeros(1, 4097, dtype=torch.int64)
    scores = torch.zeros(5, 1, 4096)
    lines = fidelity(scores, Windows(ids, torch.zeros(1, dtype=torch.int64), None, None))["positions"]
    assert [(line["from"], line["to"]) for line in lines] == [
        (1, 31), (32, 63), (64, 127), (128, 255), (256, 511), (512, 1023), (1024, 2047), (2048, 4095), (4096, 4096),
    ]  # fmt: skip


def test_a_model_agrees_with_itself(ids):
    logits = tiny(0)(ids).logits[0]
    kl, top1, top5 = divergence(logits, logits)
    assert kl.abs().max() == 0 and top1.all() and top5.all()
