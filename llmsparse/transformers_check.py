"""What transformers makes of an exported folder, beside the source: perplexity, zeros, load time, speed."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsparse import export_check
from llmsparse.checkpoint import Checkpoint
from llmsparse.eval.models import load_model
from llmsparse.sparse_linear import SparseLinear

PROMPT = 32  # tokens before the timed ones
CPU = torch.device("cpu")


def check(
    checkpoint: Checkpoint,
    out: Path,
    result: dict[str, Any],
    gain: str,
    *,
    trust_remote_code: bool,
    progress: Any,
) -> dict[str, Any]:
    """Perplexity and zeros in float32; load time and speed in the dtype of what is stored, as ``generate`` runs it.

    ``gain``: what this format's runtimes gain from zeros.
    """
    config, tokenizer = checkpoint.config(trust_remote_code), checkpoint.tokenizer(trust_remote_code)
    text = export_check.fixed_text(tokenizer, config.get_text_config().max_position_embeddings)
    model = load_model(checkpoint, torch.float32, CPU, trust_remote_code)
    source, _ = export_check.score(model, text.windows, "perplexity of the source", progress)
    before = {name: weight == 0 for name, weight in _weights(model)}
    del model
    written = Checkpoint.open(out)
    exported = load_model(written, torch.float32, CPU, trust_remote_code)
    found = export_check.score(exported, text.windows, "perplexity of the files", progress)
    zeros = export_check.Zeros()
    for name, weight in _weights(exported):  # after a pass: some are unpacked by the first
        zeros.add(~before.pop(name), weight)
    del exported
    return export_check.summary(
        text, result, source=source, exported=found, zeros=zeros.shares(),
        files=written.files, gain=gain,
        runtime=_runtime(written, text.windows.ids[0][:PROMPT], trust_remote_code),
    )  # fmt: skip


def _runtime(written: Checkpoint, prompt: Tensor, trust_remote_code: bool) -> dict[str, Any]:
    dtype = written.stored_dtype
    begun = time.perf_counter()
    model = load_model(written, dtype, CPU, trust_remote_code)
    seconds = time.perf_counter() - begun
    ours = " with llmsparse's products" if written.is_packed else ""
    return {
        "name": f"transformers {transformers.__version__}{ours}, {str(dtype).removeprefix('torch.')}",
        "load_seconds": seconds,
        "tokens_per_second": export_check.speeds(model, prompt),
    }


def _weights(model: Any) -> list[tuple[str, Tensor]]:
    """The weights of linear layers, the output layer's aside."""
    head = model.get_output_embeddings()
    found: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, SparseLinear):
            found.append((name, module.unpack(torch.float32).get_parameter("weight")))
        elif isinstance(module, nn.Linear | Conv1D):
            found.append((name, module.get_parameter("weight")))
    return found
