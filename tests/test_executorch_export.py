"""export --format executorch: the real runtime computes what transformers does, from the codes beside the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsparse import executorch_model, executorch_program, executorch_runtime
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.eval.models import load_model
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from tests.packed_tiny import IDS, add_grid, sparse
from tests.pruned import tensors
from tests.tiny import FAMILIES as CONFIGS

pytest.importorskip("executorch")
FAMILIES = [
    "llama",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("mistral", "qwen2", "qwen3", "gemma3_text")),
]


def model(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One block, where all are alike, and one row of zeros: lowering takes a second for each product."""
    config = CONFIGS[family]()
    config.num_hidden_layers = 1
    if family == "gemma3_text":
        config.num_hidden_layers, config.layer_types = 2, ["sliding_attention", "full_attention"]
    elif getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    monkeypatch.setitem(CONFIGS, family, lambda: config)
    sparse(folder, family)
    found = tensors(folder)
    found["model.layers.0.mlp.up_proj.weight"][5] = 0.0
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> Tensor:
    """Of every token of IDS, from ExecuTorch."""
    program = executorch_runtime.Program(str(folder / "model.pte"), 1)
    return torch.stack([program.logits(int(token), i) for i, token in enumerate(IDS[0])])


@torch.no_grad()
def wanted(folder: Path) -> Tensor:
    """The same from transformers, with code times scale where there are codes."""
    return load_model(Checkpoint.open(folder), torch.float32, torch.device("cpu"), False)(
        input_ids=IDS
    ).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_executorch_computes_what_transformers_does(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", family, monkeypatch)
    result = export(source, tmp_path / "out", format="executorch")
    assert (logits(tmp_path / "out") - wanted(source)).abs().max() < 1e-4
    assert set(result["layouts"]) == {"fp32"} and result["bits_per_weight"] == 32.0
    assert any("is in the file twice" in warning for warning in result["warnings"]) == (
        family in ("qwen2", "gemma3_text")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_codes_beside_the_model_are_the_files(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", family, monkeypatch)
    add_grid(source)
    result = export(source, tmp_path / "out", format="executorch")
    codes, held = (
        GridFile.open(source),
        set(executorch_program.stored(tmp_path / "out" / "model.pte").values()),
    )
    assert codes is not None and result["layouts"]["int8"] == len(codes.names) in (7, 14)
    below = 0
    for name in codes.names:
        scales = codes.scales(name)
        assert codes.codes(name).mul(scales.sign().to(torch.int8)).numpy().tobytes() in held
        assert torch.where(scales == 0, 1.0, scales.abs()).numpy().tobytes() in held
        below += int((scales < 0).sum())
    assert below and (codes.scales("model.layers.0.mlp.up_proj.weight")[5] == 0).all()
    assert (logits(tmp_path / "out") - wanted(source)).abs().max() < 1e-4  # inputs are not rounded


def test_without_codes_the_nearest_are_written_and_tables_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", "llama", monkeypatch)
    result = export(source, tmp_path / "out", format="executorch", values="int8")
    assert "prune --values int8" in result["warnings"][0]
    assert result["layouts"] == {"int8": 9}  # seven of the block, embedding and output layer
    exact = wanted(source)
    assert 0 < (logits(tmp_path / "out") - exact).abs().max() < 0.1 * exact.abs().max()
    kept = export(
        source, tmp_path / "out", format="executorch", values="int8", embeddings="keep", overwrite=True
    )
    assert kept["layouts"] == {"int8": 7, "fp32": 2}
    assert kept["embeddings"]["after"] == 2 * 4 * 128 * 32


def test_runners_are_told_what_they_ask_and_find_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", "llama", monkeypatch)
    export(source, tmp_path / "out", format="executorch")
    program = executorch_runtime.Program(str(tmp_path / "out" / "model.pte"), 1).program
    told = {name: program.load_method(name).execute([]) for name in program.method_names if name != "forward"}
    assert told == {
        "get_max_seq_len": [128], "get_max_context_len": [128], "get_vocab_size": [128], "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [False], "enable_dynamic_shape": [False], "get_bos_id": [0], "get_eos_ids": [1],
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_scales_that_xnnpack_does_not_take_are_turned_without_changing_a_product() -> None:
    codes = torch.tensor([[1, -127], [3, 0], [0, 0]], dtype=torch.int8)
    scales = torch.tensor([[-0.5], [2.0], [0.0]])
    turned, row = executorch_model._positive(codes, scales)
    assert row.tolist() == [0.5, 2.0, 1.0]
    assert torch.equal(turned * row[:, None], codes * scales)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"values": "int4:32"},
            "--values int4:32 was asked for; XNNPACK multiplies int4 .* stores fp32 or int8",
        ),
        ({"values": "bf16"}, "--values bf16 was asked for; --format executorch stores fp32 or int8"),
        ({"embeddings": "int4:32"}, "--embeddings int4:32 was asked for; XNNPACK .* stores keep or int8"),
    ],
)
def test_what_it_does_not_store_is_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    source = sparse(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "out", format="executorch", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_int4_codes_changed_codes_and_unknown_models_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            export(folder, tmp_path / "out", format="executorch")

    refused(sparse(tmp_path / "gpt2", "gpt2"), "gpt2 cannot be exported to ExecuTorch; known: llama")
    refused(sparse(tmp_path / "mixtral", "mixtral"), "mixtral cannot be exported to ExecuTorch")
    add_grid(sparse(tmp_path / "int4"), "int4:32")
    refused(tmp_path / "int4", "has int4:32 codes beside the model; .* prune or quantize with --values int8")
    add_grid(sparse(tmp_path / "changed"))
    found = tensors(tmp_path / "changed")
    found["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(found, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "changed", "is not what its codes in .* give")
    sparse(tmp_path / "rotary")
    config = json.loads((tmp_path / "rotary" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "rotary" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "rotary", "rotary embeddings of type dynamic cannot be exported")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_interrupted_export_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("{}")
    monkeypatch.setattr("llmsparse.executorch_program.lower", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(source, tmp_path / "out", format="executorch", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_check_runs_the_program_and_reads_its_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", "llama", monkeypatch)
    add_grid(source)
    found = export(source, tmp_path / "out", format="executorch", check=True)["check"]
    assert found["failed"] == [] and abs(found["perplexity"]["change"]) < 1e-3
    assert found["tokens"] == 8 * 127 and found["zeros"]["kept"] == 1.0 and found["zeros"]["export"] >= 0.5
    assert found["runtime"]["load_seconds"] > 0
    assert all(found["runtime"]["tokens_per_second"][threads] > 0 for threads in ("1", "2"))
    assert found["notes"] == ["greedy continuation equal to the source's for 32 of 32 tokens"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["tokens"] == found["tokens"]


def test_a_check_of_wrong_scales_fails_loudly_and_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "source", "llama", monkeypatch)
    add_grid(source)
    monkeypatch.setattr(
        executorch_model,
        "_positive",
        lambda codes, scales: (codes, 30 * scales.float().flatten().abs() + 0.01),
    )
    with pytest.raises(
        UserError, match="out is written, but its check failed: perplexity is .* off the source's"
    ):
        export(source, tmp_path / "out", format="executorch", check=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"]["failed"]


def test_a_file_without_the_weights_is_told() -> None:
    from llmsparse.executorch_check import weight

    with pytest.raises(UserError, match=r"model.pte does not hold a.weight as export.json says"):
        weight({"other": b""}, Path("model.pte"), "a.weight", "name", (2, 2))


@pytest.mark.long
def test_smollm2_as_int8_loses_what_rounding_loses(smollm2: Path, tmp_path: Path) -> None:
    found = export(smollm2, tmp_path / "out", format="executorch", values="int8", check=True)
    assert found["bytes"]["after"] < 200e6 and found["bits_per_weight"] < 8.1
    ran = found["check"]
    assert ran["failed"] == [] and abs(ran["perplexity"]["change"]) < 0.02 and ran["tokens"] == 1023
