"""What an ONNX folder is worth: its perplexity, speed and greedy continuation in onnxruntime-genai."""

from pathlib import Path
from typing import Any

import torch

from llmsparse import export_check, extras, onnx_build, onnx_data, onnx_file, onnx_genai, onnx_layout
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model

PROMPT, GREEDY = 32, 32  # tokens of the continued text, and of its continuation
ACTIVATIONS = 0.01  # of the perplexity: MatMulNBits rounds activations to 8 bits


def check(
    checkpoint: Checkpoint,
    out: Path,
    result: dict[str, Any],
    gain: str,
    *,
    trust_remote_code: bool,
    progress: Any,
) -> dict[str, Any]:
    """Perplexity of the source in transformers, and of the folder in its runtime; zeros read back from the file.

    ``gain``: what the runtime gains from zeros.
    """
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, config.max_position_embeddings)
    prompt = text.windows.ids[0][:PROMPT].tolist()
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
    ours = export_check.greedy(model, prompt, GREEDY)
    zeros = _zeros(model, out, config)
    del model
    progress.start("onnxruntime-genai", 1)
    asked = {**export_check.request(text.windows), "prompt": prompt, "count": GREEDY}
    told = onnx_genai.run(out, asked)
    progress.advance("onnxruntime-genai", "")
    found = export_check.summary(
        text, result, source=source, exported=export_check.told(told["losses"], text.windows), zeros=zeros,
        files=[out / onnx_build.FILE, out / onnx_data.DATA], gain=gain, runtime=_runtime(told),
        activations=ACTIVATIONS if result["accuracy_level"] == 4 else 0.0,
    )  # fmt: skip
    same = export_check.equal(ours, told["greedy"])
    note = f"greedy continuation equal to the source's in transformers for {same} of {GREEDY} tokens"
    return found | {"greedy_equal": same, "greedy_tokens": GREEDY, "notes": [note]}


def _runtime(told: dict[str, Any]) -> dict[str, Any]:
    version = extras.version("onnxruntime-genai")
    return {
        "name": f"onnxruntime-genai {version} (onnxruntime {extras.version('onnxruntime')})",
        **{key: told[key] for key in ("load_seconds", "tokens_per_second")},
    }


def _zeros(model: Any, out: Path, config: Any) -> dict[str, float | None]:
    """Of linear weights, the output layer's aside.

    Raises:
        UserError: the file has another weight than the model, or lacks one.
    """
    zeros, left = export_check.Zeros(), _parameters(model)
    for piece, weight in onnx_file.weights(out, config):
        if piece.path == onnx_layout.HEAD:
            continue
        source = model.get_submodule(piece.path).weight[piece.rows]
        if source.shape != weight.shape:
            raise UserError(f"{out} has {piece.path} as {weight.shape}; export again")
        zeros.add(source, torch.from_numpy(weight.copy()))
        left -= source.numel()
    if left:
        raise UserError(f"{out} lacks {left:,} weights of the model's linear layers; export again")
    return zeros.shares()


def _parameters(model: Any) -> int:
    """Weights of linear layers, the output layer's aside."""
    head = model.get_output_embeddings()
    linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head]
    return sum(each.weight.numel() for each in linear)
