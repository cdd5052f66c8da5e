"""export --format dense: a packed folder becomes the folder that it was made of, codes and all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import NAME, GridFile
from tests.packed_tiny import IDS, add_grid, sparse
from tests.pruned import tensors
from tests.tiny import FAMILIES


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors(folder).items() if not k.endswith((".codes", ".scales"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_is_unpacked_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = weights(sparse(tmp_path / "sparse", family))
    export(tmp_path / "sparse", tmp_path / "packed")
    result = export(tmp_path / "packed", tmp_path / "dense", format="dense")
    found = weights(tmp_path / "dense")
    assert found.keys() == source.keys() and all(torch.equal(found[name], source[name]) for name in source)
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("sparse", "dense"))
    assert before == after
    assert result["linear"]["before"] < result["linear"]["after"] or family == "falcon"


@pytest.mark.parametrize("grid", ["int8", "int4:32"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_codes_come_out_of_a_packed_folder_as_they_went_in(tmp_path: Path, family: str, grid: str) -> None:
    add_grid(sparse(tmp_path / "sparse", family), grid)
    export(tmp_path / "sparse", tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "dense", format="dense")
    before, after = GridFile.open(tmp_path / "sparse"), GridFile.open(tmp_path / "dense")
    assert before is not None and after is not None and before.names == after.names
    for name in before.names:
        assert before.grid(name) == after.grid(name)
        assert torch.equal(before.codes(name), after.codes(name)), name
        assert torch.equal(before.scales(name), after.scales(name)), name
    wanted, found = weights(tmp_path / "sparse"), weights(tmp_path / "dense")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_dtype_is_taken_from_the_codes_and_its_range_is_kept(tmp_path: Path) -> None:
    add_grid(sparse(tmp_path / "sparse"))
    result = export(tmp_path / "sparse", tmp_path / "dense", format="dense", values="fp32")
    codes, found = GridFile.open(tmp_path / "dense"), weights(tmp_path / "dense")
    assert codes is not None and result["bits_per_weight"] == 32.0
    assert all(torch.equal(found[name], codes.values(name)) for name in codes.names)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits.dtype == torch.float32
    large = tensors(sparse(tmp_path / "large"))
    large["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(large, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="up_proj.weight is beyond fp16's range, or not finite; use --values bf16"
    ):
        export(tmp_path / "large", tmp_path / "half", format="dense", values="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "large", "sparse"]


def test_the_check_measures_it_beside_the_packed_folder(tmp_path: Path) -> None:
    add_grid(sparse(tmp_path / "sparse"))
    export(tmp_path / "sparse", tmp_path / "packed")
    found = export(tmp_path / "packed", tmp_path / "dense", format="dense", check=True)["check"]
    assert found["failed"] == [] and found["zeros"]["kept"] == 1.0 and found["zeros"]["source"] >= 0.5
    files = [file for file in (tmp_path / "dense").glob("*.safetensors") if file.name != NAME]
    assert found["file_bytes"] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("options", [{"values": "int8"}, {"embeddings": "int4:32"}])
def test_codes_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    sparse(tmp_path / "sparse")
    with pytest.raises(UserError, match="--format dense stores floats"):
        export(tmp_path / "sparse", tmp_path / "out", format="dense", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_weights_that_their_codes_do_not_give_are_refused(tmp_path: Path) -> None:
    add_grid(sparse(tmp_path / "sparse"))
    found = weights(tmp_path / "sparse")
    found["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="up_proj.weight is not what its codes in .* give"):
        export(tmp_path / "sparse", tmp_path / "out", format="dense")
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
