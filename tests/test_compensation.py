"""Low-rank compensation: the best of its rank, and an adapter that PEFT loads."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmsparse.compensation import compensate
from llmsparse.errors import UserError
from llmsparse.plan import plan
from llmsparse.prune import prune
from llmsparse.statistics import Gram, SquaredNorm
from llmsparse.writer import Writer
from tests.pruned import SMALL, hashes, read_report, tensors
from tests.tiny import VOCAB, save_tiny


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(error, inputs):
    """|E X|^2 a token, by a plain product."""
    return float((inputs @ error.T).square().sum())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("known", ["gram", "norms", "nothing"])
def test_no_other_matrix_of_the_rank_leaves_less(shape, rank, known):
    error, inputs = values(*shape, seed=0), values(64, shape[1], seed=1) * values(1, shape[1], seed=2).exp()
    statistics = {"gram": Gram, "norms": SquaredNorm}.get(known)
    seen = statistics.zeros(shape[1], dtype=torch.float64) if known == "gram" else None
    if known == "norms":
        seen = SquaredNorm(torch.zeros(shape[1], dtype=torch.float64), 0)
    if seen is not None:
        seen.update(inputs)
    if known == "norms":
        inputs = torch.diag(inputs.square().sum(0).sqrt())
    if known == "nothing":
        inputs = torch.eye(shape[1], dtype=torch.float64)
    found = compensate(error, seen, rank)
    singular = torch.linalg.svdvals(inputs @ error.T)  # Eckart and Young: the best leaves the others
    best = float(singular[rank:].square().sum())
    whole = lost(error, inputs)
    assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, shape[1])
    assert lost(error - found.up @ found.down, inputs) == pytest.approx(best, rel=1e-4, abs=1e-7 * whole)
    assert found.left == pytest.approx(best / whole, rel=1e-3, abs=1e-6)


def test_few_tokens_are_enough():
    gram = Gram.zeros(24, dtype=torch.float64)
    gram.update(values(5, 24, seed=0))
    for shape in ((12, 24), (40, 24)):
        assert torch.isfinite(compensate(values(*shape, seed=1), gram, 8).down).all()


def test_inputs_with_a_common_mean_in_float32_do_not_stop_it():
    inputs = values(4096, 256, seed=0).float() + 30 * values(1, 256, seed=1).float()
    gram = Gram.zeros(256)
    gram.update(inputs)
    error = values(512, 256, seed=2).float()
    found = compensate(error, gram, 16)
    singular = torch.linalg.svdvals(inputs.double() @ error.double().T)
    best = float(singular[16:].square().sum())
    assert lost((error - found.up @ found.down).double(), inputs.double()) == pytest.approx(best, rel=0.02)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that it gives up
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_peft_loads_the_adapter_and_adds_what_it_says(family, tmp_path, text):
    peft = pytest.importorskip("peft")
    dense = save_tiny(family, tmp_path / "dense")
    given = {"calibration": text, "pattern": "50%", "solver": "wanda", **SMALL}
    prune(dense, tmp_path / "plain", **given)
    report = prune(dense, tmp_path / "out", compensate=4, **given)
    plain = hashes(tmp_path / "plain")
    assert {k: v for k, v in report["files"].items() if "/" not in k} == plain == hashes(tmp_path / "out")
    assert all(0 <= row["error_left"] < 1 for row in report["weights"])
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32).eval()
        for n in ("dense", "out")
    ]
    logits = [model(input_ids=ids).logits.detach() for model in models]
    adapted = peft.PeftModel.from_pretrained(models[1], tmp_path / "out" / "adapter").eval()
    found = adapted(input_ids=ids).logits.detach()
    saved, sparse = (
        load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors"),
        tensors(tmp_path / "out"),
    )
    assert len(saved) == 2 * len(report["weights"])

    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    conv = type(by_hand).__name__.startswith("GPT2")
    with torch.no_grad():
        for key, down in saved.items():
            if key.endswith("lora_A.weight"):
                whole = saved[key.replace("lora_A", "lora_B")] @ down
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                by_hand.get_submodule(path).weight.add_(whole.T if conv else whole)
        torch.testing.assert_close(found, by_hand(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert sparse and (found - logits[0]).square().mean() < (logits[1] - logits[0]).square().mean()


def test_an_interrupted_run_resumes_to_identical_bytes(tmp_path, text, monkeypatch):
    dense = save_tiny("llama", tmp_path / "dense")
    given = {"calibration": text, "pattern": "2:4", "compensate": 4, **SMALL}
    prune(dense, tmp_path / "expected", **given)
    real = Writer.finish_block

    def cut(self, block, record):
        real(self, block, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish_block", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(dense, tmp_path / "out", **given)
    report = prune(dense, tmp_path / "out", resume=True, **given)
    assert report["files"] == read_report(tmp_path / "expected")["files"]
    assert "adapter/adapter_model.safetensors" in report["files"]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == "out"
    assert not list(tmp_path.glob(".out*"))


def test_experts_get_none_and_a_rank_is_bounded_by_the_weight(tmp_path, text):
    dense = save_tiny("qwen3_moe", tmp_path / "dense")
    report = prune(dense, tmp_path / "out", calibration=text, compensate=1000, solver="wanda", **SMALL)
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert saved and not any("experts" in name for name in saved)
    assert {row["name"] for row in report["weights"] if "error_left" in row} == {
        row["name"] for row in report["weights"] if "expert" not in row["name"]
    }
    assert all(
        row["error_left"] == pytest.approx(0, abs=1e-4) for row in report["weights"] if "error_left" in row
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compensate": 4, "skip": ["q_proj", "k_proj", "v_proj", "o_proj"], "family": "qwen3_moe"},
            "no pruned weight is a",
        ),
        ({"compensate": -1}, "--compensate -1 must be a rank"),
        ({"compensate": 4, "reconstruct": 1}, "--reconstruct changes that; give one of them"),
        ({"compensate": 4, "pattern": "width:50%"}, "--compensate goes with a pattern of weights"),
    ],
)
def test_what_cannot_be_compensated_is_refused(options, message, tmp_path, text):
    dense = save_tiny(options.get("family", "llama"), tmp_path / "dense")
    options = {key: value for key, value in options.items() if key != "family"}
    for call in (lambda **o: plan(dense, **o), lambda **o: prune(dense, tmp_path / "out", **o)):
        with pytest.raises(UserError, match=message):
            call(calibration=text, **{**SMALL, **options})
    assert not list(tmp_path.glob(".out*"))


def test_a_plan_counts_the_adapter(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    sizes = [plan(dense, calibration=text, compensate=rank, **SMALL)["write_bytes"] for rank in (0, 4)]
    prune(dense, tmp_path / "out", calibration=text, compensate=4, solver="wanda", **SMALL)
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert sizes[1] - sizes[0] == sum(tensor.nbytes for tensor in saved.values())
