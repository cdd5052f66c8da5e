"""Pruning whole checkpoints: what is written, and what the report says."""

import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.prune import prune
from llmsparse.sha256 import file_sha256
from tests.pruned import SMALL, hashes, tensors
from tests.tiny import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_an_ordinary_checkpoint_with_exact_masks(family, dtype, tmp_path, text, caplog):
    source = save_tiny(family, tmp_path / "source", dtype=dtype)
    before, out = hashes(source), tmp_path / "out"
    report = prune(source, out, pattern="2:4", calibration=text, **SMALL)
    assert hashes(source) == before
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        logging.getLogger("transformers").propagate = True
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        AutoTokenizer.from_pretrained(out)
    assert not caplog.records
    assert model.dtype == dtype
    original, pruned = tensors(source), tensors(out)
    assert pruned.keys() == original.keys()
    reported = {w["name"]: w for w in report["weights"]}
    assert len(reported) >= 6
    for name, tensor in pruned.items():
        assert tensor.dtype == original[name].dtype and tensor.shape == original[name].shape
        if name not in reported:
            assert torch.equal(tensor, original[name])
            continue
        oriented = tensor.T if family == "gpt2" else tensor
        kept = (oriented != 0).reshape(oriented.shape[0], -1, 4).sum(-1)
        assert bool((kept == 2).all()), name
        assert not bool(torch.signbit(tensor[tensor == 0]).any())
        assert 0 < reported[name]["error"] < 1 and reported[name]["sparsity"] == 0.5
    assert not list(tmp_path.glob(".*work*"))


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_sharding_names_and_files_are_the_sources(solver, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", max_shard_size="40KB")
    (source / "LICENSE").write_text("licence")
    assert len(list(source.glob("*.safetensors"))) > 1
    prune(source, tmp_path / "out", solver=solver, calibration=text, **SMALL)
    names = {f.name for f in source.iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names | {"report.json"}
    for file in source.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_bin_checkpoints_are_read(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    prune(source, tmp_path / "from_safetensors", calibration=text, **SMALL)
    (source / "model.safetensors").unlink()
    prune(source, tmp_path / "from_bin", calibration=text, **SMALL)
    a, b = tensors(tmp_path / "from_safetensors"), tensors(tmp_path / "from_bin")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_two_runs_write_equal_files(family, tmp_path, text):
    source = save_tiny(family, tmp_path / "source")
    for out in ("a", "b"):
        prune(source, tmp_path / out, calibration=text, **SMALL)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_mixed_patterns_skip_and_include(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    report = prune(
        source, tmp_path / "out", pattern=["50%", r"down_proj=1:4"], skip=[r"layers\.0\."], include=["lm_head"],
        calibration=text, **SMALL,
    )  # fmt: skip
    patterns = {w["name"]: (w["pattern"], w["sparsity"]) for w in report["weights"]}
    assert patterns["model.layers.1.mlp.down_proj.weight"] == ("1:4", 0.75)
    assert patterns["model.layers.1.mlp.up_proj.weight"] == ("50%", 0.5)
    assert patterns["lm_head.weight"] == ("50%", 0.5)
    assert not any("layers.0." in name for name in patterns)
    out = tensors(tmp_path / "out")
    assert float((out["lm_head.weight"] == 0).float().mean()) == 0.5


def test_tied_head_stays_tied_and_is_pruned_only_when_asked(tmp_path, text):
    source = save_tiny("gemma3_text", tmp_path / "source")
    report = prune(source, tmp_path / "plain", calibration=text, **SMALL)
    assert not any("embed" in w["name"] or "head" in w["name"] for w in report["weights"])
    report = prune(source, tmp_path / "asked", calibration=text, include=["lm_head"], **SMALL)
    assert report["weights"][-1]["name"] == "model.embed_tokens.weight"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "asked")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5


def test_coverage_and_report_state_what_was_done(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", calibration=text, **SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sizes = {k: v.numel() for k, v in tensors(source).items()}
    linear = sum(n for k, n in sizes.items() if "_proj" in k)
    assert report["coverage"]["pruned_parameters"] == linear
    assert report["coverage"]["linear_parameters"] == linear + sizes["lm_head.weight"]
    assert report["coverage"]["all_parameters"] == sum(sizes.values())
    assert report["files"] == hashes(tmp_path / "out")
    assert report["source_files"]["model.safetensors"] == file_sha256(source / "model.safetensors")
    assert report["calibration"]["tokens_sha256"] and report["versions"]["torch"] == torch.__version__
    assert {"read", "solve", "forward", "write"} <= report["seconds"].keys() and report["peak_memory"][
        "solve"
    ] > 0


def test_relative_output_error_is_the_layers_own(tmp_path, text):
    """The first block's q error, against the inputs that transformers itself feeds the layer."""
    source = save_tiny("llama", tmp_path / "source")
    report = prune(source, tmp_path / "out", calibration=text, **SMALL)
    from llmsparse.calibration import calibrate

    windows = calibrate(text, AutoTokenizer.from_pretrained(source), samples=6, sequence_length=32).windows
    model, inputs = AutoModelForCausalLM.from_pretrained(source), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(windows)
    x = inputs[0].double().reshape(-1, 32)
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, pruned = tensors(source)[name].double(), tensors(tmp_path / "out")[name].double()
    expected = float(((dense - pruned) @ x.T).square().sum() / (dense @ x.T).square().sum())
    found = next(w["error"] for w in report["weights"] if w["name"] == name)
    assert found == pytest.approx(expected, rel=1e-3)


def test_recipe_file_holds_the_options_and_flags_win(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"solver: wanda\npattern: 2:4\ncalibration: {text}\nsamples: 2\nsequence-length: 32\n")
    report = prune(source, tmp_path / "out", recipe=recipe, samples=3)
    assert report["options"]["solver"] == "wanda" and report["options"]["samples"] == 3
    recipe.write_text("solvr: wanda\n")
    with pytest.raises(
        UserError, match="key 'solvr' is unknown; did you mean solver; known: solver, pattern"
    ):
        prune(source, tmp_path / "other", recipe=recipe)


def test_an_expert_without_tokens_is_reported_not_garbage(tmp_path, text):
    source = save_tiny("mixtral", tmp_path / "source")
    report = prune(source, tmp_path / "out", calibration=text, samples=1, sequence_length=4)
    assert any("use more calibration text" in warning for warning in report["warnings"])
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "out").values())


def test_weights_read_lazily_by_name(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    for name, tensor in tensors(source).items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
