"""The compressed-tensors export: the same codes as beside the model, and what transformers makes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsparse import plugins
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from tests.packed_tiny import IDS, add_grid, sparse
from tests.pruned import tensors


def exported(tmp_path: Path, grid: str = "int8", family: str = "llama", **options: str) -> tuple[Path, Path]:
    source = sparse(tmp_path / "source", family)
    add_grid(source, grid)
    export(source, tmp_path / "out", format="compressed-tensors", **options)
    return source, tmp_path / "out"


def unpacked(words: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Code by code, with integers of Python."""
    found = torch.zeros(shape, dtype=torch.int8)
    for row in range(shape[0]):
        for column in range(shape[1]):
            word = int(words[row, column * bits // 32]) & 0xFFFFFFFF
            found[row, column] = (word >> (column * bits % 32) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return found


@pytest.mark.parametrize(("grid", "bits"), [("int8", 8), ("int4:32", 4), ("int4:8", 4)])
def test_the_codes_are_those_beside_the_model(grid: str, bits: int, tmp_path: Path) -> None:
    source, out = exported(tmp_path, grid)
    codes, found = GridFile.open(source), tensors(out)
    assert codes is not None and codes.names
    for name in codes.names:
        stem = name.removesuffix(".weight")
        shape = found[f"{stem}.weight_shape"].tolist()
        assert torch.equal(unpacked(found[f"{stem}.weight_packed"], bits, shape), codes.codes(name))
        assert torch.equal(found[f"{stem}.weight_scale"], codes.scales(name).bfloat16())
        assert name not in found


def test_what_has_no_codes_stays_bit_for_bit(tmp_path: Path) -> None:
    source, out = exported(tmp_path, family="qwen2")
    before, after = tensors(source), tensors(out)
    same = [name for name in before if name in after]
    assert "model.embed_tokens.weight" in same and "model.layers.0.self_attn.q_proj.bias" in same
    assert all(torch.equal(before[name], after[name]) for name in same)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (8, "channel", None)


@pytest.mark.parametrize("grid", ["int8", "int4:32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_transformers_computes_the_same(family: str, grid: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    source, out = exported(tmp_path, grid, family)
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(IDS).logits
        for folder in (source, out)
    )
    assert torch.equal(found, wanted)


def test_weights_without_codes_are_rounded_as_asked_and_it_is_said(tmp_path: Path) -> None:
    source = sparse(tmp_path / "source")
    result = export(source, tmp_path / "out", format="compressed-tensors", values="int4:32")
    assert any("nearest to each weight alone" in warning for warning in result["warnings"])
    assert result["bits_per_weight"] < 4.7  # 4, a scale for 32, and the shapes of tiny weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no codes; compressed-tensors stores int8 or int4:G"),
        ({"values": "bf16"}, "--values bf16 was asked for, but compressed-tensors stores"),
        ({"values": "int8", "embeddings": "int8"}, "leave --embeddings out"),
    ],
)
def test_what_the_format_does_not_store_is_refused(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = sparse(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "out", format="compressed-tensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("family", "left"), [("gpt2", "transposed"), ("mixtral", "expert")])
def test_a_model_with_other_weights_than_linear_layers_is_refused(
    family: str, left: str, tmp_path: Path
) -> None:
    source = sparse(tmp_path / "source", family)
    with pytest.raises(UserError, match=left):
        export(source, tmp_path / "out", format="compressed-tensors", values="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_are_sharded_as_the_source_is(tmp_path: Path) -> None:
    source = sparse(tmp_path / "source", max_shard_size="20KB")
    export(source, tmp_path / "out", format="compressed-tensors", values="int8")
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


def test_its_name_is_spoken_with_a_hyphen() -> None:
    assert {"compressed-tensors", "packed"} <= set(plugins.names("exporters"))
    with pytest.raises(UserError, match="compressed-tensors"):
        plugins.load("exporters", "compressed_tensor")


def test_the_check_measures_the_files_beside_the_source(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    source = sparse(tmp_path / "source")
    add_grid(source, "int4:32")
    result = export(source, tmp_path / "out", format="compressed-tensors", check=True)
    found = result["check"]
    assert found["failed"] == [] and abs(found["perplexity"]["change"]) < 1e-3
    assert found["zeros"]["kept"] == 1.0 and found["zeros"]["source"] >= 0.5
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["tokens"] == found["tokens"]


def test_a_check_without_the_package_says_what_to_install_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.extras.version", lambda package: None)
    source = sparse(tmp_path / "source")
    with pytest.raises(UserError, match="pip install 'llmsparse.compressed-tensors.'"):
        export(source, tmp_path / "out", format="compressed-tensors", values="int8", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
