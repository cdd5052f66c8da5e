"""Perplexity over non-overlapping windows, as GPTQ (arXiv:2210.17323), SparseGPT and Wanda compute it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.calibration import window_prefix
from llmsparse.errors import UserError

CHUNK = 256  # tokens whose logits exist at a time
PROBE = 8  # tokens on which the split forward pass is compared with the model's own


class Forward(NamedTuple):
    """A model in two steps, so that the logits of a window never exist whole."""

    states: Callable[[Tensor], Tensor]  # ids (batch, context) -> (batch, context, hidden)
    logits: Callable[[Tensor], Tensor]  # states (tokens, hidden) -> float32 (tokens, vocabulary)
    chunked: bool  # False: the model cannot be split, and its states are its logits


def forward_of(model: Any, probe: Tensor) -> Forward:
    """Split ``model`` before its output embedding, if that gives its own logits on ``probe`` (1, tokens).

    The output embedding multiplies in the model's dtype, as the model does; the loss is taken in float32.
    """
    whole = Forward(lambda ids: model(input_ids=ids, use_cache=False).logits, Tensor.float, False)
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return whole
    split = Forward(
        lambda ids: base(input_ids=ids, use_cache=False).last_hidden_state,
        lambda states: _scaled(head(states), model.config.get_text_config()).float(),
        True,
    )
    ids = probe[:, :PROBE]
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    try:
        found = split.logits(split.states(ids))
    except (RuntimeError, AttributeError, TypeError):
        return whole
    bound = 4 * torch.finfo(model.dtype).eps * wanted.abs().max().item()
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=bound)
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


def cut_windows(text: str, tokenizer: Any, context: int, windows: int | None = None) -> tuple[Tensor, str]:
    """Tokenise ``text`` once, cut it into windows (count, context); returns them and the BOS rule in words.

    A tokenizer that adds BOS itself gets it at the start of every window, before context-1 text tokens.

    Raises:
        UserError: the text is shorter than one window, or fewer windows than asked for.
    """
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
    prefix = window_prefix(tokenizer)
    length = context - len(prefix)
    if length < 1 or context < 2:
        raise UserError(f"--context {context} leaves nothing to predict; use at least {len(prefix) + 2}")
    count = len(ids) // length
    asked = windows or 1
    if count < asked:
        advice = f"use at most --windows {count}" if count else "use a shorter --context or a longer text"
        raise UserError(
            f"the text has {len(ids):,} tokens, and {asked * length:,} are needed for {asked} "
            f"window{'s' * (asked > 1)} of {length} text tokens; {advice}"
        )
    count = windows or count
    body = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    start = torch.tensor(prefix, dtype=torch.int64).expand(count, -1)
    return torch.cat([start, body], dim=1), _rule(tokenizer, prefix, context)


def _rule(tokenizer: Any, prefix: list[int], context: int) -> str:
    if not prefix:
        return f"the tokenizer adds no BOS: a window is {context} text tokens, all but the first predicted"
    special = " ".join(tokenizer.convert_ids_to_tokens(prefix))
    return (
        f"{special} starts every window, as the tokenizer adds it: then {context - len(prefix)} text tokens"
    )


def chunks(batch: int, context: int) -> Iterator[tuple[int, slice]]:
    """(window, positions) pieces of at most ``CHUNK`` positions; the last position predicts nothing."""
    for window in range(batch):
        for start in range(0, context - 1, CHUNK):
            yield window, slice(start, min(start + CHUNK, context - 1))


def window_nll(forward: Forward, states: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of each window's context-1 next tokens: (batch,) float64."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    for window, span in chunks(*ids.shape):
        logits = forward.logits(states[window, span])
        targets = ids[window, span.start + 1 : span.stop + 1]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total[window] += losses.double().sum().cpu()
    return total / (ids.shape[1] - 1)


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean over windows and its standard error, which one window cannot give (None)."""
    error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def perplexity(nll: Tensor) -> tuple[float, float | None]:
    """exp of the mean of the windows' ``nll``, and its standard error by the delta method."""
    mean, error = mean_and_error(nll)
    value = math.exp(mean) if mean < 700 else math.inf
    return value, None if error is None else value * error
