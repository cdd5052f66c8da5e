"""What a GGUF file is worth: its own tensors in transformers, and the whole of it in llama.cpp."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse import export_check, extras, gguf_file, llama_cpp
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.gguf_layout import family_of

POSITIONS = 256  # teacher-forced log-probabilities that are compared
SPARE = 64  # more are asked for: llama.cpp names no token that is half a character
PROMPT, GREEDY = 32, 32  # tokens of the continued text, and of its continuation
APART = {  # nats a token, the mean, at most; activations are rounded to 8 bits before all but floats
    **dict.fromkeys(("F32", "F16", "BF16"), 0.02),
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_K", "Q6_K"), 0.2),
}
GAIN = "llama.cpp gains no speed and no memory from zeros: it stores and multiplies every weight"


def check(
    checkpoint: Checkpoint, file: Path, result: dict[str, Any], *, trust_remote_code: bool, progress: Any
) -> dict[str, Any]:
    """Perplexity of source and file, parity with llama.cpp where it is installed, zeros, sizes, and what failed.

    One float32 model is in memory: first the source's weights, then the file's in their place.
    """
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, config.max_position_embeddings)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
    zeros = fill(model, checkpoint, file)
    exported = export_check.score(model, text.windows, "perplexity of the file", progress)
    parity = None
    if llama_cpp.available():
        progress.start("llama.cpp", 1)
        parity = _parity(model, file, text, tokenizer)
        progress.advance("llama.cpp", "")
    found = export_check.summary(
        text, result, source=source, exported=exported, zeros=zeros, files=[file], gain=GAIN,
        runtime=parity and parity.pop("runtime"),
    )  # fmt: skip
    if parity is None:
        missing = f"llama.cpp was not run: the package xllamacpp is not installed; {llama_cpp.INSTALL}"
        return found | {"llama_cpp": None, "notes": [missing]}
    found["failed"] += _failures(parity, max(APART[name] for name in result["layouts"]))
    return found | {"llama_cpp": parity}


@torch.no_grad()
def fill(model: Any, checkpoint: Checkpoint, file: Path) -> dict[str, float | None]:
    """Put the file's tensors in the place of the model's, and count the zeros of the linear weights.

    Raises:
        UserError: the file lacks a tensor, or has one of another shape.
    """
    parameters = dict(model.named_parameters())
    left = set(parameters)
    zeros = export_check.Zeros()
    config = model.config
    for name, tensor in gguf_file.weights(file, checkpoint.names(), config, family_of(config)):
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            raise UserError(
                f"{file} has {name} as {tuple(tensor.shape)}, which the model does not; export again"
            )
        if ".layers." in name and tensor.dim() == 2:
            zeros.add(parameter, tensor)
        parameter.copy_(tensor)
        left.discard(name)
    if left:
        raise UserError(f"{file} lacks {min(left)}; export again")
    return zeros.shares()


def _parity(model: Any, file: Path, text: export_check.Text, tokenizer: Any) -> dict[str, Any]:
    """llama.cpp's answers beside those of transformers with the same weights."""
    windows = text.windows
    ids = windows.ids[0][: POSITIONS + SPARE + 1]
    positions = list(range(max(1, int(windows.first[0]) + 1), len(ids)))
    context = min(export_check.CONTEXT, model.config.max_position_embeddings)
    prompt, sample = ids[:PROMPT].tolist(), text.text[: context - 8]  # no more tokens than letters
    forced = {"ids": ids.tolist(), "positions": positions, "enough": POSITIONS}
    rest = {"prompt": prompt, "count": GREEDY, "text": sample, "context": context}
    told = llama_cpp.run(file, forced | rest)
    ours, likeliest = _logprobs(model, ids)
    positions = positions[: len(told["logprobs"])]
    pairs = [
        (ours[k - 1].item(), theirs) for k, theirs in zip(positions, told["logprobs"], strict=True) if theirs is not None
    ]  # fmt: skip
    apart = torch.tensor([theirs - own for own, theirs in pairs] or [torch.inf])
    same = [likeliest[k - 1] == t for k, t in zip(positions, told["likeliest"], strict=True) if t is not None]
    continued = export_check.greedy(model, prompt, len(told["greedy"]))
    return {
        "positions": len(pairs),
        "beyond_list": told["beyond"],
        "mean_difference": apart.mean().item(),
        "mean_apart": apart.abs().mean().item(),
        "largest_apart": apart.abs().max().item(),
        "same_likeliest": sum(same) / max(len(same), 1),
        "greedy_tokens": len(continued),
        "greedy_equal": export_check.equal(continued, told["greedy"]),
        "text_tokens": {
            "transformers": len(tokenizer(sample)["input_ids"]),
            "llama_cpp": told["text_tokens"],
        },
        "runtime": {
            "name": f"llama.cpp (xllamacpp {extras.version('xllamacpp')})",
            **{key: told[key] for key in ("load_seconds", "tokens_per_second")},
        },
    }


@torch.inference_mode()
def _logprobs(model: Any, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Of each token after the first: its log-probability; and the likeliest token there."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return found, logits.argmax(-1).tolist()


def _failures(parity: dict[str, Any], allowed: float) -> list[str]:
    """A continuation that differs is no failure: near ties fall either way."""
    failed, tokens = [], parity["text_tokens"]
    if not parity["mean_apart"] <= allowed:
        failed.append(
            f"llama.cpp's log-probabilities are {parity['mean_apart']:.3f} nats apart on average, and {allowed} "
            "is allowed"
        )
    if tokens["transformers"] != tokens["llama_cpp"]:
        failed.append(
            f"llama.cpp cuts the text into {tokens['llama_cpp']} tokens, transformers into {tokens['transformers']}"
        )
    return failed
