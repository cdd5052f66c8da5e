"""Perplexity per token, word and byte, from the losses of scored tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from llmsparse.eval.windows import Windows


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of ``targets`` (tokens,) under ``logits`` (tokens, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def mean_and_error(totals: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Sum of ``totals`` over sum of ``counts``, one of each a window, and its standard error over windows.

    The error is the ratio estimator's; with equal counts it is that of a plain mean. None for one window.
    """
    totals, counts = totals.double(), counts.double()
    mean, n = (totals.sum() / counts.sum()).item(), len(totals)
    if n < 2:
        return mean, None
    squares = (totals - mean * counts).square().sum().item()
    return mean, math.sqrt(squares * n / (n - 1)) / counts.sum().item()


def perplexity(totals: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """exp of the windows' loss per count (token, word or byte), and its standard error by the delta method."""
    mean, error = mean_and_error(totals, counts)
    value = math.exp(mean) if mean < 700 else math.inf
    return value, None if error is None else value * error


def perplexities(nll: Tensor, windows: Windows) -> dict[str, Any]:
    """Token, word and byte perplexity of ``nll`` (count, context - 1), zero where nothing is scored.

    Word and byte perplexity divide the same loss by the words (split at white space) and UTF-8 bytes of the
    scored tokens, so that models with different tokenizers can be compared; None where the tokenizer does
    not say which characters a token stands for.
    """
    totals, scored = nll.double().sum(1), windows.scored
    sizes = {"": scored.long(), "word_": windows.words, "byte_": windows.bytes}
    found: dict[str, Any] = {}
    for unit, size in sizes.items():
        counts = None if size is None else (size * scored).sum(1)
        value, error = (None, None) if counts is None or not counts.sum() else perplexity(totals, counts)
        found |= {f"{unit}perplexity": value, f"{unit}standard_error": error}
        found[f"{(unit or 'token_')[:-1]}s"] = None if counts is None else int(counts.sum())
    return found
