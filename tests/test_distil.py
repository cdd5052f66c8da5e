"""The loss of a recovery against plain formulas and against automatic differentiation of whole logits."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from llmsparse import distil
from llmsparse.eval import forward as split
from llmsparse.eval.fidelity import kl_divergence
from llmsparse.eval.forward import forward_of
from tests.tiny import VOCAB, save_tiny


def logits_of(tokens, vocabulary, seed, scale=3.0):
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=random, dtype=torch.float64)


@pytest.fixture
def models(tmp_path):
    folders = [save_tiny("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    return [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in folders]


def test_gradients_by_chunk_are_those_of_whole_logits(models, monkeypatch):
    monkeypatch.setattr(split, "CHUNK", 7)  # no divisor of the tokens
    student, teacher = models
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    pair = [functional.log_softmax(each, -1) for each in (logits, expected)]
    loss = functional.kl_div(*pair, log_target=True, reduction="batchmean")
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    forward = forward_of(student, ids[:1])
    with torch.enable_grad():
        states = forward.states(ids)
        found = distil.backward(
            forward, states, lambda span, own: kl_divergence(expected[span].float(), own), 1 / 48
        )
    assert float(found) / 48 == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        alone = distil.forward(forward, states, lambda span, own: kl_divergence(expected[span].float(), own))
    assert float(alone) == pytest.approx(float(found), rel=1e-6)


def test_its_divergence_and_gradient_are_those_of_whole_distributions_step_by_step():
    expected, student = logits_of(5, 40, 0), logits_of(5, 40, 1).requires_grad_()
    given = logits_of(5, 1, 2)[:, 0]  # another gradient for each token
    found = distil.of_whole(expected, student)
    (gradient,) = torch.autograd.grad(found, student, given)
    plain = kl_divergence(expected, student)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, student, given)[0])
    assert float(distil.of_whole(expected, expected).abs().max()) == 0
    single = expected.float(), student.detach().float()
    with torch.autocast("cpu", torch.bfloat16):  # as in a run: the divergence is not rounded
        assert torch.equal(distil.of_whole(*single), kl_divergence(*single))


def test_another_loss_on_the_blocks_adds_its_own_gradient(models):
    student, _ = models
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(2))
    forward, weight = forward_of(student, ids), student.model.layers[0].mlp.up_proj.weight
    expected = logits_of(8, VOCAB, 0).float()
    grads = []
    for share, extra in ((1.0, False), (0.0, True), (1.0, True)):
        student.zero_grad()
        states = forward.states(ids)
        other = states.square().mean() if extra else None
        distil.backward(forward, states, lambda span, own: kl_divergence(expected[span], own), share, other)
        grads.append(weight.grad.clone())
    torch.testing.assert_close(grads[2], grads[0] + grads[1])


def plain_error(student, teacher):
    """One block's, by loops over windows, tokens and channels."""
    if teacher.dim() == 3:
        each = [plain_error(*pair) for pair in zip(student, teacher, strict=True)]
        return sum(each) / len(each)
    tokens = teacher.tolist()
    norms, width = [sum(x * x for x in token) for token in tokens], len(tokens[0])
    share = [
        sum(t[c] ** 2 / n for t, n in zip(tokens, norms, strict=True)) / len(tokens) for c in range(width)
    ]
    weighing = [1 / (part + 1e-3 / width) for part in share]
    whole = sum(w * part for w, part in zip(weighing, share, strict=True))
    errors = [
        sum(w / whole * (a - b) ** 2 for w, a, b in zip(weighing, s, t, strict=True)) / n
        for s, t, n in zip(student.tolist(), tokens, norms, strict=True)
    ]
    return sum(errors) / len(errors)


def test_no_token_and_no_channel_outweighs_the_rest_of_a_block():
    random = torch.Generator().manual_seed(0)
    teacher = [torch.randn(2, 5, 8, generator=random) for _ in range(3)]
    teacher[1][0, 0] *= 1e3  # massive tokens and channels
    teacher[2][..., 3] *= 30
    student = [
        t + 0.1 * torch.randn(t.shape, generator=random) * t.norm(dim=-1, keepdim=True) for t in teacher
    ]
    wanted = [plain_error(*pair) for pair in zip(student, teacher, strict=True)]
    assert float(distil.block_errors(student, teacher)) == pytest.approx(sum(wanted) / 3, rel=1e-4)
    small = teacher[2].clone()
    small[..., 5] *= (
        2  # one of the other channels twice as large: heard, though it is a thousandth of the norm
    )
    assert float(distil.block_errors([small], [teacher[2]])) > 0.05


def of_likeliest(teacher, student, count):
    """One token: KL between the ``count`` likeliest tokens and one outcome for all the others, by plain sums."""
    p, q = ([math.exp(x - max(each)) for x in each] for each in (teacher, student))
    p, q = ([x / sum(each) for x in each] for each in (p, q))
    seen = sorted(range(len(p)), key=lambda i: -p[i])[:count]
    found = sum(p[i] * math.log(p[i] / q[i]) for i in seen)
    rest, left = 1 - sum(p[i] for i in seen), 1 - sum(q[i] for i in seen)
    return found + (rest * math.log(rest / left) if rest > 1e-9 else 0.0)


@pytest.mark.parametrize("count", [1, 5, 31, 32])
def test_the_likeliest_tokens_and_all_others_together(count):
    teacher, student = logits_of(12, 32, 0), logits_of(12, 32, 1)
    ids, logs = distil.likeliest(teacher, count)
    assert ids.dtype == torch.int32 and logs.dtype == torch.float16 and ids.shape == (12, count)
    found = distil.of_likeliest(ids, logs, student)
    wanted = [of_likeliest(t, s, count) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0.01, atol=0.01)
    assert bool((found <= kl_divergence(teacher, student) + 0.01).all())


def test_all_tokens_written_down_are_the_whole_divergence():
    teacher, student = logits_of(12, 32, 0), logits_of(12, 32, 1)
    found = distil.of_likeliest(*distil.likeliest(teacher, 32), student)
    torch.testing.assert_close(found, kl_divergence(teacher, student), rtol=0.01, atol=0.01)
