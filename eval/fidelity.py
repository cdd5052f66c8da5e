"""How far a sparse model's next-token distribution lies from the dense one's."""

import torch
from torch import Tensor

from llmsparse.eval.perplexity import Forward, chunks


def divergence(dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || sparse) in nats and whether the top token agrees, from logits (tokens, vocabulary)."""
    log_dense, log_sparse = dense.log_softmax(-1), sparse.log_softmax(-1)
    kl = (log_dense.exp() * (log_dense - log_sparse)).sum(-1)
    return kl, dense.argmax(-1) == sparse.argmax(-1)


def window_fidelity(
    dense: Forward, dense_states: Tensor, sparse: Forward, sparse_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean KL and top-1 agreement of each window, over the scored positions: two (batch,) float64."""
    batch, context = dense_states.shape[:2]
    kl, agreement = torch.zeros(2, batch, dtype=torch.float64)
    for window, span in chunks(batch, context):
        found = divergence(
            dense.logits(dense_states[window, span]), sparse.logits(sparse_states[window, span])
        )
        kl[window] += found[0].double().sum().cpu()
        agreement[window] += found[1].sum().cpu()
    return kl / (context - 1), agreement / (context - 1)
