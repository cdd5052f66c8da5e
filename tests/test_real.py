"""SmolLM2-135M for real: pruned by the command line, reloaded by plain transformers, evaluated."""

import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "llmsparse", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_smollm2_is_pruned_reloaded_and_evaluated(smollm2, tmp_path):
    out = tmp_path / "smollm2-2of4"
    report = run(
        "prune", smollm2, out, "--solver", "sparsegpt", "--pattern", "2:4", "--samples", 3,
        "--sequence-length", 256, "--json",
    )  # fmt: skip
    assert report["coverage"]["pruned_parameters"] == 106_168_320
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            assert bool(((parameter != 0).view(-1, 4).sum(1) <= 2).all())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    dense = run("eval", smollm2, "--data", "builtin", "--context", 256, "--windows", 2, "--json")
    sparse = run(
        "eval", out, "--data", "builtin", "--context", 256, "--windows", 2, "--against", smollm2, "--json"
    )  # fmt: skip
    dense, sparse = (figures["sources"][0] for figures in (dense, sparse))
    assert dense["perplexity"] < sparse["perplexity"] < 100 * dense["perplexity"]
    assert sparse["kl"] > 0 and 0 < sparse["top1_agreement"] < sparse["top5_agreement"] < 1
    assert dense["sha256"] == sparse["sha256"] and dense["tokens"] == 2 * 255
