"""Smaller models: what is written computes what was meant."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.drop import _divergences
from llmsparse.errors import UserError
from llmsparse.prune import prune
from tests import tiny
from tests.pruned import SMALL, hashes, tensors
from tests.wide import WIDE, WIDTH_KEYS, logits, save, windows

NARROW = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]  # their heads can go too
WHOLE = ["opt", "gpt2", "gpt_neox", "falcon"]  # their classes know no fewer heads


@pytest.mark.parametrize("family", [*NARROW, *WHOLE])
def test_the_result_is_a_stock_model_with_the_smaller_config(family, tmp_path, text, monkeypatch):
    source, out = save(family, tmp_path / "source", monkeypatch), tmp_path / "out"
    before = hashes(source)
    report = prune(source, out, pattern="width:50%", calibration=text, **SMALL)
    assert hashes(source) == before
    model = AutoModelForCausalLM.from_pretrained(out)  # warnings are errors, and so are other shapes
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert type(model) is type(dense)
    AutoTokenizer.from_pretrained(out)
    assert getattr(model.config, WIDTH_KEYS.get(family, "intermediate_size")) == 64
    heads = (2, 1) if family in NARROW else (4, None)
    assert model.config.num_attention_heads == heads[0]
    if family in NARROW:
        assert model.config.num_key_value_heads == 1 and model.config.head_dim == 8
    section = report["smaller"][0]
    assert section["mlp_channels"] == [WIDE, 64] and section["attention_heads"] == [4, heads[0]]
    assert (section["note"] is None) == (family in NARROW)
    counted = [sum(t.numel() for t in tensors(folder).values()) for folder in (source, out)]
    assert section["parameters"] == counted
    assert {f.name for f in out.iterdir()} == {f.name for f in source.iterdir()} | {"report.json"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt", "gpt2"])
def test_it_computes_what_the_dense_model_does_with_those_inputs_zeroed_and_the_readers_solved_again(
    family, tmp_path, text, monkeypatch
):
    """An independent run in float64: hooks collect what each reader sees in the model as it is narrowed so far."""
    source, out = save(family, tmp_path / "source", monkeypatch), tmp_path / "out"
    report = prune(source, out, pattern="width:50%", calibration=text, **SMALL)
    ids = windows(source, text)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    small = tensors(out)
    for cut in report["smaller"][0]["cuts"]:
        module = model.get_submodule(cut["name"].removesuffix(".weight"))
        seen = []
        handle = module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        inputs = torch.cat(seen)
        weight = module.weight.data.T if family == "gpt2" else module.weight.data  # (out, in)
        kept = kept_inputs(cut, weight, inputs)
        damping = cut["damping"] * inputs.square().mean()
        rows = torch.cat(
            [inputs, damping.sqrt() * len(inputs) ** 0.5 * torch.eye(inputs.shape[1], dtype=inputs.dtype)]
        )
        expected = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
        stored = small[cut["name"]].double()
        torch.testing.assert_close(stored.T if family == "gpt2" else stored, expected, rtol=1e-3, atol=1e-4)
        lost = (inputs[:, kept] @ expected.T - inputs @ weight.T).square().sum()
        assert cut["error"] == pytest.approx(float(lost / (inputs @ weight.T).square().sum()), rel=1e-2)
        weight.zero_()
        weight[:, kept] = stored.T if family == "gpt2" else stored
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits(out, ids), expected, rtol=1e-9, atol=1e-9)


def kept_inputs(cut, weight, inputs):
    """The inputs of the groups that stay, found anew by removing the group that costs least, in float64."""
    count, left = cut["groups"]
    gram = inputs.T @ inputs / len(inputs)
    gram += cut["damping"] * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    groups = torch.arange(len(gram)).view(count, -1)
    alive = list(range(count))
    while len(alive) > left:
        inside = groups[alive].flatten()
        inverse = torch.linalg.inv(gram[inside][:, inside])
        now = (weight @ gram[:, inside]) @ inverse  # the best that these inputs can do
        costs = []
        for place in range(len(alive)):
            part = torch.arange(place * groups.shape[1], (place + 1) * groups.shape[1])
            mine = now[:, part]
            costs.append(float(torch.trace(mine @ torch.linalg.inv(inverse[part][:, part]) @ mine.T)))
        order = sorted(range(len(alive)), key=costs.__getitem__)
        batch = min(1 if "kept" in cut else 16, len(alive) - left)
        gone = {alive[place] for place in order[:batch]}
        alive = [group for group in alive if group not in gone]
    assert cut.get("kept", alive) == alive
    return groups[alive].flatten()


def test_dead_channels_and_heads_go_and_nothing_is_lost(tmp_path, text, monkeypatch):
    dead = torch.zeros(WIDE, dtype=torch.bool)
    dead[torch.randperm(WIDE, generator=torch.Generator().manual_seed(1))[:128]] = True

    def kill(parameters):
        for name, parameter in parameters.items():
            if "down_proj" in name:
                parameter[:, dead] = 0.0
            if "o_proj" in name:
                parameter[:, 16:] = 0.0  # the second key/value head with its queries

    source = save("llama", tmp_path / "source", monkeypatch, kill)
    report = prune(source, tmp_path / "out", pattern="width:50%", calibration=text, **SMALL)
    assert all(cut["error"] < 1e-9 for cut in report["smaller"][0]["cuts"])
    before, after = tensors(source), tensors(tmp_path / "out")
    for name, tensor in after.items():
        kept = before[name]
        kept = kept[:, ~dead] if "down_proj" in name else kept[~dead] if "mlp" in name else kept
        kept = kept[:, :16] if "o_proj" in name else kept[: tensor.shape[0]] if "self_attn" in name else kept
        torch.testing.assert_close(tensor, kept, rtol=1e-5, atol=1e-6)
    ids = windows(source, text)
    torch.testing.assert_close(logits(tmp_path / "out", ids), logits(source, ids), rtol=1e-4, atol=1e-4)


def test_channels_whose_inputs_are_always_zero_go_first(tmp_path, text, monkeypatch):
    def silence(parameters):
        for name, parameter in parameters.items():
            if "up_proj" in name:
                parameter[64:] = 0.0

    source = save("llama", tmp_path / "source", monkeypatch, silence)
    report = prune(source, tmp_path / "out", pattern="width:50%", calibration=text, **SMALL)
    errors = [cut["error"] for cut in report["smaller"][0]["cuts"] if "mlp" in cut["name"]]
    assert max(errors) < 1e-9
    before, after = tensors(source), tensors(tmp_path / "out")
    name = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(after[name], before[name][:64])


def test_flap_and_biases_are_options_of_a_run(tmp_path, text, monkeypatch):
    source, out = save("opt", tmp_path / "source", monkeypatch), tmp_path / "out"
    asked = ["width.score=flap", "width.compensation=bias"]
    report = prune(source, out, pattern="width:50%", calibration=text, set=asked, **SMALL)
    assert (report["smaller"][0]["score"], report["smaller"][0]["compensation"]) == ("flap", "bias")
    ids, model = windows(source, text), AutoModelForCausalLM.from_pretrained(source)
    layer, seen = model.model.decoder.layers[0], []
    layer.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids)
    inputs = torch.cat(seen)
    scores = inputs.var(0) * layer.fc2.weight.square().sum(0)
    kept = scores.argsort(descending=True)[:64].sort().values
    after = tensors(out)
    path = "model.decoder.layers.0."
    assert torch.equal(after[path + "fc1.weight"], layer.fc1.weight.data[kept])
    assert torch.equal(after[path + "fc1.bias"], layer.fc1.bias.data[kept])
    assert torch.equal(after[path + "fc2.weight"], layer.fc2.weight.data[:, kept])
    gone = torch.ones(WIDE, dtype=torch.bool)
    gone[kept] = False
    expected = layer.fc2.bias + layer.fc2.weight[:, gone] @ inputs[:, gone].mean(0)
    torch.testing.assert_close(after[path + "fc2.bias"], expected.data, rtol=1e-4, atol=1e-4)


# ---- blocks


@torch.no_grad()
def without(source, gone, ids):
    """Logits of the model with some blocks taken out of its list."""
    model = AutoModelForCausalLM.from_pretrained(source)
    owner = next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))
    owner.layers = torch.nn.ModuleList(layer for i, layer in enumerate(owner.layers) if i not in gone)
    model.config.num_hidden_layers = len(owner.layers)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in gone]
    return model(input_ids=ids, use_cache=False).logits


def divergence(expected, found):
    """KL in nats, token by token."""
    p, q = expected.double().softmax(-1), found.double().softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_the_blocks_that_go_are_those_that_trying_each_finds(family, tmp_path, text):
    source, out = tiny.save_tiny(family, tmp_path / "source", seed=3), tmp_path / "out"
    count = len(AutoModelForCausalLM.from_pretrained(source).model.layers)
    drop = count - 1
    report = prune(source, out, pattern=f"depth:{drop}", calibration=text, set=["depth.windows=4"], **SMALL)
    ids = windows(source, text)[:4]
    dense, gone, found = without(source, [], ids), [], []
    for _ in range(drop):
        kls = {i: divergence(dense, without(source, [*gone, i], ids)) for i in range(count) if i not in gone}
        best = min(kls, key=kls.__getitem__)
        gone.append(best)
        found.append(kls[best])
    section = report["smaller"][0]
    assert [block["name"] for block in section["dropped"]] == [f"model.layers.{i}" for i in gone]
    assert [block["kl"] for block in section["dropped"]] == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert section["blocks"] == [count, 1] and section["windows"] == 4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 1
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, without(source, gone, ids))


def test_the_four_best_on_a_quarter_of_the_windows_are_tried_on_all(tmp_path, text, monkeypatch):
    config = tiny.FAMILIES["llama"]()
    config.num_hidden_layers = 7
    monkeypatch.setitem(tiny.FAMILIES, "llama", lambda: config)
    source = tiny.save_tiny("llama", tmp_path / "source", seed=3)
    given = {"calibration": text, "set": ["depth.windows=6"], **SMALL}
    report = prune(source, tmp_path / "out", pattern="depth:2", **given)
    ids = windows(source, text)[:6]
    gone = []
    for block in report["smaller"][0]["dropped"]:
        tried = {
            i: [
                divergence(without(source, [], part), without(source, [*gone, i], part))
                for part in (ids[:2], ids)
            ]
            for i in range(7)
            if i not in gone
        }
        finalists = sorted(tried, key=lambda i: tried[i][0])[:4]
        best = min(finalists, key=lambda i: tried[i][1])
        assert block["name"] == f"model.layers.{best}"
        assert block["kl"] == pytest.approx(tried[best][1], rel=1e-4)
        gone.append(best)


class Compared:
    """Stands in for a stream: ``logits`` are the states, (windows, length, vocabulary)."""

    windows = torch.zeros(4, 3)
    skeleton = SimpleNamespace(model=SimpleNamespace(tie_weights=lambda: None))

    def outside(self, model):
        return nullcontext()

    def logits(self, window, states):
        return states[window][None]


@pytest.mark.parametrize("window", [0, 2])
def test_logits_that_are_not_finite_are_refused(window):
    whole = torch.randn(4, 3, 11, generator=torch.Generator().manual_seed(0))
    model = whole.clone()
    model[window, 1, 4] = float("nan")
    with pytest.raises(UserError, match="not finite on the calibration text"):
        _divergences(Compared(), whole, {0: whole, 1: model, 2: whole})


def test_what_is_told_of_each_block_is_cut_with_the_blocks(tmp_path, text):
    source, out = tiny.save_tiny("gemma3_text", tmp_path / "source"), tmp_path / "out"
    report = prune(source, out, pattern="depth:1", calibration=text, **SMALL)
    kinds = AutoModelForCausalLM.from_pretrained(source).config.layer_types
    gone = int(report["smaller"][0]["dropped"][0]["name"].rpartition(".")[2])
    left = json.loads((out / "config.json").read_text())["layer_types"]
    assert left == [kind for i, kind in enumerate(kinds) if i != gone]
