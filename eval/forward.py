"""A model in two steps, so that the logits of a whole window never exist at once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at a time
PROBE = 8  # tokens on which the split forward pass is compared with the model's own


class Forward(NamedTuple):
    """Hidden states first, logits of chosen positions after."""

    states: Callable[..., Tensor]  # ids (batch, context), options of the model -> (batch, context, hidden)
    logits: Callable[[Tensor], Tensor]  # states (tokens, hidden) -> float32 (tokens, vocabulary)
    chunked: bool  # False: the model cannot be split, and its states are its logits


def forward_of(model: Any, probe: Tensor) -> Forward:
    """Split ``model`` before its output embedding, if that gives its own logits on ``probe`` (1, tokens).

    The output embedding multiplies in the model's dtype, as the model does; what follows is float32.
    """
    whole = Forward(lambda ids, **o: model(input_ids=ids, use_cache=False, **o).logits, Tensor.float, False)
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return whole
    split = Forward(
        lambda ids, **o: base(input_ids=ids, use_cache=False, **o).last_hidden_state,
        lambda states: _scaled(head(states), model.config.get_text_config()).float(),
        True,
    )
    ids = probe[:, :PROBE]
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    try:
        found = split.logits(split.states(ids))
    except (RuntimeError, AttributeError, TypeError):
        return whole
    bound = 4 * torch.finfo(model.dtype).eps * wanted.nan_to_num().abs().max().item()
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=bound, equal_nan=True)
    return split if same else whole


def _scaled(logits: Tensor, config: Any) -> Tensor:
    """What models do to logits after the output embedding: cohere, falcon_h1, granite; gemma's soft cap."""
    for factor in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, factor, None) is not None:
            logits = logits * getattr(config, factor)
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def pieces(start: int, stop: int) -> Iterator[slice]:
    """``start`` to ``stop`` in slices of at most ``CHUNK``."""
    for begin in range(start, stop, CHUNK):
        yield slice(begin, min(begin + CHUNK, stop))
