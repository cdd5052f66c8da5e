"""Continue a prompt, token by token as they come, and say how fast."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.checkpoint import Checkpoint
from llmsparse.device import forward_dtype, pick_device
from llmsparse.errors import UserError, first_line
from llmsparse.eval.models import check_ids, load_model


def generate(
    model: str | Path,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue ``prompt`` by up to ``max_new_tokens`` tokens; ``write`` is given each piece of text as it comes.

    ``temperature`` 0 takes the likeliest token each time. Returns ``text``, ``prompt_tokens``, ``new_tokens``,
    ``prompt_tokens_per_second`` and ``tokens_per_second`` (of the tokens after the first; None where there is one).

    Raises:
        UserError: no checkpoint, no prompt, one that is too long, a chat without a chat template.
    """
    if prompt is None or not prompt:
        raise UserError('there is nothing to continue; give --prompt "some text"')
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: it starts at 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: it is 0 or more")
    where = pick_device(device)
    checkpoint = Checkpoint.open(model, revision, token, cache_dir)
    tokenizer = checkpoint.tokenizer(trust_remote_code)
    ids = _ids(tokenizer, prompt, chat, model)
    check_ids(checkpoint, ids, trust_remote_code)
    _check_length(checkpoint, ids.shape[1], max_new_tokens, trust_remote_code)
    stored = checkpoint.stored_dtype  # reading fewer bytes a token is what makes decoding fast
    used = stored if dtype == "auto" else forward_dtype(dtype, stored, where)
    loaded = load_model(checkpoint, used, where, trust_remote_code)
    stream = _stream(tokenizer, write)
    _continue(loaded, ids.to(where), stream, max_new_tokens, temperature, seed)
    new = len(stream.times) - 1
    return {
        "model": str(model),
        "prompt": prompt,
        "text": stream.text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": new,
        "prompt_tokens_per_second": ids.shape[1] / (stream.times[1] - stream.times[0]) if new else None,
        "tokens_per_second": (new - 1) / (stream.times[-1] - stream.times[1]) if new > 1 else None,
        "dtype": str(used).removeprefix("torch."),
        "device": str(where),
        "threads": torch.get_num_threads(),
    }


def _ids(tokenizer: Any, prompt: str, chat: bool, model: str | Path) -> Tensor:
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{model} has no chat template; leave --chat out, or use a model that was tuned to chat"
        )
    else:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.shape[1] == 0:
        raise UserError(f"the tokenizer of {model} makes no token of the prompt {prompt!r}; give another")
    return ids.long()


def _check_length(checkpoint: Checkpoint, length: int, new: int, trust_remote_code: bool) -> None:
    config = checkpoint.config(trust_remote_code).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length + new > most:
        do = f"use --max-new-tokens {most - length}" if length < most else "shorten the prompt"
        raise UserError(
            f"the prompt's {length} tokens and {new} new ones are beyond the {most} positions of "
            f"{checkpoint.folder}; {do}"
        )


def _stream(tokenizer: Any, write: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    class Stream(TextStreamer):
        """The text as it comes, and when each token came; the first time is the beginning."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.text, self.times = "", [0.0]

        def put(self, value: Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            if write is not None:
                write(text + ("\n" if stream_end else ""))

    return Stream()


@torch.inference_mode()
def _continue(model: Any, ids: Tensor, stream: Any, new: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    pad = model.generation_config.pad_token_id
    ends = model.generation_config.eos_token_id
    draws: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    if not temperature:  # what a model's own configuration says of drawing
        draws |= {"temperature": None, "top_p": None, "top_k": None}
    stream.times[0] = time.perf_counter()
    try:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=stream,
            pad_token_id=pad if pad is not None else ends[0] if isinstance(ends, list) else ends, **draws,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UserError(f"{type(model).__name__} cannot generate: {first_line(error)}") from error
