"""The models of an evaluation, checked against each other and against the text before weights are loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError, first_line
from llmsparse.gridfile import GridFile


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Any:
    """The whole causal language model, ready to run.

    Raises:
        UserError: transformers cannot load it, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.is_packed:
        from llmsparse.quantizer import register

        register()
    try:
        with _no_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        TypeError,
        SafetensorError,
    ) as error:
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
    _apply_grid(model, checkpoint, trust_remote_code)
    return model.eval()


def _apply_grid(model: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Where codes lie beside the weights, put code times scale in the place of its rounding."""
    if (codes := GridFile.open(checkpoint.folder)) is None:
        return
    from llmsparse.skeleton import Skeleton

    skeleton = Skeleton(checkpoint, model.dtype, trust_remote_code)
    skeleton.model = model
    weights = {w.name: w for w in skeleton.weights}
    parameters = {skeleton.sources[f"{path}.weight"][0][0]: f"{path}.weight" for path in skeleton.tables}
    for name in codes.names:
        if name not in parameters and name not in weights:
            raise UserError(
                f"{codes.path} has codes for {name}, which the model lacks; delete it, or prune again"
            )
        if name in parameters:
            stored, view = checkpoint.tensor(name), model.get_parameter(parameters[name]).data
        else:
            stored = weights[name].stored(checkpoint.tensor(weights[name].source))
            view = skeleton.views([weights[name]])[name]
        view.copy_(codes.checked(name, stored))


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar over the weights, which would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Size of the weight files on disk."""
    return sum(Path(file).stat().st_size for file in checkpoint.files)


def check_context(checkpoint: Checkpoint, context: int, trust_remote_code: bool) -> None:
    """Refuse a context beyond the model's positions."""
    config = checkpoint.config(trust_remote_code).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and context > most:
        raise UserError(
            f"--context {context} is beyond {checkpoint.folder}'s {most} positions; use --context {most}"
        )


def check_ids(checkpoint: Checkpoint, ids: Tensor, trust_remote_code: bool) -> None:
    """Refuse token ids that the model has no embedding for."""
    size = checkpoint.config(trust_remote_code).get_text_config().vocab_size
    if ids.max() >= size:
        raise UserError(
            f"the text became token id {ids.max()}, but {checkpoint.folder} has a vocabulary of {size}; "
            "its tokenizer belongs to another model"
        )


def check_embeddings(checkpoint: Checkpoint, tokenizer: Any, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that knows tokens for which the model has no embedding."""
    size = checkpoint.config(trust_remote_code).get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer of {checkpoint.folder} has {len(tokenizer)} tokens, and its model a vocabulary of {size}; "
            "it belongs to another model"
        )


def check_same_vocabulary(
    checkpoint: Checkpoint, against: Checkpoint, tokenizer: Any, trust_remote_code: bool,
    option: str = "--against",
) -> None:  # fmt: skip
    """Refuse to compare models whose distributions are over different tokens; ``option`` named the second."""
    sizes = [c.config(trust_remote_code).get_text_config().vocab_size for c in (checkpoint, against)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{checkpoint.folder} has a vocabulary of {sizes[0]} and {option} {against.folder} one of "
            f"{sizes[1]}; give the model that it was pruned from"
        )
    if against.tokenizer(trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizers of {checkpoint.folder} and {option} {against.folder} differ; "
            "give the model that it was pruned from"
        )
