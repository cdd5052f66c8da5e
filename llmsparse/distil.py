"""The loss of a recovery: how far a student's next-token distributions, and its blocks, lie from its teacher's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmsparse.eval.forward import Forward, pieces
from llmsparse.massive import parts, relative_error, weights

Divergence = Callable[[slice, Tensor], Tensor]  # of some tokens, given the student's logits: nats (tokens,)


def backward(
    student: Forward, states: Tensor, divergence: Divergence, share: float, extra: Tensor | None = None
) -> Tensor:
    """Add the gradient of ``share`` x (the summed divergence of ``states`` (..., hidden)) + ``extra``; return that sum.

    A chunk of tokens has logits at a time: its gradient comes back to its states, and theirs go through the model.
    """
    flat = states.flatten(0, -2)
    total, grads = flat.new_zeros((), dtype=torch.float32), []
    for span in pieces(0, len(flat)):
        leaf = flat[span].detach().requires_grad_()
        with torch.enable_grad():
            lost = divergence(span, student.logits(leaf)).sum()
        (share * lost).backward()
        total += lost.detach()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    outputs, gradients = [flat], [torch.cat(grads)]
    if extra is not None:
        outputs.append(extra)
        gradients.append(torch.ones_like(extra))
    torch.autograd.backward(outputs, gradients)
    return total


def forward(student: Forward, states: Tensor, divergence: Divergence) -> Tensor:
    """The summed divergence of ``states`` (..., hidden) alone."""
    flat = states.flatten(0, -2)
    return sum(
        (divergence(span, student.logits(flat[span])).sum() for span in pieces(0, len(flat))),
        flat.new_zeros((), dtype=torch.float32),
    )


def block_errors(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The mean over blocks of the relative errors of outputs (windows, tokens, hidden).

    In a window no token and no channel outweighs the rest; so it does not matter which windows share a pass.
    SquareHead (Kurtic et al., arXiv 2310.06927) divides by the whole layer's norm, which a few tokens make up.
    """
    errors = [
        relative_error(output, aim, weights(parts(aim)))
        for block, wanted in zip(student, teacher, strict=True)
        for output, aim in zip(block.float(), wanted.float(), strict=True)
    ]
    return torch.stack(errors).mean()


class _Whole(torch.autograd.Function):
    """KL(teacher || student) of logits (tokens, vocabulary), whose gradient is softmax(student) - softmax(teacher).

    Differentiated step by step it would read and write the vocabulary twice as often.
    """

    @staticmethod
    def forward(ctx: Any, expected: Tensor, student: Tensor) -> Tensor:
        wanted, found = expected.log_softmax(-1), student.log_softmax(-1)
        share = wanted.exp()
        lost = (share * wanted.sub_(found)).sum(-1)  # no product that autocast would round
        if student.requires_grad:
            ctx.save_for_backward(found.exp_().sub_(share))
        return lost

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0].unsqueeze(-1)


def of_whole(expected: Tensor, student: Tensor) -> Tensor:
    """KL in nats of each token (tokens,) between the distributions of logits (tokens, vocabulary)."""
    found: Tensor = _Whole.apply(expected, student)
    return found


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ids int32 and log-probabilities float16 (tokens, count) of the ``count`` likeliest tokens of ``logits``."""
    found = logits.log_softmax(-1).topk(min(count, logits.shape[-1]))
    return found.indices.to(torch.int32), found.values.to(torch.float16)


def of_likeliest(ids: Tensor, logs: Tensor, student: Tensor) -> Tensor:
    """KL in nats of each token between distributions over the teacher's likeliest tokens and all others together.

    ``ids``, ``logs`` (tokens, k): what ``likeliest`` gave; ``student``: logits (tokens, vocabulary). At most the
    divergence of the whole distributions, by the data processing inequality.
    """
    expected = logs.float()
    found = student.log_softmax(-1).gather(-1, ids.long())
    seen = (expected.exp() * (expected - found)).sum(-1)
    rest, left = (1 - part.exp().sum(-1) for part in (expected, found))
    rest, left = rest.clamp(min=0), left.clamp(min=1e-7)
    return seen + rest * (rest.clamp(min=1e-7).log() - left.log())
