"""What an OpenVINO model is worth: perplexity and speed in OpenVINO itself, zeros from the file's constants."""

from pathlib import Path
from typing import Any

import torch

from llmsparse import export_check, extras, openvino_runtime, openvino_weights
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.figures import plain
from llmsparse.skeleton import Skeleton

PROMPT, GREEDY = 32, 32  # tokens of the continued text, and of its continuation
GAIN = "OpenVINO gains no speed and no memory from zeros: it stores and multiplies every weight"


def check(
    checkpoint: Checkpoint, file: Path, files: list[Path], result: dict[str, Any], *, trust_remote_code: bool,
    progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """The perplexity that is judged is OpenVINO's in float32 throughout; with its own settings it is told beside.

    ``files``: those that hold the model. A greedy continuation that differs from transformers' is told, and no failure.
    """
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, config.max_position_embeddings)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
    zeros = _zeros(model, Skeleton(checkpoint, trust_remote_code=trust_remote_code), file)
    prompt = text.windows.ids[0][:PROMPT].tolist()
    expected = export_check.greedy(model, prompt, GREEDY)
    del model
    progress.start("OpenVINO", 1)
    asked = {**export_check.request(text.windows), "prompt": prompt, "count": GREEDY}
    told = openvino_runtime.run(file, asked)
    progress.advance("OpenVINO", "")
    own, _ = export_check.told(told["own_losses"], text.windows)
    equal = export_check.equal(expected, told["greedy"])
    found = export_check.summary(
        text, result, source=source, exported=export_check.told(told["losses"], text.windows), zeros=zeros,
        files=files, gain=GAIN, runtime=_runtime(told),
    )  # fmt: skip
    found["openvino"] = {
        "own_settings": told["settings"], "own_perplexity": own,
        "greedy_tokens": GREEDY, "greedy_equal": equal,
    }  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in told["settings"].items())
    found["notes"] += [
        "perplexity is OpenVINO's with everything in float32, from which nothing else is rounded; with its own settings "
        f"({settings}), which the speed has too, it is {plain(own)} ({own / source - 1:+.2%})",
        f"greedy continuation equal to transformers' for {equal} of {GREEDY} tokens",
    ]
    return found


def _zeros(model: Any, skeleton: Skeleton, file: Path) -> dict[str, float | None]:
    """Of the blocks' linear weights, the file's beside the model's. UserError: the file lacks one."""
    wanted = {weight.source: weight.parameter for weight in skeleton.weights if weight.block is not None}
    zeros = export_check.Zeros()
    for name, weight in openvino_weights.read(file):
        if (parameter := wanted.pop(name, None)) is not None:
            zeros.add(model.get_parameter(parameter), weight)
    if wanted:
        raise UserError(f"{file} lacks {min(wanted)}; export again")
    return zeros.shares()


def _runtime(told: dict[str, Any]) -> dict[str, Any]:
    name = f"OpenVINO {extras.version('openvino')}"
    return {"name": name, **{key: told[key] for key in ("load_seconds", "tokens_per_second")}}
