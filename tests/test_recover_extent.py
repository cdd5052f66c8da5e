"""Which weights recover trains, and under which masks: chains of runs, few zeros, codes, dropout, processes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.errors import UserError
from llmsparse.extent import counted
from llmsparse.gridfile import GridFile
from llmsparse.parentage import ancestry
from llmsparse.pattern import NM, Unstructured
from llmsparse.processes import Processes
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.recover import recompute, recover
from llmsparse.training import Training
from tests.pruned import SMALL, read_report, tensors
from tests.tiny import VOCAB, save_tiny

LITTLE = {
    "tokens": "4k",
    "sequence_length": 32,
    "evaluations": 2,
    "lr": 2e-3,
    "dtype": "float32",
    "device": "cpu",
}
WILD = {**LITTLE, "masks": "splice", "splice_every": 2, "splice_until": 1.0, "lr": 1e-2}


def blocks_of(folder):
    return {k: v for k, v in tensors(folder).items() if k.endswith("proj.weight")}


def most_kept(weight, m):
    return int((weight != 0).reshape(-1, m).sum(1).max())


@pytest.mark.parametrize("made", ["values", "quantised", "no report"])
def test_two_of_four_stays_so_however_it_was_made(made, tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    given = {"calibration": text, **SMALL}
    values = {"values": "int4:32"} if made == "values" else {}
    prune(dense, tmp_path / "sparse", pattern="2:4", **values, **given)
    if made == "quantised":
        quantize(tmp_path / "sparse", tmp_path / "again", values="int4:32", **given)
        shutil.rmtree(tmp_path / "sparse")
        (tmp_path / "again").rename(tmp_path / "sparse")
    if made == "no report":
        (tmp_path / "sparse" / "report.json").unlink()
    recover(tmp_path / "sparse", tmp_path / "out", data=text, teacher=str(dense), **WILD)
    before, after = blocks_of(tmp_path / "sparse"), blocks_of(tmp_path / "out")
    assert any(not torch.equal(before[k] == 0, after[k] == 0) for k in before)  # it did splice
    assert max(most_kept(weight, 4) for weight in after.values()) == 2


def test_splicing_a_mask_that_is_not_of_its_pattern_is_refused(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="50%", solver="magnitude")
    report = read_report(tmp_path / "sparse")
    report["weights"][0]["pattern"] = "2:4"
    (tmp_path / "sparse" / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="q_proj.weight was pruned to 2:4, and some of its groups keep more"):
        recover(tmp_path / "sparse", tmp_path / "out", data=text, **WILD)


def test_the_pattern_of_a_mask_is_found_where_no_report_names_it():
    score = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    for n, m in ((2, 4), (1, 4), (4, 8), (8, 16)):
        assert counted("w", NM(n, m).select(score), None) == NM(n, m)
        assert counted("w", NM(n, m).select(score), "as-is") == NM(n, m)
    rows = Unstructured(0.5, "row").select(score)
    assert counted("w", rows, None) == Unstructured(0.5, "row")
    layer = Unstructured(0.3, "layer").select(score)
    found = counted("w", layer, "30%")
    assert found.scope == "layer" and found.allows(layer)


def test_a_weight_with_few_zeros_keeps_them(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern=["50%", "down_proj=15%"], solver="magnitude")
    report = recover(tmp_path / "sparse", tmp_path / "out", data=text, **LITTLE)
    before, after = blocks_of(tmp_path / "sparse"), blocks_of(tmp_path / "out")
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0)
    few = {row["name"]: row["sparsity"] for row in report["weights"] if "down_proj" in row["name"]}
    assert len(few) == 3 and all(share == pytest.approx(0.15, abs=0.01) for share in few.values())


def test_weights_that_have_no_codes_get_none(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    given = {"calibration": text, **SMALL}
    prune(
        dense,
        tmp_path / "sparse",
        pattern="50%",
        values="int4:32",
        skip=["down_proj"],
        embeddings="keep",
        **given,
    )
    recover(tmp_path / "sparse", tmp_path / "out", data=text, **LITTLE)
    names = [set(GridFile.open(tmp_path / folder).names) for folder in ("sparse", "out")]
    assert names[0] == names[1] and not any("down_proj" in name for name in names[0])
    before, after = blocks_of(tmp_path / "sparse"), blocks_of(tmp_path / "out")
    assert not torch.equal(
        before["model.layers.0.mlp.down_proj.weight"], after["model.layers.0.mlp.down_proj.weight"]
    )


def test_zeros_that_rounding_made_are_no_mask_in_the_next_run(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude", skip=["down_proj"])
    report = recover(tmp_path / "sparse", tmp_path / "out", data=text, values="int4:32", **LITTLE)
    sparsity = {row["name"]: row["sparsity"] for row in report["weights"]}
    assert {share for name, share in sparsity.items() if "down_proj" in name} == {0.0}
    assert {share for name, share in sparsity.items() if "down_proj" not in name} == {0.5}
    recover(tmp_path / "out", tmp_path / "again", data=text, **LITTLE)
    before, after = blocks_of(tmp_path / "out"), blocks_of(tmp_path / "again")
    for name, weight in before.items():
        came = bool((after[name][weight == 0] != 0).any())
        assert came == ("down_proj" in name) and bool((weight == 0).any())


def test_a_dense_model_with_codes_is_trained_on_its_grid(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    quantize(dense, tmp_path / "coarse", values="int4:32", calibration=text, **SMALL)
    report = recover(tmp_path / "coarse", tmp_path / "out", data=text, **LITTLE)
    assert report["recovery"]["kl"]["after"] < 0.8 * report["recovery"]["kl"]["before"]
    codes, stored = GridFile.open(tmp_path / "out"), tensors(tmp_path / "out")
    for name in codes.names:
        codes.check(name, stored[name])


def test_a_number_outside_the_mask_is_never_written(tmp_path, text, monkeypatch):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude")
    real = Training.best

    def filled(self):
        values, masks = real(self)
        values["model.layers.1.mlp.up_proj.weight"] += 0.01
        return values, masks

    monkeypatch.setattr(Training, "best", filled)
    with pytest.raises(RuntimeError, match=r"1.mlp.up_proj.weight: pruned weights are not \+0.0"):
        recover(tmp_path / "sparse", tmp_path / "out", data=text, **LITTLE)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's compiler, by torchao's step, warns of itself
def test_codes_are_right_in_a_float32_checkpoint_with_16_bit_masters(tmp_path, text):
    pytest.importorskip("torchao")
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude")
    options = {**LITTLE, "dtype": "auto", "tokens": "128", "evaluations": 1}
    eight = {"optimizer": "adamw8bit", "master": "bfloat16", "values": "int8"}
    recover(tmp_path / "sparse", tmp_path / "out", data=text, **options, **eight)
    codes, stored = GridFile.open(tmp_path / "out"), tensors(tmp_path / "out")
    for name in codes.names:
        codes.check(name, stored[name])


def test_the_teacher_is_the_first_model_of_a_chain_of_runs(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    given = {"calibration": text, **SMALL}
    prune(dense, tmp_path / "short", pattern="depth:1", **given)
    prune(tmp_path / "short", tmp_path / "sparse", pattern="2:4", solver="wanda", **given)
    quantize(tmp_path / "sparse", tmp_path / "coarse", values="int8", **given)
    found = ancestry(tmp_path / "coarse")
    assert found.model == str(dense) and [section["pattern"] for section in found.smaller] == ["depth:1"]
    for folder, options in (("coarse", {}), ("sparse", {"teacher": str(dense), "hidden": 0.1})):
        report = recover(tmp_path / folder, tmp_path / f"{folder}-out", data=text, **options, **LITTLE)
        assert report["recovery"]["teacher"] == report["model"] == str(dense)
        assert report["smaller"][0]["pattern"] == "depth:1"
        assert report["recovery"]["kl"]["after"] < report["recovery"]["kl"]["before"]
    again = recover(tmp_path / "coarse-out", tmp_path / "again", data=text, **LITTLE)
    assert again["recovery"]["teacher"] == str(dense)
    short = str(tmp_path / "short")  # as many blocks: none was dropped between the two
    beside = recover(tmp_path / "sparse", tmp_path / "beside", data=text, teacher=short, hidden=0.1, **LITTLE)
    assert beside["recovery"]["kl"]["after"] < beside["recovery"]["kl"]["before"]
    wide = AutoModelForCausalLM.from_pretrained(dense).config
    wide.hidden_size, wide.head_dim = 64, 16
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="hidden states have 32 channels, the teacher's 64"):
        recover(tmp_path / "sparse", tmp_path / "no", data=text, teacher=str(tmp_path / "wide"), **LITTLE)


def test_a_report_that_names_its_own_folder_leads_nowhere(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "out", pattern="2:4", solver="magnitude")
    shutil.rmtree(dense)
    (tmp_path / "out").rename(dense)
    with pytest.raises(UserError, match="has no report that names its dense model; give it with --teacher"):
        recover(dense, tmp_path / "out", data=text, **LITTLE)


def test_a_teacher_that_is_gone_is_told_with_the_option(tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude")
    dense.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the report of .*sparse names .*dense: .*; give it with --teacher"):
        recover(tmp_path / "sparse", tmp_path / "out", data=text, **LITTLE)


def test_computing_again_turns_no_dropout_on(tmp_path, text):
    dense = save_tiny("opt", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "dropout": 0.3, "attention_dropout": 0.3}))
    prune(dense, tmp_path / "sparse", pattern="50%", solver="magnitude")
    found = [
        recover(tmp_path / "sparse", tmp_path / str(on), data=text, checkpointing=on, **LITTLE)["recovery"][
            "curve"
        ]
        for on in (False, True)
    ]
    held = [[row["held_out"] for row in curve] for curve in found]
    assert held[0] == pytest.approx(held[1], rel=1e-5)


def test_blocks_are_computed_again(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "dense")).eval()
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    for times in (1, 2):
        calls.clear()
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        assert len(calls) == times
        recompute(model)


def test_a_step_averages_the_gradients_of_two_processes(tmp_path, text, monkeypatch):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude")
    seen, rank = [], [0, 1]

    def step(self):
        grads = []
        for count, each in ((1, 0), (2, 0), (2, 1)):
            self.processes.count, self.processes.rank = count, rank[each]
            self.student.train(True)
            for rows in self._batches(1):
                self._backward(rows)
            self.student.train(False)
            self.student.take()
            grads.append([master.grad.clone() for master in self.student.masters])
        seen.append(grads)
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_step", step)
    monkeypatch.setattr(Processes, "average", lambda self, tensor: tensor)
    with pytest.raises(KeyboardInterrupt):
        recover(tmp_path / "sparse", tmp_path / "out", data=text, hidden=0.5, **LITTLE)
    alone, first, second = seen[0]
    for whole, a, b in zip(alone, first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, whole, rtol=1e-4, atol=1e-7)
