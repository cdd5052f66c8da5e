"""export --format gguf --values q8_0, q4_0, q4_k, q6_k: the weights as ggml itself rounds them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmsparse import extras, gguf_rounding
from llmsparse.errors import UserError
from llmsparse.export import export
from tests.packed_tiny import add_grid
from tests.pruned import tensors
from tests.test_gguf_export import model, target, written
from tests.tiny import FAMILIES

gguf = pytest.importorskip("gguf")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny Qwen2 (whose rows are not permuted) with rows that a block of the K types divides."""
    config = FAMILIES["qwen2"]()
    config.hidden_size, config.intermediate_size = 256, 512
    monkeypatch.setitem(FAMILIES, "qwen2", lambda: config)


def relative_error(entry, weight: torch.Tensor) -> float:
    found = gguf.dequantize(entry.data, entry.tensor_type)
    wanted = weight.float().numpy()
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def q8_0(weight: np.ndarray) -> np.ndarray:
    """By the format's definition: of 32 numbers an fp16 scale, the largest over 127, then the nearest integers."""
    rows = []
    for block in weight.astype(np.float32).reshape(-1, 32):
        scale = np.abs(block).max() / np.float32(127)
        codes = np.zeros(32, np.int8)
        if scale:
            exact = block * (np.float32(1) / scale)
            codes = (np.sign(exact) * np.floor(np.abs(exact) + np.float32(0.5))).astype(np.int8)
        rows.append(np.concatenate([np.array([scale], np.float16).view(np.uint8), codes.view(np.uint8)]))
    return np.concatenate(rows).reshape(len(weight), -1)


def q4_0(weight: np.ndarray) -> np.ndarray:
    """Of 32 numbers the one of largest magnitude is code -8; the codes + 8, the second half in the upper nibbles."""
    rows = []
    for block in weight.astype(np.float32).reshape(-1, 32):
        scale = block[np.abs(block).argmax()] / np.float32(-8)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        codes = np.minimum(np.trunc(block * inverse + np.float32(8.5)), 15).astype(np.uint8)
        packed = codes[:16] | (codes[16:] << 4)
        rows.append(np.concatenate([np.array([scale], np.float16).view(np.uint8), packed]))
    return np.concatenate(rows).reshape(len(weight), -1)


@pytest.mark.parametrize("name, oracle", [("q8_0", q8_0), ("q4_0", q4_0)])
def test_q8_0_and_q4_0_are_ggmls_by_definition(tmp_path: Path, name: str, oracle) -> None:
    source = tensors(model(tmp_path / "sparse", "qwen2"))
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf", values=name, embeddings=name)
    assert result["layouts"][name.upper()] == 22 and result["values"]["kinds"] == [name]
    assert "what ggml rounds each weight to, alone" in result["warnings"][0]
    found = written(tmp_path / "out")
    for source_name, tensor in source.items():
        if tensor.dim() == 2:
            entry = found[target(source_name, "qwen2")]
            assert np.array_equal(np.array(entry.data).view(np.uint8), oracle(tensor.float().numpy()))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k", "q6_k"])
def test_every_type_is_near_the_weights_and_libgguf_writes_the_same_bytes(
    tmp_path: Path, wide: None, name: str
) -> None:
    libgguf = pytest.importorskip("libgguf")
    source = tensors(model(tmp_path / "sparse", "qwen2"))
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf", values=name)
    found = written(tmp_path / "out")
    allowed = {"q8_0": 0.01, "q4_0": 0.12, "q4_k": 0.09, "q6_k": 0.025}[name]
    for source_name, tensor in source.items():
        entry = found[target(source_name, "qwen2")]
        if tensor.dim() == 2 and ".layers." in source_name:
            assert entry.tensor_type.name == name.upper()
            assert relative_error(entry, tensor) < allowed
            wanted = libgguf.quantize_rows(tensor.float().numpy(), int(entry.tensor_type))
            assert np.array_equal(np.array(entry.data), wanted)
        elif tensor.dim() == 2:
            assert entry.tensor_type.name == "Q8_0"
    bits = {"q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5, "q6_k": 6.5625}[name]
    assert result["bits_per_weight"] == bits


def test_pruned_weights_stay_zero_except_in_q4_k_and_the_user_is_told(tmp_path: Path, wide: None) -> None:
    pytest.importorskip("libgguf")
    source = tensors(model(tmp_path / "sparse", "qwen2"))["model.layers.0.mlp.up_proj.weight"] == 0
    kept = {}
    for name in ("q8_0", "q4_0", "q6_k", "q4_k"):
        result = export(tmp_path / "sparse", tmp_path / "out", format="gguf", values=name, overwrite=True)
        entry = written(tmp_path / "out")["blk.0.ffn_up.weight"]
        zeros = gguf.dequantize(entry.data, entry.tensor_type) == 0
        kept[name] = zeros[source.numpy()].mean()
        told = [line for line in result["warnings"] if "pruned weights do not stay zero" in line]
        assert bool(told) == (name == "q4_k")
    assert kept["q8_0"] == kept["q4_0"] == kept["q6_k"] == 1.0 and kept["q4_k"] < 0.5


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_llama_cpp_computes_k_types_as_transformers_does(tmp_path: Path, wide: None, name: str) -> None:
    pytest.importorskip("libgguf")
    pytest.importorskip("xllamacpp")
    weights = tensors(model(tmp_path / "sparse", "qwen2"))
    weights["model.norm.weight"] *= 0.05  # else logits of hundreds leave other tokens a probability of 0
    save_file(weights, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    found = export(tmp_path / "sparse", tmp_path / "out", format="gguf", values=name, check=True)["check"]
    assert found["llama_cpp"]["positions"] > 100 and not found["failed"]
    assert found["llama_cpp"]["mean_apart"] < 0.02


def test_rows_that_no_block_of_32_divides_stay_f16_and_the_user_is_told(tmp_path: Path, wide: None) -> None:
    FAMILIES["qwen2"]().intermediate_size = 72
    result = export(model(tmp_path / "sparse", "qwen2"), tmp_path / "out", format="gguf", values="q8_0")
    assert "3 matrices stay F16: their rows are no multiple of 32" in result["warnings"][0]
    assert written(tmp_path / "out")["blk.0.ffn_down.weight"].tensor_type.name == "F16"


def test_what_ggml_cannot_round_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            export(source, tmp_path / "out", format="gguf", **options)

    source = model(tmp_path / "sparse")
    refused("values 'q4_1' are unknown; known: bf16.* and of ggml q8_0, q4_0, q4_k, q6_k", values="q4_1")
    refused("embeddings 'q9' are unknown", embeddings="q9")
    with monkeypatch.context() as patch:
        patch.setattr(extras, "version", lambda package: None if package == "libgguf" else "9")
        refused(
            r"--values q4_k needs the package libgguf, which is not installed; pip install 'llmsparse\[gguf-k\]'",
            values="q4_k",
        )
    with monkeypatch.context() as patch:
        patch.setattr(gguf_rounding.extras, "require", lambda *_: None)
        refused(
            r"Q4_K has blocks of 256 inputs, and model.layers.0.\S+ has rows of 64, no multiple of it; use --values "
            "int4:32, int8, q4_0 or q8_0",
            values="q4_k",
        )
        refused(
            r"(model.embed_tokens|lm_head).weight has rows of 32.*use --embeddings int4:32", embeddings="q6_k"
        )
    add_grid(source)
    refused(
        "--values q8_0 was asked for, but grid.safetensors beside the model has codes, which q8_0 would round again; "
        "leave --values out to export these, or delete",
        values="q8_0",
    )
    refused("--embeddings q8_0 was asked for, but grid.safetensors", embeddings="q8_0")
    assert [f.name for f in tmp_path.iterdir()] == ["sparse"]
