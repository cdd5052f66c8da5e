"""Smaller models in a run: with the rest of it, refused, and interrupted."""

import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from llmsparse import shrink
from llmsparse.card import card
from llmsparse.cuts import Producer
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.inspect import inspect
from llmsparse.narrow import NarrowDesk
from llmsparse.page import report as page
from llmsparse.pattern import parse
from llmsparse.plan import plan
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.render import SHOW
from llmsparse.shrinking import Depth, Width
from llmsparse.work import Work
from tests import tiny
from tests.pruned import SMALL, hashes, read_report
from tests.tokenizers_tiny import cut_as_gpt2
from tests.wide import WIDE, save


def test_a_narrower_model_is_pruned_and_rounded_as_any_other(tmp_path, text, monkeypatch):
    source, out = save("llama", tmp_path / "source", monkeypatch), tmp_path / "out"
    given = {"calibration": text, **SMALL}
    report = prune(source, out, pattern=["width:50%", "depth:1", "2:4"], values="int8", **given)
    prune(source, tmp_path / "blocks", pattern="depth:1", **given)
    prune(tmp_path / "blocks", tmp_path / "narrow", pattern="width:50%", **given)
    prune(tmp_path / "narrow", tmp_path / "expected", pattern="2:4", values="int8", **given)
    assert hashes(out) == hashes(tmp_path / "expected")
    assert report == {**read_report(out)} and report["model"] == str(source)
    assert report["source_files"] == read_report(tmp_path / "blocks")["source_files"]
    assert [section["pattern"] for section in report["smaller"]] == ["depth:1", "width:50%"]
    assert report["options"]["pattern"] == ["width:50%", "depth:1", "2:4"]
    assert {"depth:1", "width:50%", "solve"} <= report["seconds"].keys()
    assert all(w["pattern"] == "2:4" and w["sparsity"] == 0.5 for w in report["weights"])
    found = {w["name"]: w["pattern"] for w in inspect(out)["weights"]}
    assert found["model.layers.1.mlp.down_proj.weight"] == "2:4"
    assert not list(tmp_path.glob(".*"))


def test_values_alone_round_the_narrower_model_as_it_is(tmp_path, text, monkeypatch):
    source = save("llama", tmp_path / "source", monkeypatch)
    given = {"calibration": text, **SMALL}
    prune(source, tmp_path / "out", pattern="width:50%", values="int4:32", skip=["o_proj"], **given)
    prune(source, tmp_path / "narrow", pattern="width:50%", **given)
    quantize(tmp_path / "narrow", tmp_path / "expected", values="int4:32", skip=["o_proj"], **given)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_a_16_bit_checkpoint_in_shards_keeps_its_dtype_and_its_files(tmp_path, text, monkeypatch):
    config = tiny.FAMILIES["qwen3"]()
    config.intermediate_size = WIDE
    monkeypatch.setitem(tiny.FAMILIES, "qwen3", lambda: config)
    source = tiny.save_tiny("qwen3", tmp_path / "source", dtype=torch.bfloat16, max_shard_size="40KB")
    prune(source, tmp_path / "out", pattern=["width:50%", "depth:1"], calibration=text, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_the_plan_is_of_the_smaller_model(tmp_path, text, monkeypatch):
    source = save("llama", tmp_path / "source", monkeypatch)
    options = {"pattern": ["depth:1", "width:50%", "2:4"], "calibration": text, **SMALL}
    planned, done = plan(source, **options), prune(source, tmp_path / "out", **options)
    assert [w["shape"] for w in planned["weights"]] == [w["shape"] for w in done["weights"]]
    assert planned["blocks"] == 2 and planned["coverage"] == done["coverage"]
    assert plan(source, **{**options, "pattern": ["width:50%"]})["weights"] == []


def test_every_reader_of_a_report_takes_one_without_pruned_weights(tmp_path, text, monkeypatch):
    source, out = save("llama", tmp_path / "source", monkeypatch), tmp_path / "out"
    report = prune(source, out, pattern="width:50%", calibration=text, **SMALL)
    console = Console(width=200, record=True)
    console.print(SHOW["prune"](report))
    shown = console.export_text()
    assert "width:50%: MLP channels 192 to 64, heads 4 to 2, key/value heads 2 to 1" in shown
    assert "pruned weights" not in shown
    made = card(out)["card"]
    assert (
        "made smaller by `width:50%`" in made
        and "- sparse" not in made
        and "sparsegpt" not in made.split("---")[1]
    )
    page([out], markdown=tmp_path / "page.md")
    assert "MLP channels 192 to 64" in (tmp_path / "page.md").read_text()


def test_llama_cpps_file_has_the_smaller_sizes(tmp_path, text, monkeypatch):
    gguf = pytest.importorskip("gguf")
    source, out = cut_as_gpt2(save("llama", tmp_path / "source", monkeypatch)), tmp_path / "out"
    prune(source, out, pattern=["width:50%", "depth:1"], calibration=text, **SMALL)
    export(out, tmp_path / "gguf", format="gguf", values="fp16")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    found = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    sizes = {
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
    }
    sizes |= {"attention.key_length": 8, "attention.value_length": 8, "embedding_length": 32}
    assert {name: found[f"llama.{name}"] for name in sizes} == sizes


def test_where_the_class_refuses_a_number_of_heads_more_stay_and_why_is_said(tmp_path, text, monkeypatch):
    """llama wants a hidden size that is a multiple of the heads: 7 and 9 do not divide 40, 8 does."""
    sizes = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 10, "head_dim": 8}
    source = save("llama", tmp_path / "source", monkeypatch, **sizes)
    for pattern, kept, said in [
        ("width:30%", 8, "8 instead of 7 of 10"),
        ("width:10%", 10, "all heads stay"),
    ]:
        report = prune(source, tmp_path / f"out-{kept}", pattern=pattern, calibration=text, **SMALL)
        section = report["smaller"][0]
        assert section["key_value_heads"] == section["attention_heads"] == [10, kept]
        assert said in section["note"] and "The hidden size (40) is not a multiple" in section["note"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{kept}")
        assert model.config.num_key_value_heads == kept


REFUSED = {
    "share_0": ("llama", {"pattern": "width:0%"}, "more than 0 % and less than 100 %"),
    "share_100": ("llama", {"pattern": "width:100%"}, "more than 0 % and less than 100 %"),
    "form": ("llama", {"pattern": "width:25"}, "width takes a percentage, e.g. width:25%, and depth"),
    "too_narrow": (
        "llama",
        {"pattern": "width:80%"},
        "would leave 38.4 of 192 MLP channels, and at least 64",
    ),
    "no_blocks": ("llama", {"pattern": "depth:0"}, "must drop at least one block"),
    "all_blocks": ("llama", {"pattern": "depth:3"}, "would leave none of 3 blocks"),
    "experts": ("mixtral", {"pattern": "width:25%"}, "mixtral is a mixture of experts, which width does not"),
    "regex": ("llama", {"pattern": "mlp=width:25%"}, "width:25% is of the whole model; give it alone"),
    "twice": ("llama", {"pattern": ["width:25%", "width:50%"]}, "give width once"),
    "set_alone": ("llama", {"set": ["width.score=flap"]}, "goes with a pattern such as --pattern width:25%"),
    "score": (
        "llama",
        {"pattern": "width:25%", "set": ["width.score=best"]},
        "width.score best is unknown; use obs or",
    ),
    "option": ("llama", {"pattern": "depth:1", "set": ["depth.window=1"]}, "no such option; known: windows"),
    "windows": ("llama", {"pattern": "depth:1", "set": ["depth.windows=0"]}, "depth.windows must be"),
    "damping": (
        "llama",
        {"pattern": "width:25%", "set": ["width.damping=0"]},
        "width.damping must be positive",
    ),
    "batch": (
        "llama",
        {"pattern": "width:25%", "set": ["width.batch=0"]},
        "width.batch must be a whole number",
    ),
    "bias": (
        "llama",
        {"pattern": "width:25%", "set": ["width.compensation=bias"]},
        "needs biases, and .*down_proj",
    ),
    "skip": ("llama", {"pattern": "width:25%", "skip": ["mlp"]}, "--skip goes with a pattern of weights"),
    "solver_option": (
        "llama",
        {"pattern": "width:25%", "set": ["damping=0.1"]},
        "--set damping goes with a pattern of weights",
    ),
    "later": ("llama", {"pattern": ["width:25%", "3:7"]}, "needs in_features divisible by 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(case, tmp_path, text, monkeypatch):
    family, options, message = REFUSED[case]
    source = save(family, tmp_path / "source", monkeypatch)
    given = {"calibration": text, **SMALL, **options}
    with pytest.raises(UserError, match=message):
        plan(source, **given)
    with pytest.raises(UserError, match=message):
        prune(source, tmp_path / "out", **given)
    assert {f.name for f in tmp_path.iterdir()} == {"source", "text.txt"}


def test_a_layout_that_is_not_what_its_names_say_is_found_out(tmp_path, text, monkeypatch):
    """Here key and value heads are taken for groups in another order than the model's."""
    source = save("llama", tmp_path / "source", monkeypatch)
    honest = Producer.rows
    monkeypatch.setattr(Producer, "rows", lambda self, kept: honest(self, kept).flip(0))
    with pytest.raises(UserError, match="the model that was written computes something else than was meant"):
        prune(source, tmp_path / "out", pattern="width:50%", calibration=text, **SMALL)
    assert {f.name for f in tmp_path.iterdir()} == {"source", "text.txt"}


@pytest.mark.parametrize("text_of", ["width:25%", "depth:2"])
def test_patterns_are_read_and_written_back(text_of):
    assert str(parse(text_of)) == text_of
    assert parse("width:12.5%") == Width(0.125) and parse("depth:3") == Depth(3)


@pytest.mark.parametrize(("share", "channels", "heads"), [(0.25, 1152, 2), (0.5, 768, 2), (0.9, 128, 1)])
def test_what_stays_of_smollm2s_1536_channels_and_3_key_value_heads(share, channels, heads):
    assert (Width(share).channels(1536), Width(share).heads(3)) == (channels, heads)


def test_a_finished_step_is_used_again_on_resume_and_anything_else_done_anew(tmp_path, text, monkeypatch):
    source, out = save("llama", tmp_path / "source", monkeypatch), tmp_path / "out"
    options = {"pattern": ["width:50%", "2:4"], "calibration": text, **SMALL}
    prune(source, tmp_path / "expected", **options)
    real = Work.finish
    monkeypatch.setattr(Work, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(source, out, **options)
    monkeypatch.setattr(Work, "finish", real)
    between = tmp_path / ".out.llmsparse-width"
    assert between.is_dir() and not out.exists()
    steps, narrow = [], shrink.narrow
    monkeypatch.setattr(shrink, "narrow", lambda *given: steps.append(1) or narrow(*given))
    shutil.copytree(tmp_path / ".out.llmsparse-work", tmp_path / "kept-work")
    shutil.copytree(between, tmp_path / "kept-between")
    with pytest.raises(UserError, match="an interrupted run for .* is here; continue it with --resume"):
        prune(source, out, **options)
    report = prune(source, out, resume=True, **options)
    assert steps == [] and hashes(out) == hashes(tmp_path / "expected")
    assert report["smaller"] == read_report(out)["smaller"] and report["smaller"][0]["mlp_channels"] == [
        WIDE,
        64,
    ]
    assert not list(tmp_path.glob(".*"))
    shutil.copytree(tmp_path / "kept-between", between)
    other = {**options, "set": ["width.score=flap"]}
    prune(source, tmp_path / "other", **other)
    steps.clear()
    prune(source, out, resume=True, overwrite=True, **other)
    assert steps == [1] and hashes(out) == hashes(tmp_path / "other")


def test_a_step_that_was_cut_off_is_done_anew(tmp_path, text, monkeypatch):
    source, out = save("llama", tmp_path / "source", monkeypatch), tmp_path / "out"
    options = {"pattern": "width:50%", "calibration": text, **SMALL}
    prune(source, tmp_path / "expected", **options)
    real, calls = NarrowDesk.finish, []

    def cut_off(desk):
        calls.append(desk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(desk)

    monkeypatch.setattr(NarrowDesk, "finish", cut_off)
    with pytest.raises(KeyboardInterrupt):
        prune(source, out, **options)
    assert not out.exists() and list(tmp_path.glob("..out.llmsparse-width.llmsparse-work"))
    monkeypatch.setattr(NarrowDesk, "finish", real)
    prune(source, out, resume=True, **options)
    assert hashes(out) == hashes(tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))
