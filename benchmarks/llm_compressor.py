"""SparseGPT of llm-compressor on given token ids, on the CPU, for ``benchmarks.quality``: the method ``llm-compressor``.

    PYTHON benchmarks/llm_compressor.py MODEL IDS OUT PATTERN

PYTHON has llmcompressor, whose dependencies are older than llmsparse's; IDS is an .npy file (windows, length). Forward
passes are in float32; what is written is bfloat16. Its last line is JSON: the seconds, imports left out, the
versions, and the dense model's loss on the first window, which says whether both read the checkpoint alike.
"""

import json
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np


def main(model: str, ids: str, out: str, pattern: str) -> dict[str, Any]:
    """Prune ``model`` to ``50%`` or ``2:4`` into the folder ``out``."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    begun = time.perf_counter()
    windows = np.load(ids)
    if ":" in pattern:
        kept, of = map(int, pattern.split(":"))
        asked = {"sparsity": 1 - kept / of, "mask_structure": pattern}
    else:
        asked = {"sparsity": float(pattern.removesuffix("%")) / 100, "mask_structure": "0:0"}
    text = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    config = AutoConfig.from_pretrained(model)
    # transformers 5 writes it, and 4 does not read it
    if parameters := getattr(config, "rope_parameters", None):
        config.rope_theta = parameters["rope_theta"]
    dense = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    with torch.no_grad():
        loss = float(dense(torch.from_numpy(windows[:1]), labels=torch.from_numpy(windows[:1])).loss)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")  # asked for, and not used
    oneshot(
        model=dense, processor=tokenizer, dataset=Dataset.from_dict(text),
        num_calibration_samples=len(windows),
        recipe=[SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **asked)],
        max_seq_length=windows.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    dense.to(torch.bfloat16).save_pretrained(out, save_compressed=False)
    seconds = round(time.perf_counter() - begun, 1)
    packages = {
        name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
    }
    other = {"python": platform.python_version(), **packages}
    return {"prune_seconds": seconds, "other_versions": other, "dense_loss": loss}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
