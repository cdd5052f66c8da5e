"""export --format gguf: every tensor is what was meant, bit for bit, and independent readers agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmsparse import gguf_tokenizer, llama_cpp
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from tests.packed_tiny import add_grid, sparse
from tests.pruned import tensors
from tests.tokenizers_tiny import cut_as_gpt2, word_tokenizer

gguf = pytest.importorskip("gguf")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
IDS = torch.arange(3, 23)[None]
NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
}  # fmt: skip
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def model(folder: Path, family: str = "llama", **options) -> Path:
    """A tiny pruned checkpoint with a tokenizer that llama.cpp knows."""
    return cut_as_gpt2(sparse(folder, family, **options))


def written(folder: Path) -> dict:
    (file,) = folder.glob("*.gguf")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields(folder: Path) -> dict:
    (file,) = folder.glob("*.gguf")
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def target(name: str, family: str) -> str:
    """llama.cpp's name, by a table of this test's own."""
    if name == "model.norm.weight":
        return "output_norm.weight"
    part, kind = name.split(".")[-2:]
    table = NAMES | (GEMMA_NORMS if family == "gemma3_text" else NORMS)
    block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    return f"{block}{table[part]}.{kind}"


def rows(name: str, family: str, array: np.ndarray) -> np.ndarray:
    """The rows of q and k as llama.cpp's own converter orders them; 4 and 2 heads."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if family not in ("llama", "mistral") or heads is None:
        return array
    return array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_in_f16_is_the_checkpoints(tmp_path: Path, family: str) -> None:
    source = tensors(model(tmp_path / "sparse", family))
    export(tmp_path / "sparse", tmp_path / "out", format="gguf")
    found = written(tmp_path / "out")
    assert len(found) == len(source)
    for name, tensor in source.items():
        entry, wanted = found[target(name, family)], tensor.float().numpy()
        if wanted.ndim == 1:
            shift = 1.0 if family == "gemma3_text" else 0.0
            assert entry.tensor_type.name == "F32"
            assert np.array_equal(entry.data, rows(name, family, wanted) + np.float32(shift)), name
        else:
            assert entry.tensor_type.name == "F16"
            assert np.array_equal(entry.data, rows(name, family, wanted).astype(np.float16)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid, type", [("int8", "Q8_0"), ("int4:32", "Q4_0"), ("int4:64", "Q4_0")])
def test_the_codes_beside_the_model_are_the_files(tmp_path: Path, family: str, grid: str, type: str) -> None:
    add_grid(model(tmp_path / "sparse", family), grid)
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf")
    codes, found = GridFile.open(tmp_path / "sparse"), written(tmp_path / "out")
    assert codes is not None and result["layouts"][type] == len(codes.names) == 21
    for name in codes.names:
        entry = found[target(name, family)]
        assert entry.tensor_type.name == type
        blocks = np.array(entry.data).reshape(-1, 34 if type == "Q8_0" else 18)
        packed = blocks[:, 2:]
        integers = (
            packed.view(np.int8)
            if type == "Q8_0"
            else np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int8) - 8
        )
        wanted = rows(name, family, codes.codes(name).numpy())
        assert np.array_equal(integers.reshape(wanted.shape), wanted), name
        values = gguf.dequantize(entry.data, entry.tensor_type)
        assert np.array_equal(values, rows(name, family, codes.values(name).numpy())), name


def test_without_codes_the_nearest_are_written_and_embeddings_as_asked(tmp_path: Path) -> None:
    model(tmp_path / "sparse")
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf", values="int4:32")
    assert "prune --values int4:32" in result["warnings"][0]
    found = written(tmp_path / "out")
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"
    kept = written_after(tmp_path, values="int8", embeddings="keep")
    assert kept["token_embd.weight"].tensor_type.name == kept["output.weight"].tensor_type.name == "F16"
    four = written_after(tmp_path, values="int8", embeddings="int4:32")
    assert four["output.weight"].tensor_type.name == "Q4_0"
    assert written_after(tmp_path, values="bf16")["blk.0.attn_v.weight"].tensor_type.name == "BF16"


def written_after(folder: Path, **options) -> dict:
    export(folder / "sparse", folder / "out", format="gguf", overwrite=True, **options)
    return written(folder / "out")


def test_rows_that_no_block_divides_stay_f16_and_the_user_is_told(tmp_path: Path, monkeypatch) -> None:
    from tests.tiny import FAMILIES as CONFIGS

    wide = CONFIGS["llama"]()
    wide.intermediate_size = 72
    monkeypatch.setitem(CONFIGS, "llama", lambda: wide)
    result = export(model(tmp_path / "sparse"), tmp_path / "out", format="gguf", values="int8")
    assert "3 matrices stay F16: their rows are no multiple of 32" in result["warnings"][0]
    assert written(tmp_path / "out")["blk.0.ffn_down.weight"].tensor_type.name == "F16"


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of qwen3 transformers 5.23 forgets the head size
def test_transformers_own_reader_gives_the_sources_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model(tmp_path / "sparse", family)
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=result["file"], dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(source(IDS).logits, read(IDS).logits, atol=1e-3)


def test_the_tokenizer_and_the_settings_are_in_the_file(tmp_path: Path) -> None:
    export(model(tmp_path / "sparse"), tmp_path / "out", format="gguf", values="int8")
    found = fields(tmp_path / "out")
    vocabulary = Checkpoint(tmp_path / "sparse").tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    assert found["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{i}]" for i in range(121, 128))]
    assert found["tokenizer.ggml.token_type"] == [3, 3, 3, *[1] * 118, *[5] * 7]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.merges"] == ["t h"]
    assert found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    assert (found["llama.rope.dimension_count"], found["general.file_type"]) == (8, 7)


def test_llama3s_rule_and_sentencepiece_are_recognised() -> None:
    split = {"type": "Split", "pattern": {"Regex": gguf_tokenizer.LLAMA3}}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, plain]},
        "model": {"ignore_merges": True},
    }
    assert gguf_tokenizer._rule(parts) == "llama-bpe"
    split["pattern"]["Regex"] = gguf_tokenizer.QWEN2
    parts["model"]["ignore_merges"] = False
    assert gguf_tokenizer._rule(parts) == "qwen2"
    assert gguf_tokenizer._scores(["t h", "th e"], ["the", "th", "x"]) == [-1.0, 0.0, -2.0]


def test_what_cannot_be_a_gguf_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    def refused(folder: Path, match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            export(folder, tmp_path / "out", format="gguf", **options)

    refused(sparse(tmp_path / "gpt2", "gpt2"), "gpt2 cannot be exported to GGUF; known: llama, mistral")
    refused(sparse(tmp_path / "uncut"), "llama.cpp has no rule that cuts words as this tokenizer does")
    source = model(tmp_path / "sparse")
    refused(source, "int4:8 has a scale for every 8 inputs, and GGUF one for every 32", values="int4:8")
    refused(source, "values 'q8' are unknown", values="q8")
    add_grid(source)
    refused(source, "--values int4:32 was asked for, but grid.safetensors", values="int4:32")
    found = {k: v for k, v in tensors(source).items() if not k.endswith((".codes", ".scales"))}
    found["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "is not what its codes in .* give")
    (source / "grid.safetensors").unlink()
    found["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "up_proj.weight is beyond fp16's range; use --values bf16")
    word_tokenizer().save_pretrained(source)
    refused(source, "a tokenizer of type WordLevel cannot be exported to GGUF")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gpt2", "sparse", "uncut"]


def test_an_interrupted_export_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(model(tmp_path / "sparse"), tmp_path / "out", format="gguf")
    before = sorted(f.name for f in (tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("llmsparse.gguf_file.panels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(tmp_path / "sparse", tmp_path / "out", format="gguf", values="int8", overwrite=True)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == before
    export(tmp_path / "sparse", tmp_path / "out", format="gguf", values="int8", overwrite=True)
    assert [f.name for f in (tmp_path / "out").iterdir() if f.suffix == ".gguf"] == ["sparse-Q8_0.gguf"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "sparse"]


@pytest.mark.parametrize("family", FAMILIES)
def test_check_finds_the_codes_perplexity_and_says_when_llama_cpp_is_missing(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    add_grid(model(tmp_path / "sparse", family))
    result = export(tmp_path / "sparse", tmp_path / "out", format="gguf", check=True)
    found = result["check"]
    assert found["perplexity"]["export"] == pytest.approx(found["perplexity"]["source"], rel=1e-3)
    assert found["notes"] == [
        "llama.cpp was not run: the package xllamacpp is not installed; pip install 'llmsparse[gguf-check]'"
    ]
    assert found["zeros"]["kept"] == 1.0 and found["zeros"]["export"] >= 0.5
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["tokens"] == found["tokens"]


def test_check_fails_loudly_and_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    monkeypatch.setattr("llmsparse.gguf_layout.Place.from_file", lambda _, tensor: tensor)
    with pytest.raises(
        UserError, match=r"out is written, but its check failed: perplexity is .* off the source's"
    ):
        export(model(tmp_path / "sparse"), tmp_path / "out", format="gguf", check=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["failed"]
    assert list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    pytest.importorskip("xllamacpp")
    model(tmp_path / "sparse", family)
    found = export(tmp_path / "sparse", tmp_path / "out", format="gguf", check=True)["check"]["llama_cpp"]
    assert found["positions"] > 100 and not found["beyond_list"]
    assert found["mean_apart"] < 0.01 and found["same_likeliest"] > 0.95


@pytest.mark.long
def test_llama_cpp_computes_smollm2_as_transformers_does(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("llmsparse.export_check.TOKENS", 1024)
    found = export(smollm2, tmp_path / "out", format="gguf", check=True)["check"]
    ran = found["llama_cpp"]
    assert abs(found["perplexity"]["change"]) < 1e-3
    assert ran["positions"] == 256 and ran["mean_apart"] < 0.02 and ran["greedy_equal"] >= 16
    assert ran["text_tokens"]["transformers"] == ran["text_tokens"]["llama_cpp"]
