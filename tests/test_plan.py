"""The plan tells what prune does, from headers only, and refuses what prune refuses."""

import pytest
import torch
from safetensors.torch import load_file

from llmsparse import expectation
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.plan import plan
from llmsparse.prune import prune
from tests.tiny import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_reads_no_tensor_and_names_what_prune_prunes(family, tmp_path, monkeypatch):
    source = save_tiny(family, tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
        planned = plan(
            source, pattern=["2:4", "down_proj=1:4"] if family == "llama" else "2:4", solver="magnitude"
        )
    patterns = ["2:4", "down_proj=1:4"] if family == "llama" else "2:4"
    report = prune(source, tmp_path / "out", pattern=patterns, solver="magnitude")
    assert [(w["name"], w["shape"]) for w in planned["weights"]] == [
        (w["name"], w["shape"]) for w in report["weights"]
    ]
    assert [w["pattern"].split(" ")[0] for w in planned["weights"]] == [
        w["pattern"] for w in report["weights"]
    ]
    assert planned["coverage"] == report["coverage"]


def test_plan_counts_bytes_and_parameters(tmp_path):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    planned = plan(source, solver="sparsegpt", samples=4, sequence_length=32)
    tensors = load_file(source / "model.safetensors")
    assert planned["read_bytes"] == planned["write_bytes"] == 2 * sum(t.numel() for t in tensors.values())
    assert planned["coverage"]["all_parameters"] == sum(t.numel() for t in tensors.values())
    assert planned["seconds_estimate"] > 0 and planned["peak_host_bytes"] > 0 == planned["peak_device_bytes"]


def test_the_plan_says_which_steps_its_time_leaves_out(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    given = {"samples": 4, "sequence_length": 32, "calibration": "builtin"}
    assert plan(source, **given)["warnings"] == []
    told = plan(source, allocate="owl", **given)["warnings"]
    assert told[1:] == ["the expected time leaves out dividing the budget"]
    assert plan(source, solver="magnitude", **given | {"calibration": "self"})["warnings"] == []
    told = plan(source, **given | {"calibration": "self"})["warnings"]
    assert told == ["the expected time leaves out writing the model's own text"]
    told = plan(source, pattern=["depth:1", "2:4"], permute=True, **given)["warnings"]
    assert told == ["the expected time leaves out making the model smaller, ordering channels"]


def test_plan_says_what_one_to_four_keeps(tmp_path):
    planned = plan(save_tiny("llama", tmp_path / "source"), pattern="1:4")
    assert {w["pattern"] for w in planned["weights"]} == {"1:4 (keeps 25 %)"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "3:7"}, "divisible by 7; model.layers.0"),
        ({"solver": "magic"}, "known: .*wanda"),
        ({"skip": ["."]}, "nothing is left to prune"),
        ({"sequence_length": 4096}, "max_position_embeddings"),
    ],
)
def test_plan_refuses_what_prune_refuses(options, message, tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    for call in (lambda: plan(source, **options), lambda: prune(source, tmp_path / "out", **options)):
        with pytest.raises(UserError, match=message):
            call()


def test_the_estimate_counts_the_products_of_each_solver_of_a_chain(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(expectation, "_flops", lambda device, dtype: 1.0)
    chosen = [{"solver": "sparsegpt"}, {"solver": "refit:swaps:sparsegpt"}, {}]
    told = [plan(source, samples=4, sequence_length=32, **one) for one in chosen]
    size = sum(w["shape"][0] * w["shape"][1] ** 2 for w in told[0]["weights"])
    plain, chain, default = (one["seconds_estimate"] for one in told)
    assert chain - plain == pytest.approx(2 * (11 + 13) * size)
    assert default - plain == pytest.approx(2 * (40 - 1.5) * size)  # alps


def test_the_estimate_runs_forward_in_the_dtype_asked_for_and_all_else_in_float32(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(expectation, "_flops", lambda device, dtype: 1.0 if dtype == torch.float32 else 2.0)
    single, half = (plan(source, samples=4, sequence_length=32, dtype=d) for d in ("float32", "bfloat16"))
    inside = sum(w["shape"][0] * w["shape"][1] for w in single["weights"])
    assert single["seconds_estimate"] - half["seconds_estimate"] == pytest.approx(4 * 32 * inside)
