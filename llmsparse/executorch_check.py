"""What a .pte file is worth: ExecuTorch's own logits beside those of transformers, and the weights in the file."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse import executorch_program, executorch_runtime, export_check, extras
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model

TOKENS = 1024  # the runtime takes one at a time
PROMPT, GREEDY = 32, 32  # tokens of the continued text, and of its continuation
DTYPES = {1: torch.int8, 4: torch.float32}  # bytes of a stored number
GAIN = "ExecuTorch gains no speed and no memory from zeros: it stores and multiplies every weight"


def check(
    checkpoint: Checkpoint, file: Path, result: dict[str, Any], *, trust_remote_code: bool, progress: Any
) -> dict[str, Any]:
    """Perplexity in transformers and in ExecuTorch, zeros, sizes, load time, speed, and what failed."""
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, min(config.max_position_embeddings, result["context"]), TOKENS)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
    prompt = text.windows.ids[0][: min(PROMPT, result["context"] - GREEDY)]
    continued = export_check.greedy(model, prompt.tolist(), GREEDY)
    del model
    zeros = _zeros(checkpoint, file, result["constants"])
    progress.start("ExecuTorch", 1)
    asked = {**export_check.request(text.windows), "prompt": prompt.tolist(), "count": GREEDY}
    told = executorch_runtime.run(file, asked)
    progress.advance("ExecuTorch", "")
    found = export_check.summary(
        text, result, source=source, exported=export_check.told(told["losses"], text.windows), zeros=zeros,
        files=[file], gain=GAIN, runtime={
            "name": f"ExecuTorch {extras.version('executorch')} with XNNPACK",
            **{key: told[key] for key in ("load_seconds", "tokens_per_second")},
        },
    )  # fmt: skip
    equal = export_check.equal(continued, told["greedy"])
    found["notes"].append(f"greedy continuation equal to the source's for {equal} of {GREEDY} tokens")
    return found


def _zeros(checkpoint: Checkpoint, file: Path, names: dict[str, str]) -> dict[str, float | None]:
    """Of the linear weights, as they are in the file."""
    held, zeros = executorch_program.stored(file), export_check.Zeros()
    for source, name in names.items():
        found = weight(held, file, source, name, tuple(checkpoint.shape(source)))
        if ".layers." in source:
            zeros.add(checkpoint.tensor(source), found)
    return zeros.shares()


def weight(held: dict[str, bytes], file: Path, source: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Codes or floats of one weight among the constants of ``file``.

    Raises:
        UserError: it is not there.
    """
    size, left = divmod(len(held.get(name, b"")), prod(shape))
    dtype = None if left else DTYPES.get(size)
    if dtype is None:
        raise UserError(
            f"{file} does not hold {source} as export.json says: it was changed, or executorch "
            f"{extras.version('executorch')} stores weights in another way than 1.5.1 did; export again"
        )
    return torch.frombuffer(bytearray(held[name]), dtype=dtype).view(shape)
