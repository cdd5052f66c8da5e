"""What recover refuses: one clear error, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsparse import recovered
from llmsparse.errors import UserError
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.recover import recover
from llmsparse.sampling import Sampler
from llmsparse.training import Training
from tests.pruned import ONE_THREAD, SMALL, hashes, tensors
from tests.tiny import save_tiny

LITTLE = {"tokens": "1k", "sequence_length": 32, "device": "cpu"}
EIGHT = {"optimizer": "adamw8bit", "master": "bfloat16"}
ERRORS = {
    "no_model": (lambda s: s.parent / "none", {}, "not a folder with a checkpoint"),
    "dense": (
        lambda s: s.parent / "dense",
        {"teacher": "source"},
        "has no pruned weight, no codes and no fewer",
    ),
    "no_report": (
        lambda s: s.parent / "dense",
        {},
        "has no report that names its dense model; give it with --teacher",
    ),
    "teacher": (lambda s: s, {"teacher": "/nowhere"}, "/nowhere is not a folder with a checkpoint"),
    "shape": (
        lambda s: s,
        {"teacher": "wider"},
        "was not made of --teacher .*q_proj.weight is 32x32 .*64x64",
    ),
    "vocabulary": (lambda s: s, {"teacher": "words"}, "has a vocabulary of 128 and --teacher .* one of 96"),
    "tokens": (lambda s: s, {"tokens": "many"}, "--tokens many is no number of tokens; use e.g. 98k or 0.5M"),
    "no_tokens": (lambda s: s, {"tokens": "0"}, "--tokens 0 is no number of tokens"),
    "lr": (lambda s: s, {"lr": -1.0}, "--lr -1.0 must be above 0"),
    "train": (lambda s: s, {"train": "all"}, "--train all is unknown; use linears, linears.norms, lora"),
    "masks": (lambda s: s, {"masks": "free"}, "--masks free is unknown; use fixed, splice"),
    "lora_splice": (lambda s: s, {"masks": "splice", "train": "lora"}, "give one of them"),
    "never_spliced": (
        lambda s: s,
        {"masks": "splice"},
        "8 steps choose no mask again before they stay after 4; use more --tokens, or a smaller",
    ),
    "hidden_top_k": (lambda s: s, {"hidden": 1.0, "top_k": 8}, "--hidden needs the teacher's blocks"),
    "until": (lambda s: s, {"splice_until": 2.0}, "--splice-until 2.0 must be a share"),
    "master": (lambda s: s, {"master": "bfloat16"}, "goes with --optimizer adamw8bit"),
    "values": (lambda s: s, {"values": "int5"}, "values 'int5' are unknown"),
    "compared": (lambda s: s, {"values": "int3:32"}, "int3:32 is there to compare with"),
    "endless": (lambda s: s, {"tokens": "1e999"}, "--tokens 1e999 is no number of tokens"),
    "narrow": (
        lambda s: s,
        {"dtype": "float32", **EIGHT},
        "--master bfloat16 multiplies in bfloat16; use auto",
    ),
    "length": (lambda s: s, {"sequence_length": 4096}, "max_position_embeddings, 128"),
    "short": (lambda s: s, {"sequence_length": 1}, "--sequence-length 1 must be at least 2"),
    "batch": (lambda s: s, {"batch": 0}, "--batch 0 must be at least 1"),
    "dtype": (lambda s: s, {"dtype": "float16"}, "gradients vanish"),
    "device": (lambda s: s, {"device": "tpu9"}, "--device tpu9"),
    "option": (lambda s: s, {"damping": 1}, "option 'damping' is unknown; known: teacher"),
    "no_text": (lambda s: s, {"data": "blank.txt"}, "holds no text"),
    "little_text": (lambda s: s, {"data": "few.txt"}, "few.txt has 40 tokens"),
    "no_data": (
        lambda s: s,
        {"data": "a.jsonl=1,b.txt"},
        "--data a.jsonl=1,b.txt: give every source a weight",
    ),
}


@pytest.fixture
def sparse(tmp_path):
    dense = save_tiny("llama", tmp_path / "dense")
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="magnitude")
    return tmp_path / "sparse"


def changed(folder, to, **config):
    shutil.copytree(folder, to)
    known = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**known, **config}))
    return to


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(case, sparse, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "few.txt").write_text("a" * 40)
    of, options, message = ERRORS[case]
    if "optimizer" in options:
        pytest.importorskip("torchao")
    if options.get("teacher") == "source":
        options = {"teacher": str(save_tiny("llama", tmp_path / "other", seed=3))}
    if options.get("teacher") == "words":
        few = changed(tmp_path / "dense", tmp_path / "words", vocab_size=96)
        weights = load_file(few / "model.safetensors")
        cut = {k: v[:96].clone() if v.shape[0] == 128 else v for k, v in weights.items()}
        save_file(cut, few / "model.safetensors", {"format": "pt"})
    if options.get("teacher") == "wider":
        wide = changed(tmp_path / "dense", tmp_path / "wider", hidden_size=64)
        weights = load_file(wide / "model.safetensors")
        grown = {
            k: v.repeat(*[2 if n == 32 else 1 for n in v.shape]).contiguous() for k, v in weights.items()
        }
        save_file(grown, wide / "model.safetensors", {"format": "pt"})
    before = hashes(sparse)
    with pytest.raises(UserError, match=message):
        recover(of(sparse), tmp_path / "out", **{"data": text, **LITTLE, **options})
    assert hashes(sparse) == before
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_packed_model_is_refused(sparse, tmp_path, text):
    from llmsparse.export import export

    export(sparse, tmp_path / "packed", format="packed")
    with pytest.raises(UserError, match="is packed; recover the folder that it was exported from"):
        recover(tmp_path / "packed", tmp_path / "out", data=text, **LITTLE)


def test_the_source_and_what_lies_in_out_are_not_overwritten(sparse, tmp_path, text):
    with pytest.raises(UserError, match="is the source checkpoint"):
        recover(sparse, sparse, data=text, **LITTLE)
    dense = hashes(tmp_path / "dense")
    with pytest.raises(UserError, match="dense is the source checkpoint"):
        recover(sparse, tmp_path / "dense", data=text, overwrite=True, **LITTLE)
    assert hashes(tmp_path / "dense") == dense
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="exists and is not empty"):
        recover(sparse, tmp_path / "out", data=text, **LITTLE)
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def command(*given):
    return [
        sys.executable,
        "-m",
        "llmsparse",
        "recover",
        *map(str, given),
        "--sequence-length",
        "32",
        "--device",
        "cpu",
    ]


def test_a_killed_run_goes_on_to_the_same_bytes(sparse, tmp_path, text):
    options = ["--data", text, "--tokens", "40k", "--evaluations", "20", "--dtype", "float32"]
    whole = subprocess.run(
        command(sparse, tmp_path / "whole", *options), env=ONE_THREAD, capture_output=True, check=False
    )
    assert whole.returncode == 0, whole.stderr
    running = subprocess.Popen(
        command(sparse, tmp_path / "out", *options), env=ONE_THREAD, stderr=subprocess.DEVNULL
    )
    state, begun = tmp_path / ".out.llmsparse-work" / "state.pt", time.monotonic()
    while not (state.exists() and torch.load(state)["course"]["step"] >= 16):
        assert running.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "out").exists()
    again = subprocess.run(
        command(sparse, tmp_path / "out", *options, "--resume"),
        env=ONE_THREAD,
        capture_output=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_two_processes_train_what_one_does(sparse, tmp_path, text):
    options = {
        "data": text,
        "tokens": "2k",
        "sequence_length": 32,
        "dtype": "float32",
        "evaluations": 2,
        "lr": 1e-3,
    }
    recover(sparse, tmp_path / "one", device="cpu", **options)
    how = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    start = [sys.executable, "-m", "accelerate.commands.launch", *how.split(), "-m", "llmsparse", "recover"]
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    for top_k in ("0", "128"):
        run = [*start, str(sparse), str(tmp_path / f"two{top_k}"), *given, f"--top-k={top_k}", "--json"]
        done = subprocess.run(run, capture_output=True, text=True, env=ONE_THREAD, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["recovery"]["options"]["processes"] == 2
    one, two, noted = (tensors(tmp_path / name) for name in ("one", "two0", "two128"))
    for name, value in one.items():
        assert torch.equal(value == 0, two[name] == 0) and torch.equal(value == 0, noted[name] == 0)
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(noted[name], value, rtol=0.05, atol=5e-3)


def test_nothing_is_spliced_where_nothing_is_pruned(sparse, tmp_path, text):
    given = {"calibration": text, **SMALL}
    quantize(tmp_path / "dense", tmp_path / "coarse", values="int8", **given)
    with pytest.raises(UserError, match="--masks splice: .*coarse has no pruned weight; use --masks fixed"):
        recover(tmp_path / "coarse", tmp_path / "out", data=text, masks="splice", splice_every=1, **LITTLE)


def test_a_disk_that_holds_out_but_no_state_is_refused_before_the_teacher_writes(
    sparse, tmp_path, monkeypatch
):
    monkeypatch.setattr(Sampler, "__call__", lambda *_: pytest.fail("the teacher wrote"))
    size, used = (tmp_path / "sparse" / "model.safetensors").stat().st_size, shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=2 * size))
    with pytest.raises(UserError, match="too full for .*out and a run's state"):
        recover(sparse, tmp_path / "out", data="self", **LITTLE)
    assert not list(tmp_path.glob(".out*"))


def test_a_short_text_that_is_read_often_needs_room_for_its_notes_once(sparse, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("abcdefgh " * 40)  # 11 windows
    used, out = shutil.disk_usage(tmp_path), sum(tensor.nbytes for tensor in tensors(sparse).values())
    given = {**LITTLE, "top_k": 100, "data": str(tmp_path / "short.txt"), "tokens": "8k"}
    for notes, fits in ((11 * 32 * 100 * 6, True), (11 * 32 * 100 * 6 - 1, False)):
        free = out + 2 * 16 * 3 * 9216 + notes  # three blocks of 9,216 weights
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, free=free: used._replace(free=free))
            patch.setattr(Training, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt if fits else UserError):
                recover(sparse, tmp_path / f"out{fits}", **given)


def test_what_an_interrupted_run_left_is_not_asked_of_the_disk_again(sparse, tmp_path, text, monkeypatch):
    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut)
        with pytest.raises(KeyboardInterrupt):
            recover(sparse, tmp_path / "out", data=text, **LITTLE)
    left = sum(f.stat().st_size for f in (tmp_path / ".out.llmsparse-work").iterdir())
    used, needed = shutil.disk_usage(tmp_path), []
    real = recovered.check_room

    def told(*given):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=0))
        with pytest.raises(UserError, match=r": ([\d.]+) GB") as error:
            real(*given)
        needed.append(float(re.search(r"state: ([\d.]+) GB", str(error.value))[1]))
        raise error.value

    monkeypatch.setattr(recovered, "check_room", told)
    monkeypatch.setattr(recovered, "GB", 1.0)
    for out, resume in (("out", True), ("other", False)):
        with pytest.raises(UserError):
            recover(sparse, tmp_path / out, data=text, resume=resume, **LITTLE)
    assert needed[1] - needed[0] == left
