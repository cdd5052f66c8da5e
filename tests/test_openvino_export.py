"""export --format openvino: the integers in the file are the codes, and OpenVINO computes what transformers does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsparse import openvino_runtime, openvino_weights
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from llmsparse.openvino_runtime import EXACT, Session
from tests.packed_tiny import add_grid, sparse
from tests.pruned import tensors
from tests.tiny import FAMILIES as CONFIGS

openvino = pytest.importorskip("openvino")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
IDS = [3 + 7 * i % 120 for i in range(40)]  # five sliding windows


def written(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Of every matrix product and table: integers (out, groups, group), scales (out, groups), type of the integers.

    Found from the products up, through multiplication and conversions, whatever the nodes are called.
    """
    found = {}
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        above = node.input_value(1 if node.get_type_name() == "MatMul" else 0).get_node()
        if above.get_type_name() == "Reshape":
            above = above.input_value(0).get_node()
        if above.get_type_name() != "Multiply":
            continue
        codes, scales = (up(above.input_value(i).get_node()) for i in (0, 1))
        if codes is None:
            continue
        kind = codes.get_element_type().get_type_name()
        raw = codes.data.reshape(-1).view(np.uint8)
        if kind == "i4":  # two in a byte, the first lowest
            raw = np.stack([raw & 15, raw >> 4], 1).reshape(-1)
            raw = np.where(raw > 7, raw.astype(np.int16) - 16, raw)
        integers = raw.astype(np.int16) if kind == "i4" else raw.view(np.int8)
        found[codes.get_friendly_name()] = (
            integers.reshape(scales.shape[0], int(np.prod(scales.shape[1:])), -1),
            scales.data.astype(np.float32).reshape(scales.shape[0], -1),
            kind,
        )
    return found


def up(node):
    """The constant behind a conversion."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


@torch.no_grad()
def source_logits(folder: Path) -> Tensor:
    model = load_model(Checkpoint(folder), torch.float32, torch.device("cpu"), False)
    return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def pieces(folder: Path, *sizes: int) -> Tensor:
    """Logits of ``IDS``, read in calls of so many tokens."""
    session, start, found = Session(str(folder / "openvino_model.xml"), EXACT), 0, []
    for size in sizes:
        found.append(session.logits(IDS[start : start + size]).copy())
        start += size
    assert start == len(IDS)
    return torch.from_numpy(np.concatenate(found))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "grid, kind, group", [("int8", "i8", 64), ("int4:32", "i4", 32), ("int4:64", "i4", 64)]
)
def test_the_codes_beside_the_model_are_the_files(
    tmp_path: Path, family: str, grid: str, kind: str, group: int
) -> None:
    add_grid(sparse(tmp_path / "sparse", family), grid)
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino")
    codes, found = GridFile.open(tmp_path / "sparse"), written(tmp_path / "out")
    assert codes is not None and result["layouts"][grid] == len(codes.names) == 21
    assert set(found) == set(codes.names)
    for name in codes.names:
        integers, scales, stored = found[name]
        assert stored == kind and integers.shape[2] == min(group, codes.codes(name).shape[1])
        assert np.array_equal(integers.reshape(len(integers), -1), codes.codes(name).numpy()), name
        assert np.array_equal(scales, codes.scales(name).numpy()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_computes_what_transformers_does_in_one_go_and_token_by_token(
    tmp_path: Path, family: str
) -> None:
    add_grid(sparse(tmp_path / "sparse", family), "int4:32")
    export(tmp_path / "sparse", tmp_path / "out", format="openvino")
    wanted = source_logits(tmp_path / "sparse")
    for sizes in ([40], [1] * 40, [20, 1, 1, 18]):
        assert torch.allclose(pieces(tmp_path / "out", *sizes), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rotary_embeddings_that_follow_from_the_position_alone_are_traced(tmp_path: Path, kind: str) -> None:
    rotary(sparse(tmp_path / "sparse"), kind)
    export(tmp_path / "sparse", tmp_path / "out", format="openvino", values="fp32")
    wanted = source_logits(tmp_path / "sparse")
    assert torch.allclose(pieces(tmp_path / "out", 30, 1, 9), wanted, rtol=0, atol=1e-3)


def rotary(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))


@pytest.mark.parametrize("values", ["fp16", "bf16", "fp32"])
def test_floats_are_the_weights_in_the_type_that_was_asked_for(tmp_path: Path, values: str) -> None:
    sparse(tmp_path / "sparse", "qwen2")  # a tied table
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino", values=values)
    assert result["layouts"] == {values: 22}
    read = dict(openvino_weights.read(tmp_path / "out" / "openvino_model.xml"))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[values]
    source = {name: tensor for name, tensor in tensors(tmp_path / "sparse").items() if tensor.dim() == 2}
    assert len(source) == 22
    for name, tensor in source.items():
        assert torch.equal(read[name], tensor.to(dtype).float()), name


def test_without_codes_the_nearest_are_written_and_tables_as_asked(tmp_path: Path) -> None:
    sparse(tmp_path / "sparse")
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino", values="int4:32")
    assert "prune --values int4:32" in result["warnings"][0]
    assert result["layouts"] == {"int8": 2, "int4:32": 21}
    found = written(tmp_path / "out")
    assert found["model.embed_tokens.weight"][2] == found["lm_head.weight"][2] == "i8"
    assert written_after(tmp_path, values="int8", embeddings="keep") == {"fp16": 2, "int8": 21}
    assert written_after(tmp_path, values="int8", embeddings="int4:32") == {"int4:32": 2, "int8": 21}
    assert written(tmp_path / "out")["lm_head.weight"][2] == "i4"


def written_after(folder: Path, **options) -> dict[str, int]:
    return export(folder / "sparse", folder / "out", format="openvino", overwrite=True, **options)["layouts"]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_a_tied_table_of_codes_is_stored_once_and_looked_up_and_multiplied(
    tmp_path: Path, family: str
) -> None:
    sparse(tmp_path / "sparse", family)
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino", values="int8")
    assert result["layouts"] == {"int8": 22}
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    large = [node for node in graph.get_ops() if node.get_type_name() == "Constant" and 128 in node.shape]
    assert [
        node.get_friendly_name() for node in large if node.get_element_type().get_type_name() == "i8"
    ] == ["model.embed_tokens.weight"]
    model = load_model(Checkpoint(tmp_path / "sparse"), torch.float32, torch.device("cpu"), False)
    with torch.no_grad():
        for name, weight in openvino_weights.read(tmp_path / "out" / "openvino_model.xml"):
            if weight.dim() == 2:
                model.get_parameter(name).copy_(weight)
        wanted = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert torch.allclose(pieces(tmp_path / "out", 39, 1), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("grid, groups", [("int4:32", 9), ("int4:64", 9), ("int8", 1)])
def test_a_group_that_does_not_divide_a_row_is_cut_and_no_number_is_another(
    tmp_path: Path, grid: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = CONFIGS["llama"]()
    wide.intermediate_size = 72
    monkeypatch.setitem(CONFIGS, "llama", lambda: wide)
    add_grid(sparse(tmp_path / "sparse"), grid)
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino")
    name = "model.layers.0.mlp.down_proj.weight"
    assert bool(result["warnings"]) == (grid != "int8")
    if grid != "int8":
        assert result["warnings"][0].startswith("3 matrices have their scales repeated")
        assert f"the first is {name} with 72 inputs in groups of 8" in result["warnings"][0]
    codes, (integers, scales, _) = GridFile.open(tmp_path / "sparse"), written(tmp_path / "out")[name]
    assert codes is not None and scales.shape == (32, groups)
    assert np.array_equal(integers.reshape(32, 72), codes.codes(name).numpy())
    assert np.array_equal((integers * scales[:, :, None]).reshape(32, 72), codes.values(name).numpy())
    wanted = source_logits(tmp_path / "sparse")
    assert torch.allclose(pieces(tmp_path / "out", 39, 1), wanted, rtol=0, atol=1e-3)


def test_what_cannot_be_an_openvino_model_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            export(folder, tmp_path / "out", format="openvino", **options)

    refused(
        sparse(tmp_path / "gpt2", "gpt2"), "gpt2 cannot be exported to OpenVINO here; known: llama, mistral"
    )
    rotary(sparse(tmp_path / "long"), "dynamic")
    refused(tmp_path / "long", "rotary embeddings of type dynamic .* change with the length of the text")
    odd = CONFIGS["llama"]()
    odd.intermediate_size = 36
    with monkeypatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: odd)
        sparse(tmp_path / "odd")
    refused(tmp_path / "odd", "down_proj.weight has rows of 36 inputs, which no group of 8", values="int4:32")
    source = sparse(tmp_path / "sparse")
    refused(source, "values 'q8' are unknown", values="q8")
    add_grid(source)
    refused(source, "--values int4:32 was asked for, but grid.safetensors", values="int4:32")
    refused(source, "--embeddings int8 was asked for, but grid.safetensors", embeddings="int8")
    found = {k: v for k, v in tensors(source).items() if not k.endswith((".codes", ".scales"))}
    found["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "is not what its codes in .* give")
    (source / "grid.safetensors").unlink()
    found["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "up_proj.weight is beyond fp16's range; use --values bf16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpt2", "long", "odd", "sparse"]


def test_an_export_that_is_cut_off_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(sparse(tmp_path / "sparse"), tmp_path / "out", format="openvino")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "openvino_model.bin", "export.json"} <= before.keys()
    monkeypatch.setattr("llmsparse.openvino_weights.of_floats", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path / "sparse", tmp_path / "out", format="openvino", overwrite=True)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "sparse"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_check_finds_the_codes_perplexity_in_openvino(tmp_path: Path, family: str) -> None:
    add_grid(sparse(tmp_path / "sparse", family), "int4:32")
    result = export(tmp_path / "sparse", tmp_path / "out", format="openvino", check=True)
    found = result["check"]
    assert found["failed"] == [] and abs(found["perplexity"]["change"]) < 1e-4
    assert found["tolerance"] == 0.001 and found["tokens"] > 900
    assert found["zeros"]["kept"] == 1.0 and found["zeros"]["export"] >= 0.5
    assert found["runtime"]["name"].startswith("OpenVINO 20") and found["runtime"]["load_seconds"] > 0
    assert set(found["runtime"]["tokens_per_second"]) == {"1", "2"}
    assert found["openvino"]["greedy_tokens"] == 32 and found["openvino"]["greedy_equal"] >= 1
    assert found["file_bytes"] == result["bytes"]["after"]
    assert "no speed and no memory from zeros" in found["says"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["tokens"] == found["tokens"]


def test_the_check_fails_loudly_and_the_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_grid(sparse(tmp_path / "sparse"), "int8")
    monkeypatch.setattr("llmsparse.openvino_weights._packed", lambda kind, codes: codes.flip(0).numpy())
    with pytest.raises(
        UserError, match=r"out is written, but its check failed: perplexity is .* off the source"
    ):
        export(tmp_path / "sparse", tmp_path / "out", format="openvino", check=True)
    said = json.loads((tmp_path / "out" / "export.json").read_text())["check"]
    assert said["failed"] and said["zeros"]["kept"] < 1
    assert (tmp_path / "out" / "openvino_model.xml").is_file()


def test_a_file_that_openvino_cannot_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net>")
    with pytest.raises(UserError, match="OpenVINO cannot run .*openvino_model.xml"):
        openvino_runtime.run(
            tmp_path / "openvino_model.xml", {"ids": [], "first": [], "prompt": [3], "count": 1}
        )


@pytest.mark.long
def test_openvino_computes_smollm2_as_transformers_does(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.export_check.TOKENS", 1024)
    export(smollm2, tmp_path / "out", format="openvino", check=True, values="int8")
    found = json.loads((tmp_path / "out" / "export.json").read_text())["check"]
    assert abs(found["perplexity"]["change"]) < 0.02 and found["failed"] == []
    assert found["file_bytes"] < 145e6 and found["openvino"]["greedy_equal"] >= 4
    plain = export(smollm2, tmp_path / "out", format="openvino", check=True, overwrite=True)["check"]
    assert abs(plain["perplexity"]["change"]) < 1e-3 and plain["openvino"]["greedy_equal"] >= 16
