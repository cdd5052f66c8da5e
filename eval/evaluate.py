"""One evaluation: perplexity on a text, and fidelity to the dense model when there is one to compare with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError, first_line
from llmsparse.eval.fidelity import window_fidelity
from llmsparse.eval.perplexity import cut_windows, forward_of, mean_and_error, perplexity, window_nll
from llmsparse.eval.text import load_text
from llmsparse.report import versions


def evaluate(
    model: str | Path,
    data: str = "wikitext2",
    *,
    context: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 1,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> dict[str, Any]:
    """Perplexity of ``model`` over the first ``windows`` (all) windows of ``context`` tokens of ``data``.

    ``against`` is the dense model: adds ``kl`` (nats per token, dense to sparse), ``kl_standard_error`` and
    ``top1_agreement``. ``tokens`` counts the scored predictions; a standard error over one window is None.
    Everything that can be refused is refused before weights are loaded.

    Raises:
        UserError: no checkpoint, no text, text shorter than a window, a context beyond the model's
            positions, another vocabulary in ``against``.
    """
    if windows is not None and windows < 1 or batch_size < 1:
        raise UserError(f"--windows {windows} with batches of {batch_size}: both start at 1")
    where = pick_device(device)
    checkpoints = [Checkpoint.open(model, revision, token, cache_dir)]
    if against is not None:
        checkpoints.append(Checkpoint.open(against, None, token, cache_dir))
    for checkpoint in checkpoints:
        _check_context(checkpoint, context, trust_remote_code)
    tokenizer = checkpoints[0].tokenizer(trust_remote_code)
    if against is not None:
        _check_same_vocabulary(checkpoints[0], checkpoints[1], tokenizer, trust_remote_code)
    text, digest, label = load_text(data, token=token, cache_dir=cache_dir)
    ids, rule = cut_windows(text, tokenizer, context, windows)
    _check_ids(checkpoints[0], ids, trust_remote_code)
    used = forward_dtype(dtype, checkpoints[0].stored_dtype, where)
    models = [_load(checkpoint, used, where, trust_remote_code) for checkpoint in checkpoints]
    measured = _measure(models, ids.to(where), batch_size, progress)
    return {
        "model": str(model),
        "data": label,
        **measured,
        "tokens": ids.shape[0] * (context - 1),
        "windows": ids.shape[0],
        "context": context,
        "bos": rule,
        "data_sha256": digest,
        "dtype": str(used).removeprefix("torch."),
        "device": str(where),
        "versions": versions(),
    } | ({} if against is None else {"against": str(against)})


@torch.inference_mode()
def _measure(models: list[Any], ids: Tensor, batch_size: int, progress: Any) -> dict[str, Any]:
    """Run the windows through the model, and the dense one beside it, batch by batch."""
    sparse, *dense = [forward_of(model, ids[:1]) for model in models]
    if progress is not None:
        progress.start("evaluate", len(ids))
    nll: list[Tensor] = []
    fidelity: list[tuple[Tensor, Tensor]] = []
    for batch in ids.split(batch_size):
        states = sparse.states(batch)
        nll.append(window_nll(sparse, states, batch))
        for other in dense:
            fidelity.append(window_fidelity(other, other.states(batch), sparse, states))
        if progress is not None:
            detail = f"perplexity {perplexity(torch.cat(nll))[0]:.2f}"
            for _ in batch:
                progress.advance("evaluate", detail)
    value, error = perplexity(torch.cat(nll))
    result = {"perplexity": value, "standard_error": error}
    if fidelity:
        kl, agreement = (torch.cat(part) for part in zip(*fidelity, strict=True))
        result["kl"], result["kl_standard_error"] = mean_and_error(kl)
        result["top1_agreement"] = agreement.mean().item()
    return result | {"logits": "by chunk" if sparse.chunked else "whole window"}


def _load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.folder} cannot be loaded as a causal language model: {first_line(error)}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{checkpoint.folder} lacks {len(missing)} weights, such as {missing[0]}; "
            f"it is no complete {type(model).__name__}"
        )
    return model.eval()


def _check_context(checkpoint: Checkpoint, context: int, trust_remote_code: bool) -> None:
    config = checkpoint.config(trust_remote_code).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and context > most:
        raise UserError(
            f"--context {context} is beyond {checkpoint.folder}'s {most} positions; use --context {most}"
        )


def _check_ids(checkpoint: Checkpoint, ids: Tensor, trust_remote_code: bool) -> None:
    size = checkpoint.config(trust_remote_code).get_text_config().vocab_size
    if ids.max() >= size:
        raise UserError(
            f"the text became token id {ids.max()}, but {checkpoint.folder} has a vocabulary of {size}; "
            "its tokenizer belongs to another model"
        )


def _check_same_vocabulary(
    checkpoint: Checkpoint, against: Checkpoint, tokenizer: Any, trust_remote_code: bool
) -> None:
    sizes = [c.config(trust_remote_code).get_text_config().vocab_size for c in (checkpoint, against)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{checkpoint.folder} has a vocabulary of {sizes[0]} and --against {against.folder} one of "
            f"{sizes[1]}; compare a model with the one that it was pruned from"
        )
    if against.tokenizer(trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizers of {checkpoint.folder} and --against {against.folder} differ; "
            "compare a model with the one that it was pruned from"
        )
