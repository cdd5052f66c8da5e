"""Channels in another order: the dense model computes the same, and an n:m pattern keeps more of it."""

import itertools
import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.pattern import NM
from llmsparse.permutation import arrange, deal, exchange, retained
from llmsparse.plan import plan, prepare
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.prune import prune
from llmsparse.recipe import Recipe
from llmsparse.render import prune as shown
from llmsparse.report import Phases
from llmsparse.solvers.sparsegpt import SparseGPT
from llmsparse.stages import staged
from llmsparse.statistics import Gram
from llmsparse.work import Work
from llmsparse.writer import Writer
from tests.pruned import SMALL, hashes, read_report, tensors
from tests.solvers.layer import Layer
from tests.solvers.layer import layer as random_layer
from tests.tiny import FAMILIES, VOCAB, save_tiny

CONSUMERS = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "dense_4h_to_h", "w2")


def permuted(source, out, **options):
    """The folder that the stage writes of ``source``, and what it tells."""
    job = prepare(source, Recipe.of(None, {"pattern": "2:4", "permute": True, **SMALL, **options}))
    work = Work(job, Writer(job.checkpoint, out), Processes.alone(), Phases(), Quiet())
    after = staged(work, job.calibrate(), resume=False)
    return after.job.checkpoint.folder, after.stages["permutation"]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def kept(scores, n, m):
    """The n largest of each m, summed by a plain loop."""
    groups = [row[i : i + m] for row in scores.tolist() for i in range(0, len(row), m)]
    return sum(sum(sorted(group, reverse=True)[:n]) for group in groups)


def partitions(items, m):
    """Every way to part ``items`` into groups of m."""
    if not items:
        yield []
        return
    for others in itertools.combinations(items[1:], m - 1):
        left = [i for i in items[1:] if i not in others]
        yield from ([[items[0], *others], *rest] for rest in partitions(left, m))


def seen(inputs, name, module, given, output):
    """A forward hook."""
    inputs[name] = given[0].flatten(0, 1)


def interrupt(*arguments):
    raise KeyboardInterrupt


def scores_of(rows, columns, seed):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_permuted_model_computes_the_same_and_every_consumer_keeps_no_less(family, tmp_path, text):
    source = save_tiny(family, tmp_path / "source")
    folder, told = permuted(source, tmp_path / "out", calibration=text)
    expected = logits(source)
    torch.testing.assert_close(logits(folder), expected, rtol=0, atol=1e-9)
    assert expected.abs().max() > 0.1
    before, after = tensors(source), tensors(folder)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    names = {k for k in before if k.removesuffix(".weight").rpartition(".")[2] in CONSUMERS and "weight" in k}
    assert {w["name"] for w in told["weights"]} == names and told["skipped"] == []
    assert all(w["before"] <= w["after"] <= 1 for w in told["weights"])
    assert sum(w["before"] < w["after"] for w in told["weights"]) >= 0.9 * len(names)
    moved = {k for k in names if not torch.equal(before[k], after[k])}
    assert len(moved) >= 0.9 * len(names)
    for name in before:  # the same numbers in other places
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)


def test_what_is_told_is_what_the_pattern_keeps_of_the_squares(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    folder, told = permuted(source, tmp_path / "out", calibration=text)
    for where, when in ((source, "before"), (folder, "after")):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float64).eval().requires_grad_(False)
        inputs = {}
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.register_forward_hook(partial(seen, inputs, f"{name}.weight"))
        windows = prepare(source, Recipe.of(None, {**SMALL, "calibration": text})).calibrate().windows
        model(input_ids=windows, use_cache=False)
        for record in told["weights"]:
            weight = dict(model.named_parameters())[record["name"]]
            scores = weight.square() * inputs[record["name"]].square().mean(0)
            assert kept(scores, 2, 4) / float(scores.sum()) == pytest.approx(record[when], rel=1e-5)


@pytest.mark.parametrize(("columns", "n", "m"), [(8, 2, 4), (8, 1, 4), (8, 3, 4), (12, 2, 4)])
def test_an_order_is_between_the_one_given_and_the_best_of_all(columns, n, m):
    reached, every = [], torch.tensor([*partitions(list(range(columns)), m)])
    for seed in range(12):
        scores = scores_of(5, columns, seed)
        found = arrange(scores, NM(n, m))
        assert found.order.sort().values.tolist() == list(range(columns))
        assert found.before == pytest.approx(kept(scores, n, m))
        assert found.after == pytest.approx(kept(scores[:, found.order], n, m))
        best = float(scores[:, every].sort(-1).values[..., m - n :].sum((0, 2, 3)).max())
        assert found.before <= found.after <= best + 1e-9
        reached.append(1.0 if best == found.before else (found.after - found.before) / (best - found.before))
    assert sum(reached) / len(reached) > 0.8


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_every_exchange_gains_what_it_says(n, m):
    scores = scores_of(7, 48, 0)
    order = torch.arange(48).view(-1, m)
    gains = []
    for place in [*range(m)] * 2:
        before = kept(scores[:, order.flatten()], n, m)
        order, gain = exchange(scores.T.contiguous(), order, place, n)
        assert kept(scores[:, order.flatten()], n, m) - before == pytest.approx(gain, abs=1e-9)
        gains.append(gain)
    assert min(gains) >= 0 and gains[0] > 0
    assert order.flatten().sort().values.tolist() == list(range(48))


def test_strong_columns_are_dealt_to_and_fro():
    strength = torch.tensor([10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5, 0.2])
    assert deal(strength, 4).tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


def test_an_order_that_cannot_be_better_is_left_as_it_is():
    scores = torch.tensor([[3.0, 2, 0, 0, 0, 0, 2, 3]])
    found = arrange(scores, NM(2, 4))
    assert found.order.tolist() == list(range(8)) and found.before == found.after == 10
    assert retained(scores, torch.arange(8).view(2, 4), 2) == 10


def test_a_layer_with_strong_columns_side_by_side_is_pruned_with_less_error():
    plain = random_layer(48, 64, tokens=512)
    inputs = plain.inputs.clone()
    inputs[:, :12] *= 6  # three groups of nothing but strong columns
    dense = Layer(plain.weight, inputs)
    found = arrange(dense.weight.square() * dense.inputs.square().mean(0), NM(2, 4))
    ordered = Layer(dense.weight[:, found.order], dense.inputs[:, found.order])
    errors = []
    for each in (dense, ordered):
        gram = Gram.zeros(64, dtype=torch.float64)
        gram.update(each.inputs)
        errors.append(each.error(SparseGPT()(each.weight, gram, NM(2, 4)).weight))
    assert errors[1] < 0.6 * errors[0]


def test_what_would_change_the_model_is_left_as_it_is_and_told(tmp_path, text, monkeypatch):
    def with_gains(self, x):
        gains = torch.linspace(0.5, 1.5, self.intermediate_size, dtype=x.dtype, device=x.device)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * gains)

    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(LlamaMLP, "forward", with_gains)
    folder, told = permuted(source, tmp_path / "out", calibration=text)
    torch.testing.assert_close(logits(folder), logits(source), rtol=0, atol=1e-9)
    assert {w["name"].split(".")[-2] for w in told["weights"]} == {"o_proj"}
    assert [w["name"].split(".")[-2] for w in told["skipped"]] == ["down_proj"] * 3
    assert {w["reason"] for w in told["skipped"]} == {"the model does more between its weights"}
    before, after = tensors(source), tensors(folder)
    assert all(torch.equal(before[k], after[k]) for k in before if ".mlp." in k)


def test_heads_that_a_group_does_not_fit_into_are_skipped(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")  # heads of 8
    folder, told = permuted(source, tmp_path / "out", calibration=text, pattern="8:16")
    torch.testing.assert_close(logits(folder), logits(source), rtol=0, atol=1e-9)
    assert {w["name"].split(".")[-2] for w in told["weights"]} == {"down_proj"}
    reasons = {w["name"].split(".")[-2]: w["reason"] for w in told["skipped"]}
    assert list(reasons) == ["o_proj"] and "16 consecutive inputs do not lie inside 8" in reasons["o_proj"]


def test_only_weights_with_an_nm_pattern_are_considered(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    _, told = permuted(source, tmp_path / "out", calibration=text, pattern=["50%", r"\.1\.mlp=1:4"])
    assert [w["name"] for w in told["weights"]] == ["model.layers.1.mlp.down_proj.weight"]
    assert told["skipped"] == []


def test_a_solver_without_data_permutes_by_the_weights_alone(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    folder, told = permuted(source, tmp_path / "out", solver="magnitude")
    torch.testing.assert_close(logits(folder), logits(source), rtol=0, atol=1e-9)
    for record in told["weights"]:
        scores = tensors(folder)[record["name"]].double().square()
        assert kept(scores, 2, 4) / float(scores.sum()) == pytest.approx(record["after"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permuted_run_is_a_run_of_the_permuted_model_under_the_names_of_the_original(dtype, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", dtype=dtype, max_shard_size="40KB")
    report = prune(source, tmp_path / "out", calibration=text, pattern="2:4", permute=True, **SMALL)
    folder, told = permuted(source, tmp_path / "other", calibration=text)
    prune(folder, tmp_path / "expected", calibration=text, pattern="2:4", **SMALL)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    assert report["permutation"] == json.loads(json.dumps(told))
    assert report["model"] == str(source) and report["source_files"] == Checkpoint.open(source).sha256()
    assert report["options"]["permute"] is True
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json", "report.json"}
    assert not list(tmp_path.glob(".out*"))
    assert "channels reordered for 6 weights: their patterns keep 9" in str(shown(report).renderables)


def test_pruning_loses_less_after_permuting(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    given = {"calibration": text, "pattern": "2:4", "solver": "wanda", **SMALL}
    plain = prune(source, tmp_path / "plain", **given)
    ordered = prune(source, tmp_path / "ordered", permute=True, **given)

    def error(report, name):
        return sum(w["error"] for w in report["weights"] if name in w["name"])

    for name in ("o_proj", "down_proj"):
        assert error(ordered, name) < error(plain, name)


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_interrupted_run_resumes_to_identical_bytes(blocks, tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    given = {"calibration": text, "pattern": "2:4", "permute": True, **SMALL}
    prune(source, tmp_path / "expected", **given)
    real, done = Writer.finish_block, []

    def cut(self, block, record):
        real(self, block, record)
        done.append(block)
        if len(done) == blocks:  # the first of those that are permuted, or of those that are pruned
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish_block", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="an interrupted run for .* continue it with --resume, or discard it"):
        prune(source, tmp_path / "out", **given)
    with pytest.raises(UserError, match=r"differ from the interrupted one: .*seed: was 0, is 1"):
        prune(source, tmp_path / "out", resume=True, seed=1, **given)
    report = prune(source, tmp_path / "out", resume=True, **given)
    assert len(done) == 6  # three of each, none twice
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    assert report["permutation"] == read_report(tmp_path / "expected")["permutation"]
    assert not list(tmp_path.glob(".out*"))


def test_a_finished_stage_is_thrown_away_only_when_asked(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    given = {"calibration": text, "pattern": "2:4", "permute": True, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(Work, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", **given)
    assert (tmp_path / ".out.llmsparse-permutation" / "report.json").exists()
    prune(source, tmp_path / "out", overwrite=True, **{**given, "seed": 1})
    assert read_report(tmp_path / "out")["options"]["seed"] == 1 and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "50%"}, "--permute goes with an n:m pattern such as 2:4; in 50% any input may be kept"),
        (
            {"pattern": "2:4", "skip": ["o_proj", "down_proj"]},
            "can reorder the inputs of no weight; of .*q_proj",
        ),
        (
            {"pattern": "16:32", "skip": ["down_proj"]},
            "o_proj.weight: 32 consecutive inputs do not lie inside 8",
        ),
    ],
)
def test_plan_and_prune_refuse_a_permutation_of_nothing(options, message, tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    for call in (lambda **o: plan(source, **o), lambda **o: prune(source, tmp_path / "out", **o)):
        with pytest.raises(UserError, match=message):
            call(permute=True, **SMALL, **options)
    assert not list(tmp_path.glob(".out*"))


def test_groups_that_are_given_as_they_would_be_dealt_lead_to_one_order_whatever_rounding_says():
    strongest_first = scores_of(40, 16, 0) * torch.arange(16, 0, -1.0)
    strongest_first = strongest_first[:, strongest_first.sum(0).argsort(descending=True)]
    dealt = deal(strongest_first.sum(0), 4)
    scores = strongest_first[:, dealt.flip(0).flatten()]  # the same groups, the last one first
    found = arrange(scores, NM(2, 4))
    for seed in range(5):
        noise = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(arrange(scores * (1 + 1e-9 * noise), NM(2, 4)).order, found.order)
