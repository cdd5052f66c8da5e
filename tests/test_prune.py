"""Pruning whole checkpoints: what is written, resumed, shared between processes, and refused."""

import errno
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsparse.checkpoint import Checkpoint, file_sha256
from llmsparse.errors import UserError
from llmsparse.prune import prune
from tests.tiny import FAMILIES, save_tiny

TEXT = "".join(random.Random(0).choices(string.ascii_letters + string.digits + " .,;:", k=20000))
SMALL = {"samples": 6, "sequence_length": 32}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def hashes(folder):
    return {f.name: file_sha256(f) for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_an_ordinary_checkpoint_with_exact_masks(family, dtype, tmp_path, text):
    source = save_tiny(family, tmp_path / "source", dtype=dtype)
    before, out = hashes(source), tmp_path / "out"
    report = prune(source, out, pattern="2:4", calibration=text, **SMALL)
    assert hashes(source) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        AutoTokenizer.from_pretrained(out)
    assert model.dtype == dtype
    original, pruned = tensors(source), tensors(out)
    assert pruned.keys() == original.keys()
    reported = {w["name"]: w for w in report["weights"]}
    assert len(reported) >= 6
    for name, tensor in pruned.items():
        assert tensor.dtype == original[name].dtype and tensor.shape == original[name].shape
        if name not in reported:
            assert torch.equal(tensor, original[name])
            continue
        oriented = tensor.T if family == "gpt2" else tensor
        kept = (oriented != 0).reshape(oriented.shape[0], -1, 4).sum(-1)
        assert bool((kept == 2).all()), name
        assert not bool(torch.signbit(tensor[tensor == 0]).any())
        assert 0 < reported[name]["error"] < 1 and reported[name]["sparsity"] == 0.5
    assert not list(tmp_path.glob(".*work*"))


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_sharding_names_and_files_are_the_sources(solver, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", max_shard_size="40KB")
    (source / "LICENSE").write_text("licence")
    assert len(list(source.glob("*.safetensors"))) > 1
    prune(source, tmp_path / "out", solver=solver, calibration=text, **SMALL)
    names = {f.name for f in source.iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names | {"report.json"}
    for file in source.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_bin_checkpoints_are_read(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    prune(source, tmp_path / "from_safetensors", calibration=text, **SMALL)
    (source / "model.safetensors").unlink()
    prune(source, tmp_path / "from_bin", calibration=text, **SMALL)
    a, b = tensors(tmp_path / "from_safetensors"), tensors(tmp_path / "from_bin")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_two_runs_write_equal_files(family, tmp_path, text):
    source = save_tiny(family, tmp_path / "source")
    for out in ("a", "b"):
        prune(source, tmp_path / out, calibration=text, **SMALL)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_mixed_patterns_skip_and_include(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    report = prune(
        source, tmp_path / "out", pattern=["50%", r"down_proj=1:4"], skip=[r"layers\.0\."], include=["lm_head"],
        calibration=text, **SMALL,
    )  # fmt: skip
    patterns = {w["name"]: (w["pattern"], w["sparsity"]) for w in report["weights"]}
    assert patterns["model.layers.1.mlp.down_proj.weight"] == ("1:4", 0.75)
    assert patterns["model.layers.1.mlp.up_proj.weight"] == ("50%", 0.5)
    assert patterns["lm_head.weight"] == ("50%", 0.5)
    assert not any("layers.0." in name for name in patterns)
    out = tensors(tmp_path / "out")
    assert float((out["lm_head.weight"] == 0).float().mean()) == 0.5


def test_tied_head_stays_tied_and_is_pruned_only_when_asked(tmp_path, text):
    source = save_tiny("gemma3_text", tmp_path / "source")
    report = prune(source, tmp_path / "plain", calibration=text, **SMALL)
    assert not any("embed" in w["name"] or "head" in w["name"] for w in report["weights"])
    report = prune(source, tmp_path / "asked", calibration=text, include=["lm_head"], **SMALL)
    assert report["weights"][-1]["name"] == "model.embed_tokens.weight"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "asked")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5


def test_coverage_and_report_state_what_was_done(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", calibration=text, **SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sizes = {k: v.numel() for k, v in tensors(source).items()}
    linear = sum(n for k, n in sizes.items() if "_proj" in k)
    assert report["coverage"]["pruned_parameters"] == linear
    assert report["coverage"]["linear_parameters"] == linear + sizes["lm_head.weight"]
    assert report["coverage"]["all_parameters"] == sum(sizes.values())
    assert report["files"] == hashes(tmp_path / "out")
    assert report["source_files"]["model.safetensors"] == file_sha256(source / "model.safetensors")
    assert report["calibration"]["tokens_sha256"] and report["versions"]["torch"] == torch.__version__
    assert {"read", "solve", "forward", "write"} <= report["seconds"].keys() and report["peak_memory"][
        "solve"
    ] > 0


def test_relative_output_error_is_the_layers_own(tmp_path, text):
    """The first block's q error, against the inputs that transformers itself feeds the layer."""
    source = save_tiny("llama", tmp_path / "source")
    report = prune(source, tmp_path / "out", calibration=text, **SMALL)
    from llmsparse.calibration import calibrate

    windows = calibrate(text, AutoTokenizer.from_pretrained(source), samples=6, sequence_length=32).windows
    model, inputs = AutoModelForCausalLM.from_pretrained(source), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(windows)
    x = inputs[0].double().reshape(-1, 32)
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, pruned = tensors(source)[name].double(), tensors(tmp_path / "out")[name].double()
    expected = float(((dense - pruned) @ x.T).square().sum() / (dense @ x.T).square().sum())
    found = next(w["error"] for w in report["weights"] if w["name"] == name)
    assert found == pytest.approx(expected, rel=1e-3)


def command(*arguments):
    return [sys.executable, "-m", "llmsparse", "prune", *map(str, arguments)]


def options(text):
    return ["--calibration", text, "--samples", "40", "--sequence-length", "64"]


def test_killed_runs_resume_to_identical_bytes(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    shutil.rmtree(tmp_path / "expected", ignore_errors=True)
    prune(source, tmp_path / "expected", calibration=text, samples=40, sequence_length=64)
    out, work = tmp_path / "out", tmp_path / ".out.llmsparse-work"
    for blocks_done in (
        0,
        1,
        2,
    ):  # killed after the journal holds the fingerprint, then one block more each time
        resume = ["--resume"] if work.exists() else []
        process = subprocess.Popen(
            command(source, out, *options(text), *resume),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        journal = work / "journal.jsonl"
        while process.poll() is None and not (
            journal.exists() and len(journal.read_text().splitlines()) > blocks_done
        ):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
    if not out.exists():
        subprocess.run(command(source, out, *options(text), "--resume"), check=True, capture_output=True)
    assert hashes(out) == hashes(tmp_path / "expected")


def test_resume_with_a_half_written_block_gives_identical_bytes(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "expected", calibration=text, **SMALL)
    from llmsparse.writer import Writer

    real = Writer.write
    calls = []

    def fail_late(self, written):
        calls.append(written)
        if len(calls) == 4:
            real(self, {k: torch.full_like(v, 7) for k, v in written.items()})
            raise KeyboardInterrupt
        real(self, written)

    monkeypatch.setattr(Writer, "write", fail_late)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Writer, "write", real)
    with pytest.raises(UserError, match=r"differ from the interrupted one: .*seed: was 0, is 1"):
        prune(source, tmp_path / "out", calibration=text, seed=1, resume=True, **SMALL)
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_two_processes_give_the_single_processs_masks(tmp_path, text):
    source = save_tiny("qwen3_moe", tmp_path / "source")
    prune(source, tmp_path / "one", calibration=text, samples=4, sequence_length=32)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "llmsparse",
    ]
    done = subprocess.run(
        [*launch, *command(source, tmp_path / "two", "--calibration", text, "--samples", 4, "--sequence-length", 32)[3:]],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    equal = sum(int(((one[k] == 0) == (two[k] == 0)).sum()) for k in one)
    assert equal >= 0.999 * sum(v.numel() for v in one.values())
    assert done.stdout.count("out") <= done.stdout.count("\n")


ERRORS = {
    "out_is_source": (lambda s, o: ((s, s), {}), "is the source checkpoint"),
    "no_model": (lambda s, o: ((s.parent / "none", o), {}), "not a folder with a checkpoint"),
    "no_config": (lambda s, o: ((s.parent, o), {}), "has no config.json"),
    "pattern": (lambda s, o: ((s, o), {"pattern": "half"}), "pattern 'half' is unknown"),
    "nm": (lambda s, o: ((s, o), {"pattern": "4:4"}), "n must lie between 1 and m-1"),
    "percent": (lambda s, o: ((s, o), {"pattern": "100%"}), "between 0 % and 100 %"),
    "width": (
        lambda s, o: ((s, o), {"pattern": "3:7"}),
        "needs in_features divisible by 7; model.layers.0.*--skip",
    ),
    "scope": (lambda s, o: ((s, o), {"scope": "column"}), "--scope column is unknown"),
    "solver": (lambda s, o: ((s, o), {"solver": "magic"}), "solver 'magic' is unknown; known: .*sparsegpt"),
    "set": (
        lambda s, o: ((s, o), {"set": ["lambda=1"]}),
        "sparsegpt has no such option; it has damping, chunk",
    ),
    "set_value": (lambda s, o: ((s, o), {"set": ["damping=-1"]}), "damping must be positive"),
    "set_form": (lambda s, o: ((s, o), {"set": ["damping"]}), "is not KEY=VALUE"),
    "skip": (lambda s, o: ((s, o), {"skip": ["nothing_like_it"]}), "matches no linear weight"),
    "regex": (lambda s, o: ((s, o), {"skip": ["("]}), "is not a regular expression"),
    "all_skipped": (lambda s, o: ((s, o), {"skip": ["."]}), "nothing is left to prune"),
    "rule": (
        lambda s, o: ((s, o), {"pattern": ["50%", "zzz=2:4"]}),
        "matches no weight that is to be pruned",
    ),
    "device": (lambda s, o: ((s, o), {"device": "tpu9"}), "--device tpu9"),
    "dtype": (lambda s, o: ((s, o), {"dtype": "int3"}), "--dtype int3 is unknown"),
    "length": (lambda s, o: ((s, o), {"sequence_length": 4096}), "max_position_embeddings, 128"),
    "samples": (lambda s, o: ((s, o), {"samples": 0}), "must be at least 1"),
    "batch": (lambda s, o: ((s, o), {"batch_size": "many"}), "--batch-size many must be"),
    "offload": (lambda s, o: ((s, o), {"offload": "cloud"}), "--offload cloud is unknown"),
    "option": (lambda s, o: ((s, o), {"damping": 1}), "option 'damping' is unknown; known: solver"),
    "recipe": (lambda s, o: ((s, o), {"recipe": s / "none.yaml"}), "recipe .* does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(case, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    arguments, message = ERRORS[case]
    before = hashes(source)
    positional, keywords = arguments(source, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        prune(*positional, **{"calibration": text, **SMALL, **keywords})
    assert hashes(source) == before and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*work*"))


def test_an_interrupted_run_is_not_thrown_away_unasked(tmp_path, text):
    source, work = save_tiny("llama", tmp_path / "source"), tmp_path / ".out.llmsparse-work"
    work.mkdir()
    (work / "journal.jsonl").write_text('{"fingerprint": {}}\n{"block": "half')
    with pytest.raises(UserError, match="continue it with --resume, or discard it with --overwrite"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert work.exists()
    prune(source, tmp_path / "out", calibration=text, overwrite=True, **SMALL)
    assert (tmp_path / "out").exists() and not work.exists()


def test_resume_with_nothing_done_starts_from_the_beginning(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert (tmp_path / "out" / "report.json").exists()


def test_a_disk_that_fills_up_half_way_leaves_a_resumable_state(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "expected", calibration=text, **SMALL)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written: the disk is full; make room"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
    prune(source, tmp_path / "out", calibration=text, resume=True, **SMALL)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_existing_output_needs_overwrite(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    prune(source, tmp_path / "out", calibration=text, overwrite=True, **SMALL)
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "mine.txt").exists()


def test_recipe_file_holds_the_options_and_flags_win(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"solver: wanda\npattern: 2:4\ncalibration: {text}\nsamples: 2\nsequence-length: 32\n")
    report = prune(source, tmp_path / "out", recipe=recipe, samples=3)
    assert report["options"]["solver"] == "wanda" and report["options"]["samples"] == 3
    recipe.write_text("solvr: wanda\n")
    with pytest.raises(UserError, match="key 'solvr' is unknown; known: solver, pattern"):
        prune(source, tmp_path / "other", recipe=recipe)


def test_incomplete_and_broken_checkpoints_are_refused(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source", max_shard_size="40KB")
    files = sorted(source.glob("*.safetensors"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    files[0].unlink()
    with pytest.raises(UserError, match="which is missing; download"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)


def test_full_disk_is_one_clear_error(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="the disk is full: .* needs"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()


def test_an_expert_without_tokens_is_reported_not_garbage(tmp_path, text):
    source = save_tiny("mixtral", tmp_path / "source")
    report = prune(source, tmp_path / "out", calibration=text, samples=1, sequence_length=4)
    assert any("use more calibration text" in warning for warning in report["warnings"])
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "out").values())


def test_weights_read_lazily_by_name(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    for name, tensor in tensors(source).items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
