"""Integer values end to end: what the codes say is what is evaluated, and the folder is their rounding."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.evaluate import evaluate
from llmsparse.eval.models import load_model
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.sha256 import file_sha256
from llmsparse.skeleton import Skeleton
from llmsparse.solvers.sparsegpt import SparseGPT
from tests.pruned import SMALL, hashes, read_report
from tests.tiny import save_tiny

FAMILIES = ("llama", "gemma3_text", "gpt2", "mixtral", "phi3", "opt")
GRID = "grid.safetensors"


def meanings(folder):
    """Weight name -> code x scale, float64, read as docs/format.md describes codes and scales."""
    with safe_open(folder / GRID, "pt") as opened:
        described = {k: v for k, v in opened.metadata().items() if k != "format"}
        found = {}
        for name, values in described.items():
            codes, scales = opened.get_tensor(name + ".codes"), opened.get_tensor(name + ".scales")
            assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
            group = codes.shape[1] if values == "int8" else int(values.removeprefix("int4:"))
            low, high = (-127, 127) if values == "int8" else (-8, 7)
            assert low <= codes.min() and codes.max() <= high
            spread = torch.stack([scales[:, j // group] for j in range(codes.shape[1])], 1)
            found[name] = codes.double() * spread.double()
    return found


def stored(folder):
    """Weight name -> the (out, in) weight of the checkpoint."""
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(checkpoint)
    return {w.name: w.stored(checkpoint.tensor(w.source)) for w in skeleton.weights} | {
        f"{name}.weight": checkpoint.tensor(skeleton.sources[f"{name}.weight"][0][0])
        for name in skeleton.tables
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pattern", "values"), [("50%", "int8"), ("2:4", "int4:32")])
def test_the_weights_are_the_rounding_of_code_times_scale(family, pattern, values, tmp_path, text):
    source = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16)
    report = prune(source, tmp_path / "out", pattern=pattern, values=values, calibration=text, **SMALL)
    found, weights = meanings(tmp_path / "out"), stored(tmp_path / "out")
    assert {r["name"] for r in report["weights"]} <= set(found)
    for name, meant in found.items():
        assert torch.equal(weights[name], meant.to(torch.bfloat16)), name
    for record in report["weights"]:
        zeros = float((found[record["name"]] == 0).double().mean())
        assert record["values"] == values and zeros >= record["sparsity"] - 1e-9
    assert report["files"][GRID] == file_sha256(tmp_path / "out" / GRID)
    assert "rounding" in read_report(tmp_path / "out")["grid"]["note"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_evaluated_is_code_times_scale(family, tmp_path, text):
    source = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", values="int4:32", embeddings="int4:32", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), False)
    skeleton = Skeleton(checkpoint)
    skeleton.model = model
    views = skeleton.views(skeleton.weights) | {
        f"{path}.weight": model.get_parameter(f"{path}.weight") for path in skeleton.tables
    }
    for name, meant in meanings(tmp_path / "out").items():
        assert torch.equal(views[name].double(), meant), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rounded, first = plain.state_dict(), skeleton.weights[0]
    assert not torch.equal(rounded[first.parameter], model.state_dict()[first.parameter])


def test_a_changed_weight_is_refused(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", calibration=text, **SMALL)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is not what its codes"):
        evaluate(tmp_path / "out", text, context=32, windows=2)
    (tmp_path / "out" / GRID).unlink()
    assert evaluate(tmp_path / "out", text, context=32, windows=2)["sources"]


def test_quantising_a_pruned_checkpoint_keeps_its_zeros(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "sparse", pattern="2:4", calibration=text, **SMALL)
    report = quantize(tmp_path / "sparse", tmp_path / "out", values="int4:32", calibration=text, **SMALL)
    before, after = stored(tmp_path / "sparse"), stored(tmp_path / "out")
    for record in report["weights"]:
        assert not after[record["name"]][before[record["name"]] == 0].any()
        assert record["sparsity"] == 0.5


def test_quantising_a_dense_checkpoint_prunes_nothing(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    report = quantize(source, tmp_path / "out", calibration=text, **SMALL)
    assert {r["sparsity"] for r in report["weights"]} == {0.0}
    assert {r["values"] for r in report["weights"]} == {"int8"}


@pytest.mark.parametrize("embeddings", ["keep", "int8", "int4:32"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_embeddings_option_says_what_becomes_of_the_tables(family, embeddings, tmp_path, text):
    source = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16)
    report = prune(source, tmp_path / "out", values="int8", embeddings=embeddings, calibration=text, **SMALL)
    tables = {
        "llama": {"model.embed_tokens.weight", "lm_head.weight"},
        "gemma3_text": {"model.embed_tokens.weight"},
    }
    rounded = set() if embeddings == "keep" else tables[family]
    assert {t["name"] for t in report["tables"]} == rounded
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in tables[family]:
        assert torch.equal(before[name], after[name]) == (name not in rounded)
    for table in report["tables"]:
        meant = meanings(tmp_path / "out")[table["name"]]
        lost = (meant - before[table["name"]].double()).square().sum() / before[
            table["name"]
        ].double().square().sum()
        assert table["values"] == embeddings and math.isclose(
            table["squared_error"], float(lost), rel_tol=1e-3
        )


def test_an_interrupted_quantised_run_resumes_to_identical_bytes(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    given = {"values": "int4:32", "calibration": text, **SMALL}
    prune(source, tmp_path / "expected", **given)
    from llmsparse.writer import Writer

    real = Writer.finish_block

    def killed(self, block, record):
        real(self, block, record)
        if block.endswith("1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish_block", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", **given)
    monkeypatch.setattr(Writer, "finish_block", real)
    prune(source, tmp_path / "out", resume=True, **given)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_magnitude_rounds_to_the_nearest_without_data(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    report = quantize(source, tmp_path / "out", solver="magnitude", values="int4:32")
    assert report["calibration"] is None
    before, found = stored(source), meanings(tmp_path / "out")
    for name in (r["name"] for r in report["weights"]):
        relative = (found[name] - before[name]).norm() / before[name].norm()
        assert 0 < relative < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int3"}, "int4:32"),
        ({"values": "int8", "embeddings": "int5"}, "unknown"),
        ({"embeddings": "int8"}, "--values"),
        ({"pattern": "as-is"}, "prunes nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(options, message, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(UserError, match=message):
        prune(source, tmp_path / "out", calibration=text, **SMALL, **options)
    assert not (tmp_path / "out").exists()


def test_a_solver_that_returns_no_codes_is_refused(tmp_path, text):
    from llmsparse.solution import Solution

    class Own:
        statistics = None

        def __call__(self, weight, statistics, pattern, grid=None):
            mask = pattern.select(weight.abs())
            return Solution(weight.masked_fill(~mask, 0.0), mask)

    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(UserError, match="no codes"):
        prune(source, tmp_path / "out", solver=Own(), values="int8")
    assert not (tmp_path / "out").exists()


def test_codes_outside_the_folder_do_not_change_what_transformers_loads(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", calibration=text, **SMALL)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (tmp_path / "copy" / GRID).unlink()
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("out", "copy"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("gpt2", {"attn.c_attn"}),
        ("opt", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("phi3", {"self_attn.qkv_proj"}),
        ("gpt_neox", {"attention.query_key_value"}),
        ("mixtral", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    ],
)
def test_weights_that_feed_attention_are_known_by_name(family, expected, tmp_path):
    skeleton = Skeleton(Checkpoint.open(save_tiny(family, tmp_path / "source")))
    first = [w for w in skeleton.weights if w.block == 0 and w.feeds_attention]
    assert {".".join(w.parameter.split(".")[-3:-1]) for w in first} == expected


def test_the_first_token_counts_more_for_attention_with_values_and_as_asked(tmp_path, text, monkeypatch):
    source, seen = save_tiny("llama", tmp_path / "source"), {}
    real = SparseGPT.__call__

    def spy(self, weight, statistics, pattern, grid=None):
        seen.setdefault(statistics.first_token, set()).add(tuple(weight.shape))
        return real(self, weight, statistics, pattern, grid)

    monkeypatch.setattr(SparseGPT, "__call__", spy)
    given = {"calibration": text, **SMALL}
    prune(source, tmp_path / "plain", solver="sparsegpt", **given)
    assert set(seen) == {1.0}
    seen.clear()
    prune(source, tmp_path / "values", values="int4:32", **given)
    assert seen == {SMALL["sequence_length"] / 2: {(32, 32), (16, 32)}, 1.0: {(32, 32), (64, 32), (32, 64)}}
    seen.clear()
    prune(source, tmp_path / "asked", solver="sparsegpt", set=("first_token=3",), **given)
    assert set(seen) == {1.0, 3.0}


@pytest.mark.parametrize("damage", ["name", "shape", "range", "cut", "dtype"])
def test_damaged_codes_are_refused_in_words(damage, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", values="int4:32", calibration=text, **SMALL)
    file = tmp_path / "out" / GRID
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    whole, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
    if damage == "name":
        whole |= {f"model.other{part}": whole[name + part].clone() for part in (".codes", ".scales")}
        metadata["model.other"] = "int4:32"
    elif damage == "shape":
        whole[name + ".scales"] = whole[name + ".scales"][:3].clone()
    elif damage == "dtype":
        whole[name + ".codes"] = whole[name + ".codes"].to(torch.int16)
    elif damage == "range":
        whole[name + ".codes"][0, 0] = 100
    save_file(whole, file, metadata=metadata)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="grid.safetensors"):
        evaluate(tmp_path / "out", text, context=32, windows=2)
