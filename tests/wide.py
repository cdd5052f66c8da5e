"""Tiny checkpoints whose MLPs are wide enough to be made narrower."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.calibration import calibrate
from tests import tiny

WIDE = 192
WIDTH_KEYS = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}


def save(family, folder, monkeypatch, change=None, **options):
    """A tiny checkpoint with an MLP of ``WIDE`` channels; ``change`` edits the tensors by name."""
    config = tiny.FAMILIES[family]()
    setattr(config, WIDTH_KEYS.get(family, "intermediate_size"), WIDE)
    for key, value in options.items():
        setattr(config, key, value)
    monkeypatch.setitem(tiny.FAMILIES, family, lambda: config)
    tiny.save_tiny(family, folder)
    if change is not None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            change(dict(model.named_parameters()))
        model.save_pretrained(folder)
    return folder


def windows(source, text):
    tokenizer = AutoTokenizer.from_pretrained(source)
    return calibrate(text, tokenizer, samples=6, sequence_length=32).windows


@torch.no_grad()
def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model(input_ids=ids).logits
