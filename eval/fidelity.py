"""How far a sparse model's next-token distribution lies from the dense one's, token by token."""

from typing import Any

import torch
from torch import Tensor

from llmsparse.eval.forward import Forward, pieces
from llmsparse.eval.perplexity import losses, mean_and_error, perplexity
from llmsparse.eval.windows import Windows

NLL, DENSE_NLL, KL, TOP1, TOP5 = range(5)
FIRST_POSITIONS = 32  # the positions before it are one line; every line after is twice as long


def divergence(dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(dense || sparse) in nats, top-1 and top-5 agreement, from logits (tokens, vocabulary).

    Top-k agreement: the dense model's likeliest token is among the sparse model's k likeliest.
    """
    best = dense.argmax(-1, keepdim=True)
    among = sparse.topk(min(5, sparse.shape[-1])).indices == best  # (tokens, 5)
    return kl_divergence(dense, sparse), among[:, 0], among.any(-1)


def kl_divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense || sparse) in nats of each token, (tokens,), from logits (tokens, vocabulary)."""
    expected = dense.log_softmax(-1)
    return (expected.exp() * (expected - sparse.log_softmax(-1))).sum(-1)


def window_scores(sparse: Forward, dense: Forward | None, ids: Tensor, first: Tensor) -> Tensor:
    """What each prediction of each window scores: (5 or 1, batch, context - 1) float32, 0 where not scored.

    In the order NLL, DENSE_NLL, KL, TOP1, TOP5; without ``dense`` NLL alone.
    """
    batch, context = ids.shape
    scores = torch.zeros(1 if dense is None else 5, batch, context - 1)
    states = sparse.states(ids)
    dense_states = None if dense is None else dense.states(ids)
    for window in range(batch):
        for span in pieces(int(first[window]), context - 1):
            targets = ids[window, span.start + 1 : span.stop + 1]
            logits = sparse.logits(states[window, span])
            found = [losses(logits, targets)]
            if dense is not None and dense_states is not None:
                dense_logits = dense.logits(dense_states[window, span])
                found += [losses(dense_logits, targets), *divergence(dense_logits, logits)]
            for score, values in zip(scores, found, strict=True):
                score[window, span] = values.float().cpu()
    return scores


def fidelity(scores: Tensor, windows: Windows) -> dict[str, Any]:
    """The dense model's perplexity, KL and agreement over all scored tokens, and by position in the window."""
    counts = windows.scored.sum(1)
    value, error = perplexity(scores[DENSE_NLL].sum(1), counts)
    kl, kl_error = mean_and_error(scores[KL].double().sum(1), counts)
    return {
        "dense_perplexity": value,
        "dense_standard_error": error,
        "kl": kl,
        "kl_standard_error": kl_error,
        "top1_agreement": mean_and_error(scores[TOP1].sum(1), counts)[0],
        "top5_agreement": mean_and_error(scores[TOP5].sum(1), counts)[0],
        "positions": _by_position(scores, windows),
    }


def _by_position(scores: Tensor, windows: Windows) -> list[dict[str, Any]]:
    """A line for the tokens of each range of positions in the window, each range twice as long as the last."""
    lines, start, context = [], 1, windows.ids.shape[1]
    while start < context:
        stop = min(max(FIRST_POSITIONS, 2 * start), context)
        span = slice(start - 1, stop - 1)  # position p is prediction p - 1
        counts = windows.scored[:, span].sum(1)
        if counts.sum():
            totals = scores[:, :, span].double().sum(2)
            lines.append(
                {
                    "from": start,
                    "to": stop - 1,
                    "tokens": int(counts.sum()),
                    "perplexity": perplexity(totals[NLL], counts)[0],
                    "dense_perplexity": perplexity(totals[DENSE_NLL], counts)[0],
                    "kl": mean_and_error(totals[KL], counts)[0],
                    "top1_agreement": mean_and_error(totals[TOP1], counts)[0],
                    "top5_agreement": mean_and_error(totals[TOP5], counts)[0],
                }
            )
        start = stop
    return lines
