"""export: what it writes is what docs/format.md says, as small as arithmetic says, whole or not at all."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import NAME, GridFile
from llmsparse.inspect import inspect
from tests.formats.layout import read
from tests.packed_tiny import add_grid, packed, sparse
from tests.pruned import tensors
from tests.tiny import FAMILIES


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def stems(folder: Path) -> dict[str, str]:
    """Module path -> what its tensors' names begin with: the path, or its end."""
    names = set(tensors(folder))
    found = {}
    for path in config(folder)["weights"]:
        ends = [path[i:] for i in range(len(path)) if i == 0 or path[i - 1] == "."]
        found[path] = next(
            e for e in ends if any(n.rpartition(".")[0] == e and n[-4:] != "bias" for n in names)
        )
    return found


def unpacked(folder: Path) -> dict[str, np.ndarray]:
    """Disk name -> weight, by the reader that was written from docs/format.md alone."""
    files, found = tensors(folder), {}
    for path, stem in stems(folder).items():
        parts = {n.rpartition(".")[2]: t for n, t in files.items() if n.rpartition(".")[0] == stem}
        parts.pop("bias", None)
        found[f"{stem}.weight"] = read(config(folder)["weights"][path], parts)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_reader_finds_every_weight_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = tensors(sparse(tmp_path / "sparse", family))
    result = export(tmp_path / "sparse", tmp_path / "packed")
    files, weights = tensors(tmp_path / "packed"), unpacked(tmp_path / "packed")
    assert bool(weights) == (family != "falcon"), "falcon has a linear class of its own, and stays dense"
    for name, weight in weights.items():
        stored = source.pop(name)
        found = torch.from_numpy(weight).to(stored.dtype)
        assert torch.equal(found.T if family == "gpt2" else found, stored)
    for name, tensor in source.items():
        assert torch.equal(files[name], tensor), f"{name} is as it was"
    assert result["layouts"].get("bitmask", 0) == len(weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_kept_bit_for_bit_too(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tensors(sparse(tmp_path / "sparse", dtype=dtype))
    export(tmp_path / "sparse", tmp_path / "packed")
    for name, weight in unpacked(tmp_path / "packed").items():
        assert torch.equal(torch.from_numpy(weight).to(dtype), source[name])


@pytest.mark.parametrize("values, part", [(None, 0.5625), ("int8", 0.3125), ("int4:32", 3.5 / 16)])
def test_linear_weights_take_the_bytes_that_arithmetic_says(
    tmp_path: Path, values: str | None, part: float
) -> None:
    result = export(sparse(tmp_path / "sparse"), tmp_path / "packed", values=values)
    weights = [w for w in config(tmp_path / "packed")["weights"].values() if w["layout"] == "bitmask"]
    files = tensors(tmp_path / "packed")
    scales = 2 * sum(w["shape"][0] for w in weights) if values == "int8" else 0
    empty = sum(w["size"] - w["nnz"] / 2 for w in weights) if values == "int4:32" else 0
    dense = sum(2 * prod(w["shape"]) for w in weights)
    rounded = 0 if values is None else 0.02  # kept weights that round to code 0 need no place
    assert result["linear"]["after"] - scales - empty == pytest.approx(part * dense, rel=0.01 + rounded)
    assert result["linear"]["before"] == dense
    assert sum(t.nbytes for t in files.values()) < result["bytes"]["after"]
    file = tmp_path / "packed" / "model.safetensors"
    assert result["bytes"]["after"] == file.stat().st_size


def test_codes_beside_the_model_are_written_exactly(tmp_path: Path) -> None:
    add_grid(sparse(tmp_path / "sparse"))
    result = export(tmp_path / "sparse", tmp_path / "packed")
    codes = GridFile.open(tmp_path / "sparse")
    assert codes is not None and not result["warnings"]
    weights = unpacked(tmp_path / "packed")
    assert sorted(weights) == codes.names
    for name, weight in weights.items():
        assert torch.equal(torch.from_numpy(weight), codes.values(name))
    assert not (tmp_path / "packed" / NAME).exists()


def test_a_weight_that_is_not_its_codes_and_another_grid_are_refused(tmp_path: Path) -> None:
    add_grid(sparse(tmp_path / "sparse"))
    with pytest.raises(
        UserError, match="--values int4:32 was asked for, but grid.safetensors beside the model"
    ):
        export(tmp_path / "sparse", tmp_path / "packed", values="int4:32")
    found = tensors(tmp_path / "sparse")
    name = "model.layers.1.mlp.up_proj.weight"
    found[name][0, 0] += 1
    save_file(
        {k: v for k, v in found.items() if not k.endswith((".codes", ".scales"))},
        tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(UserError, match=f"{name} is not what its codes in .* give"):
        export(tmp_path / "sparse", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["sparse"], "nothing half-written is left"


def test_one_of_four_takes_the_layout_with_places(tmp_path: Path) -> None:
    source = tensors(sparse(tmp_path / "sparse"))
    for name, tensor in source.items():
        if "proj" in name:
            tensor.fill_(1).view(-1, 4)[:, [0, 1, 3]] = 0
    save_file(source, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    assert export(tmp_path / "sparse", tmp_path / "packed")["layouts"]["nm"] == 21
    for name, weight in unpacked(tmp_path / "packed").items():
        assert torch.equal(torch.from_numpy(weight).bfloat16(), source[name])


def test_negative_zeros_are_kept_and_the_user_is_told_what_they_cost(tmp_path: Path) -> None:
    source = tensors(sparse(tmp_path / "sparse"))
    source["model.layers.0.mlp.up_proj.weight"] *= -1  # its zeros are now -0.0
    save_file(source, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    result = export(tmp_path / "sparse", tmp_path / "packed")
    assert "1,024 weights are -0.0" in result["warnings"][0]
    assert "model.layers.0.mlp.up_proj" not in config(tmp_path / "packed")["weights"]


def test_experts_stay_dense_and_the_warning_says_how_many_bytes(tmp_path: Path) -> None:
    result = export(sparse(tmp_path / "sparse", "mixtral"), tmp_path / "packed")
    assert "24 tensors (96 KiB) stay dense: experts of a mixture" in result["warnings"][0]


def test_integer_values_without_calibration_say_that_calibration_does_better(tmp_path: Path) -> None:
    result = export(sparse(tmp_path / "sparse"), tmp_path / "packed", values="int8")
    assert "prune --values int8" in result["warnings"][0]
    assert config(tmp_path / "packed")["weights"]["model.embed_tokens"]["values"] == "int8"
    kept = export(tmp_path / "sparse", tmp_path / "kept", values="int8", embeddings="keep")
    assert "model.embed_tokens" not in config(tmp_path / "kept")["weights"]
    assert kept["embeddings"]["before"] == kept["embeddings"]["after"]


def test_shards_stay_shards_and_other_files_are_copied(tmp_path: Path) -> None:
    sparse(tmp_path / "sparse", max_shard_size="40KB")
    (tmp_path / "sparse" / "report.json").write_text('{"weights": [], "out": "x", "files": {"a": 1}}')
    export(tmp_path / "sparse", tmp_path / "packed")
    files = sorted(f.name for f in (tmp_path / "sparse").glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(f.name for f in (tmp_path / "packed").glob("*.safetensors"))
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == (
        tmp_path / "sparse" / "tokenizer.json"
    ).read_bytes()
    report = json.loads((tmp_path / "packed" / "report.json").read_text())
    assert (report["out"], report["files"]) == ("x", {"a": 1})
    assert set(report["export"]["files"]) == set(files)


def test_tensors_begin_at_multiples_of_their_size(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = packed(tmp_path, values="int4:32")
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        sizes = [opened.get_tensor(name).element_size() for name in opened.offset_keys()]
    assert sizes == sorted(sizes, reverse=True)


def test_what_cannot_be_exported_is_refused_in_words(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    source = tmp_path / "sparse"
    with pytest.raises(UserError, match="is packed already; export the folder that prune wrote"):
        export(folder, tmp_path / "twice")
    with pytest.raises(UserError, match="exporter 'gguff' is unknown; known: .*packed"):
        export(source, tmp_path / "o", format="gguff")
    with pytest.raises(UserError, match="values 'int3' are unknown; known: bf16"):
        export(source, tmp_path / "o", values="int3")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(source, folder)
    with pytest.raises(UserError, match="--values fp32 was asked for, but .* is stored as bfloat16"):
        export(source, tmp_path / "o", values="fp32")
    with pytest.raises(UserError, match="has no config.json"):
        export(tmp_path, tmp_path / "o")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["packed", "sparse"]


def test_a_failure_leaves_the_old_output_and_overwrite_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("llmsparse.writer.Writer.prepare_to_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(tmp_path / "sparse", folder, values="int8", overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    export(tmp_path / "sparse", folder, values="int8", overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["packed", "sparse"]


def test_what_a_killed_export_left_is_cleared_but_an_interrupted_prune_is_not(tmp_path: Path) -> None:
    sparse(tmp_path / "sparse")
    work, spool = tmp_path / ".packed.llmsparse-work", tmp_path / ".packed.llmsparse-spool"
    for folder in (work, spool):
        folder.mkdir()
        (folder / "0.safetensors").write_bytes(b"half")
    (work / "journal.jsonl").write_text('{"fingerprint": {"export": "packed"}}\n')
    export(tmp_path / "sparse", tmp_path / "packed")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["packed", "sparse"]
    other = tmp_path / ".other.llmsparse-work"
    other.mkdir()
    (other / "journal.jsonl").write_text('{"fingerprint": {"solver": "wanda"}}\n')
    with pytest.raises(UserError, match="an interrupted run for .*other is here"):
        export(tmp_path / "sparse", tmp_path / "other")
    assert (other / "journal.jsonl").exists()


def test_inspect_shows_the_zeros_of_packed_weights(tmp_path: Path) -> None:
    folder = packed(tmp_path, "gpt2")
    before, after = inspect(tmp_path / "sparse"), inspect(folder)
    assert after["totals"]["weight_zeros"] == before["totals"]["weight_zeros"]
    assert after["totals"]["parameters"] == before["totals"]["parameters"]
    row = next(w for w in after["weights"] if w["name"] == "transformer.h.0.mlp.c_fc.weight")
    assert (row["shape"], row["dtype"], row["sparsity"]) == ([128, 32], "bf16 (bitmask)", 0.5)


def test_the_check_takes_an_output_layer_that_is_packed(tmp_path: Path) -> None:
    found = export(sparse(tmp_path / "sparse"), tmp_path / "out", values="int8", check=True)["check"]
    assert (
        "lm_head"
        in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["weights"]
    )
    assert found["failed"] == [] and found["zeros"]["kept"] == 1.0
