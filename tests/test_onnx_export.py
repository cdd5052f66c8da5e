"""export --format onnx: the codes in the file are those beside the model, and onnxruntime-genai computes the same."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmsparse import export_check, onnx_blocks, onnx_genai, onnx_layout
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import NAME, GridFile
from tests import tiny
from tests.packed_tiny import add_grid, sparse
from tests.pruned import tensors

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
og = pytest.importorskip("onnxruntime_genai")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"]
IDS = list(range(3, 43))


def configured(monkeypatch: pytest.MonkeyPatch, family: str, **options: object) -> None:
    """Two heads of 16 numbers: onnxruntime's attention wants no less."""
    made = tiny.FAMILIES[family]()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **options}
    if family == "gemma3_text":
        heads["query_pre_attn_scalar"] = 16
    if (
        family == "phi3"
    ):  # the builder takes a matrix of as many rows as there are tokens for the output layer
        heads.setdefault("intermediate_size", 96)
    for name, value in heads.items():
        setattr(made, name, value)
    monkeypatch.setitem(tiny.FAMILIES, family, lambda: made)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a tiny pruned checkpoint, with codes beside it where a grid is named."""

    def written(family: str = "llama", grid: str | None = None, **options: object) -> Path:
        configured(monkeypatch, family, **options)
        folder = sparse(tmp_path / "sparse", family)
        if grid is not None:
            add_grid(folder, grid)
        return folder

    return written


def exported(source: Path, **options) -> Path:
    export(source, source.parent / "out", format="onnx", overwrite=True, **options)
    return source.parent / "out"


class Read:
    """An ONNX file by plain onnx and numpy."""

    def __init__(self, folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx").graph  # with its data
        self.nodes = {node.name: node for node in graph.node}
        self.arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def codes(self, name: str) -> tuple[NDArray, NDArray, int]:
        """Integers (out, in), the scale of each (out, in) and the block of a node."""
        node = self.nodes[name]
        said = {attribute.name: attribute.i for attribute in node.attribute}
        gathers = node.op_type == "GatherBlockQuantized"
        stored, scales = (self.arrays[node.input[i]] for i in ((0, 2) if gathers else (1, 2)))
        rows = len(stored)
        flat = stored.reshape(rows, -1)
        if said["bits"] == 4:
            halves = np.zeros((rows, 2 * flat.shape[1]), np.uint8)
            halves[:, 0::2], halves[:, 1::2] = flat % 16, flat // 16
            flat = halves
        integers = flat.astype(np.int32) - 2 ** (said["bits"] - 1)
        each = np.repeat(scales.reshape(rows, -1), said["block_size"], axis=1)
        return integers, each, said["block_size"]


def node_of(name: str) -> str:
    """The node of ``model.layers.0.self_attn.q_proj.weight``, by a table of this test's own."""
    _, _, block, part, layer, _ = name.split(".")
    return f"/model/layers.{block}/{ {'self_attn': 'attn', 'mlp': 'mlp'}[part] }/{layer}/MatMul"


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of onnxruntime-genai, in two parts: the second reads the cache of the first."""
    loaded = og.Model(str(folder))
    options = og.GeneratorParams(loaded)
    options.set_search_options(max_length=64)
    generator, found = og.Generator(loaded, options), []
    for part in (ids[:21], ids[21:]):
        generator.append_tokens(np.array(part, np.int32))
        found.append(generator.get_output("logits")[0])
    return torch.from_numpy(np.concatenate(found))


def wanted(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of transformers in float32; with the codes' own weights where there are some, of which bf16 is the rounding."""
    loaded, codes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), GridFile.open(folder)
    with torch.no_grad():
        for name in codes.names if codes else ():
            loaded.get_parameter(name).copy_(codes.values(name))
        return loaded(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("grid", "block"), [("int8", 32), ("int4:32", 32), ("int4:64", 32), ("int4:16", 16)])
def test_the_codes_beside_the_model_are_the_files(model, grid: str, block: int) -> None:
    source = model(grid=grid)
    found, codes = Read(exported(source)), GridFile.open(source)
    assert codes is not None and len(codes.names) == 21
    for name in codes.names:
        integers, scales, size = found.codes(node_of(name))
        beside = codes.codes(name).numpy()
        assert np.array_equal(integers, beside) and size >= block, name
        group = int(grid.partition(":")[2] or beside.shape[1])
        each = codes.scales(name).numpy()[:, np.arange(beside.shape[1]) // group]
        assert np.array_equal(scales, each), name


def test_phi3s_joined_matrices_are_their_nodes_rows(model) -> None:
    source = model("phi3", "int4:32")
    found, codes = Read(exported(source)), GridFile.open(source)
    assert codes is not None
    for block in range(3):
        for joined, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            place = f"/model/layers.{block}/{'attn' if parts == 'qkv' else 'mlp'}"
            pieces = [found.codes(f"{place}/{part}_proj/MatMul")[0] for part in parts]
            beside = codes.codes(f"model.layers.{block}.{joined}.weight").numpy()
            assert np.array_equal(np.concatenate(pieces), beside)


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_computes_what_transformers_does(model, family: str) -> None:
    source = model(family)
    out = exported(source)
    assert torch.allclose(logits(out, IDS), wanted(source, IDS), rtol=1e-4, atol=1e-4)
    assert json.loads((out / "export.json").read_text())["layouts"] == {
        "F32": {"phi3": 14, "qwen2": 22, "gemma3_text": 22}.get(family, 23)
    }


def test_llama3s_rotary_embeddings_are_transformers(model) -> None:
    rotary = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    source = model(rope_parameters=rotary)
    assert torch.allclose(logits(exported(source), IDS), wanted(source, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("grid", ["int8", "int4:32"])
def test_with_codes_it_computes_what_transformers_does_with_their_weights(
    model, family: str, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.onnx_file.ACCURACY", 1)  # activations stay fp32
    source = model(family, grid)
    assert torch.allclose(logits(exported(source), IDS), wanted(source, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # two tables, and one that is tied
@pytest.mark.parametrize(("asked", "bits"), [("int8", 8), ("int4:32", 4)])
def test_tables_get_codes_as_asked_and_a_tied_one_is_written_once(
    model, family: str, asked: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(family)
    kept = (exported(source, values="int8", embeddings="keep") / "model.onnx.data").stat().st_size
    out = exported(source, values="int8", embeddings=asked)
    found = Read(out)
    head, table = found.codes("/lm_head/MatMul"), found.codes("/model/embed_tokens/Gather")
    assert (np.array_equal(head[0], table[0]) and np.array_equal(head[1], table[1])) == (family == "qwen2")
    rows, inputs, tables = 128, 32, 1 if family == "qwen2" else 2
    saved = tables * rows * (inputs * 4 - inputs * bits // 8 - 4)
    assert abs(kept - saved - (out / "model.onnx.data").stat().st_size) < 64 * 4  # where a tensor begins
    weight = (table[0] * table[1]).astype(np.float32)
    stored = wanted_table(source)
    assert np.abs(weight - stored).max() <= np.abs(stored).max() / (2 ** (bits - 1) - 2)


def wanted_table(folder: Path) -> NDArray:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach().float().numpy()


def test_rows_that_no_block_divides_are_filled_with_zeros(model) -> None:
    source = model(grid="int8", intermediate_size=72, hidden_size=48)
    out = exported(source)
    found, codes = Read(out), GridFile.open(source)
    assert codes is not None
    integers, _, block = found.codes("/model/layers.1/mlp/down_proj/MatMul")
    beside = codes.codes("model.layers.1.mlp.down_proj.weight").numpy()
    assert integers.shape[1] % block == 0 and integers.shape[1] > 72
    assert np.array_equal(integers[:, :72], beside) and not integers[:, 72:].any()
    (source / NAME).unlink()
    out = exported(source, values="int8", embeddings="int4:32")
    table = Read(out).codes("/model/embed_tokens/Gather")
    assert table[0].shape[1] > 48 and torch.isfinite(logits(out, IDS)).all()


def test_without_codes_values_rounds_to_the_nearest_and_says_so(model) -> None:
    source = model()
    result = export(source, source.parent / "out", format="onnx", values="int4:32")
    assert any("nearest to each weight alone" in warning for warning in result["warnings"])
    assert any("no speed and no memory from zeros" in warning for warning in result["warnings"])
    assert result["layouts"] == {"int4:32": 21, "int8:32": 2} and 5.0 <= result["bits_per_weight"] < 5.1
    assert result["bytes"]["after"] == sum(
        file.stat().st_size for file in (source.parent / "out").iterdir() if file.name != "export.json"
    )


def test_the_builder_says_nothing_and_leaves_python_path_alone(model, capfd) -> None:
    import sys

    before = list(sys.path)
    exported(model())
    said = capfd.readouterr()
    assert "Reading layer" not in said.out + said.err and "Saving" not in said.out + said.err
    assert sys.path == before


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            export(folder, tmp_path / "out", format="onnx", **options)

    refused(sparse(tmp_path / "gpt2", "gpt2"), "gpt2 cannot be exported to ONNX; known: llama, mistral")
    refused(sparse(tmp_path / "narrow", "qwen3"), "heads of a multiple of 16 numbers; this model's have 8")
    source = model()
    refused(source, "multiplies in fp32 on CPUs: use fp32, int8", values="fp16")
    refused(source, "int4:24 has a scale for every 24 inputs, and ONNX's", values="int4:24")
    refused(source, "values 'q8' are unknown", values="q8")
    add_grid(source)
    refused(source, "--values int4:32 was asked for, but grid.safetensors", values="int4:32")
    refused(source, "--embeddings int8 was asked for, but grid.safetensors", embeddings="int8")
    found = {name: t for name, t in tensors(source).items() if not name.endswith((".codes", ".scales"))}
    found["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "is not what its codes in .* give")
    (source / NAME).unlink()
    config = json.loads((source / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    refused(source, "rotary embeddings of type yarn cannot be exported to ONNX")
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "mish"}))
    refused(source, "onnxruntime-genai's model builder fails on .*: NotImplementedError")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpt2", "narrow", "sparse"]


def test_a_layer_that_the_builder_would_mistake_is_refused(model, tmp_path: Path) -> None:
    source = model("phi3", intermediate_size=64)  # 128 rows of gate and up, and 128 tokens
    with pytest.raises(UserError, match="gate_up_proj.weight has 128 rows, as many as there are tokens"):
        export(source, tmp_path / "out", format="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["sparse"]


def test_a_graph_with_other_weights_than_the_checkpoint_is_refused(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = onnx_layout.piece
    swap = {"gate": "up", "up": "gate"}

    def swapped(node: str, config: object) -> onnx_layout.Piece | None:
        return original(re.sub("(gate|up)_proj", lambda found: swap[found[1]] + "_proj", node), config)

    monkeypatch.setattr(onnx_layout, "piece", swapped)
    with pytest.raises(UserError, match="did not put model.layers.0.mlp.up_proj.weight where it belongs"):
        export(model(), tmp_path / "out", format="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["sparse"]


def test_an_interrupted_export_leaves_the_old_output(model, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model()
    before = sorted(file.name for file in exported(source).iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("llmsparse.onnx_blocks.pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exported(source, values="int8")
    assert sorted(file.name for file in (source.parent / "out").iterdir()) == before
    assert sorted(file.name for file in source.parent.iterdir()) == ["out", "sparse"]


def test_check_measures_the_folder_in_its_runtime(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "TOKENS", 512)
    source = model("gemma3_text", "int8")
    result = export(source, source.parent / "out", format="onnx", check=True)
    found = result["check"]
    assert found["failed"] == [] and abs(found["perplexity"]["change"]) < 0.011
    assert found["zeros"]["kept"] == 1.0 and found["zeros"]["source"] >= 0.5
    assert found["runtime"]["name"].startswith("onnxruntime-genai ")
    assert set(found["runtime"]["tokens_per_second"]) == {"1", "2"}
    assert found["tokens"] == 4 * 127  # windows of 128, whose BOS is no prediction
    assert found["notes"][0].startswith("greedy continuation equal to the source's")
    assert (
        json.loads((source.parent / "out" / "export.json").read_text())["check"]["tokens"] == found["tokens"]
    )


def test_check_fails_loudly_and_the_files_stay(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "TOKENS", 256)
    original = onnx_blocks.pack
    monkeypatch.setattr(onnx_blocks, "pack", lambda kind, codes, block: original(kind, codes.flip(0), block))
    source = model(grid="int8")
    with pytest.raises(
        UserError, match=r"out is written, but its check failed: perplexity is .* off the source's"
    ):
        export(source, source.parent / "out", format="onnx", check=True)
    assert json.loads((source.parent / "out" / "export.json").read_text())["check"]["failed"]
    assert (source.parent / "out" / "model.onnx.data").is_file()


def test_a_folder_that_the_runtime_cannot_load_is_one_line(model) -> None:
    out = exported(model())
    (out / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(UserError, match="onnxruntime-genai cannot run .*out"):
        onnx_genai.run(out, {"ids": [IDS], "first": [0], "prompt": IDS, "count": 4})


@pytest.mark.long
def test_smollm2_in_int8_is_worth_what_it_was(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "TOKENS", 1024)
    result = export(smollm2, tmp_path / "out", format="onnx", values="int8", check=True)
    found = result["check"]
    assert found["failed"] == [] and found["perplexity"]["change"] < 0.02
    assert result["bytes"]["after"] < 0.6 * result["bytes"]["before"]
    tokenizer = og.Tokenizer(og.Model(str(tmp_path / "out")))
    text = "Pruning a model, one block at a time."
    assert tokenizer.encode(text).tolist() == Checkpoint(smollm2).tokenizer()(text)["input_ids"]
