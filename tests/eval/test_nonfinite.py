"""The first layer whose outputs are no numbers is named, with the reason where the weights tell it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.errors import UserError
from llmsparse.eval.nonfinite import first_nonfinite, refuse_nan
from tests.tiny import save_tiny

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()


def test_bad_weights_are_named(model):
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[1, 2] = torch.inf
    assert first_nonfinite(model, IDS).startswith(
        "the weights model.layers.2.self_attn.k_proj.weight are not"
    )


def test_an_overflow_is_named_where_it_begins(model):
    model.half()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(model.model.layers[1].mlp, name).weight.fill_(2000.0)
    found = first_nonfinite(model, IDS)
    assert "model.layers.1.mlp" in found and "--dtype float32" in found


def test_a_sound_model_passes(model):
    refuse_nan(model(IDS).logits, model, IDS, "tiny")


def test_nan_after_the_last_layer_is_said_so(model):
    with pytest.raises(UserError, match="of tiny are NaN: no layer's output shows it"):
        refuse_nan(torch.tensor([torch.nan]), model, IDS, "tiny")
