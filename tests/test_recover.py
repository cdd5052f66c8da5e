"""Recovery: against a plain training loop, in every mode, and continued after it was cut off."""

import errno
import gc
import math
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmsparse.recover  # noqa: F401  (the module is reached below by its name)
from llmsparse import training
from llmsparse.calibration import calibrate
from llmsparse.errors import UserError
from llmsparse.gridfile import GridFile
from llmsparse.pattern import NM
from llmsparse.prune import prune
from llmsparse.recover import recover
from llmsparse.sampling import Sampler
from llmsparse.teacher import Beside, Written
from llmsparse.training import Training
from llmsparse.writer import Writer
from tests.pruned import SMALL, hashes, read_report, tensors
from tests.tiny import FAMILIES, save_tiny

recovering = sys.modules["llmsparse.recover"]
LITTLE = {
    "tokens": "4k",
    "sequence_length": 32,
    "evaluations": 4,
    "lr": 2e-3,
    "dtype": "float32",
    "device": "cpu",
}
EIGHT_BITS = pytest.param(  # torchao compiles its step, and torch's compiler warns of itself
    {"optimizer": "adamw8bit", "master": "bfloat16", "dtype": "auto"},
    marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"),
)
MODES = [
    {},
    {"train": "linears"},
    {"train": "lora", "rank": 4, "lr": 5e-3},
    {"masks": "splice", "splice_every": 3},
    {"values": "int4:32"},
    {"values": "int8", "train": "lora"},
    {"masks": "splice", "splice_every": 3, "values": "int4:32"},
    {"hidden": 1.0},
    {"top_k": 16},
    {"batch_size": 3, "checkpointing": True},
    {"dtype": "bfloat16"},
    EIGHT_BITS,
]


@pytest.fixture
def pair(tmp_path, text):
    """A dense model, and the same pruned to 2:4."""
    dense = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    prune(dense, tmp_path / "sparse", pattern="2:4", solver="wanda", calibration=text, **SMALL)
    return dense, tmp_path / "sparse"


def pruned(folder):
    """The weights of the blocks."""
    return {k: v for k, v in tensors(folder).items() if v.dim() >= 2 and "layers" in k}


def kl_of(student, teacher, windows):
    """A plain one, in nats a token."""
    logits = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()(input_ids=windows).logits.double()
        for f in (teacher, student)
    ]
    p, q = (each.detach().log_softmax(-1).flatten(0, 1) for each in logits)
    return functional.kl_div(q, p, log_target=True, reduction="batchmean").item()


def cut_windows(folder, text, count):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return calibrate(text, tokenizer, samples=count, sequence_length=32).windows


def test_a_run_is_the_plain_training_loop(pair, tmp_path):
    dense, sparse = pair
    letters = "the quick brown fox jumps over the lazy dog. "
    (tmp_path / "few.txt").write_text((letters * 4)[: 5 * 31])  # five windows of 31 letters and BOS
    options = {**LITTLE, "tokens": 12 * 4 * 32, "batch": 4, "data": str(tmp_path / "few.txt")}
    report = recover(
        sparse,
        tmp_path / "out",
        train="linears",
        evaluations=12,
        **{k: v for k, v in options.items() if k != "evaluations"},
    )
    windows = cut_windows(sparse, options["data"], 5)
    held, trained = windows[2:3], windows[[0, 1, 3, 4]]  # every step sees all of the four
    assert report["recovery"]["windows"] == {"trained": 4, "held_out": 1}
    assert report["recovery"]["epochs"] == 12 and report["recovery"]["steps"] == 12

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (dense, sparse)
    )
    weights = [p for n, p in student.named_parameters() if "layers" in n and p.dim() == 2]
    masks = [p.detach() != 0 for p in weights]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    curve, best = [], None
    for step in range(13):
        if step:
            done = step / 12
            falling = 0.5 * (1 + math.cos(math.pi * min(done, 1 - 0.5 / 12)))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * falling * min(1, done / 0.05)
            p, q = (m(input_ids=trained).logits.flatten(0, 1).log_softmax(-1) for m in (teacher, student))
            optimizer.zero_grad()
            functional.kl_div(q, p.detach(), log_target=True, reduction="batchmean").backward()
            for weight, mask in zip(weights, masks, strict=True):
                weight.grad *= mask
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        p, q = (m(input_ids=held).logits.flatten(0, 1).log_softmax(-1) for m in (teacher, student))
        curve.append(functional.kl_div(q, p, log_target=True, reduction="batchmean").item())
        if curve[-1] == min(curve):
            best = [weight.detach().to(torch.bfloat16).clone() for weight in weights]
    assert [row["held_out"] for row in report["recovery"]["curve"]] == pytest.approx(curve, rel=1e-3)
    assert report["recovery"]["kl"]["step"] == curve.index(min(curve)) > 0
    written = [
        v
        for k, v in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters()
        if "layers" in k and v.dim() == 2
    ]
    for mine, plain in zip(written, best, strict=True):
        assert torch.equal(mine == 0, plain == 0)
        assert float((mine != plain).float().mean()) < 0.02  # one rounding to bfloat16 apart
        torch.testing.assert_close(mine, plain, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_gains_and_keeps_its_zeros_at_every_saved_step(mode, pair, tmp_path, text, monkeypatch):
    if "optimizer" in mode:
        pytest.importorskip("torchao")
    dense, sparse = pair
    masks = {name: weight != 0 for name, weight in pruned(sparse).items()}
    saved, real = [], Training._save

    def save(self, name, state):
        for key, value in state.get("values", {}).items():
            if key in masks:
                saved.append(key)
                assert NM(2, 4).allows(value != 0) or "values" in mode  # a code may round to zero
                assert "masks" in mode or bool((value[~masks[key]] == 0).all())
                assert bool(((value != 0).reshape(-1, 4).sum(1) <= 2).all())
        real(self, name, state)

    monkeypatch.setattr(Training, "_save", save)
    report = recover(sparse, tmp_path / "out", data=text, **{**LITTLE, **mode})
    kl = report["recovery"]["kl"]
    assert kl["after"] < 0.8 * kl["before"] and saved
    assert report["recovery"]["options"]["train"] == mode.get("train", "linears+norms")
    before, after = tensors(sparse), tensors(tmp_path / "out")
    for name, mask in masks.items():
        groups = (after[name] != 0).reshape(-1, 4).sum(1)
        assert bool((groups <= 2).all()) and float((groups == 2).float().mean()) > 0.9
        assert "masks" in mode or bool((after[name][~mask] == 0).all())
        assert not bool(
            (after[name].view(torch.int16) == torch.tensor(-32768, dtype=torch.int16)).any()
        )  # no -0.0
        assert not torch.equal(before[name], after[name])
    norms = [name for name, value in before.items() if value.dim() == 1]
    moved = [not torch.equal(before[name], after[name]) for name in norms]
    assert any(moved) == (mode.get("train", "linears+norms") == "linears+norms")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == (
        "values" not in mode
    )
    windows = cut_windows(sparse, text, 60)
    if "values" not in mode and "top_k" not in mode:
        assert kl_of(tmp_path / "out", dense, windows) < 0.8 * kl_of(sparse, dense, windows)
    assert read_report(tmp_path / "out")["files"] == hashes(tmp_path / "out")
    assert not list(tmp_path.glob(".out*")) and not list((tmp_path / "out").glob("*.pt"))


def test_splicing_moves_zeros_and_then_stops(pair, tmp_path, text, monkeypatch):
    _, sparse = pair
    revived, real = [], training.Student.splice
    monkeypatch.setattr(training.Student, "splice", lambda self: revived.append(real(self)))
    report = recover(
        sparse, tmp_path / "out", data=text, masks="splice", splice_every=2, splice_until=0.5, **LITTLE
    )
    assert len(revived) == (report["recovery"]["steps"] // 2 - 1) // 2 and sum(revived) > 0
    before, after = pruned(sparse), pruned(tmp_path / "out")
    assert any(not torch.equal(before[name] == 0, after[name] == 0) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recovers(family, tmp_path, text):
    dense = save_tiny(family, tmp_path / "dense", max_shard_size="40KB")
    prune(dense, tmp_path / "sparse", pattern="50%", solver="magnitude")
    rate = {"lr": 2e-4} if family == "gemma3_text" else {}  # its logits hardly differ
    report = recover(tmp_path / "sparse", tmp_path / "out", data=text, **{**LITTLE, **rate})
    assert report["recovery"]["kl"]["after"] < 0.9 * report["recovery"]["kl"]["before"]
    before, after = tensors(tmp_path / "sparse"), tensors(tmp_path / "out")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    for row in report["weights"]:
        if "[" not in row["name"]:
            assert torch.equal(before[row["name"]] == 0, after[row["name"]] == 0)
            assert not torch.equal(before[row["name"]], after[row["name"]])


@pytest.mark.parametrize("pattern", [["width:50%"], ["depth:1", "50%"]], ids=str)
def test_smaller_models_recover(pattern, tmp_path, text):
    dense = save_tiny("llama", tmp_path / "dense")
    if pattern == ["width:50%"]:  # widths are multiples of 64
        config = AutoModelForCausalLM.from_pretrained(dense).config
        config.intermediate_size = 128
        AutoModelForCausalLM.from_config(config).save_pretrained(dense)
    prune(dense, tmp_path / "sparse", pattern=pattern, calibration=text, **SMALL)
    report = recover(tmp_path / "sparse", tmp_path / "out", data=text, hidden=0.1, **LITTLE)
    assert report["recovery"]["kl"]["after"] < 0.8 * report["recovery"]["kl"]["before"]
    assert report["smaller"] == read_report(tmp_path / "sparse")["smaller"]


@pytest.mark.parametrize("looks", [1, 3])
@pytest.mark.parametrize(
    "mode", [{}, {"masks": "splice", "splice_every": 2}, {"train": "lora"}, {"top_k": 8}, EIGHT_BITS], ids=str
)
def test_an_interrupted_run_resumes_to_identical_bytes(mode, looks, pair, tmp_path, text, monkeypatch):
    if "optimizer" in mode:
        pytest.importorskip("torchao")
    _, sparse = pair
    options = {"data": text, **LITTLE, **mode}
    expected = recover(sparse, tmp_path / "expected", **options)
    real, count = Training._look, []

    def look(self):
        real(self)
        count.append(self.course.step)
        if len(count) == looks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_look", look)
        with pytest.raises(KeyboardInterrupt):
            recover(sparse, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="an interrupted run for .* continue it with --resume, or discard it"):
        recover(sparse, tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"differ from the interrupted one: lr: was 0.002, is 0.1"):
        recover(sparse, tmp_path / "out", resume=True, **{**options, "lr": 0.1})
    if "top_k" in mode:
        monkeypatch.setattr(Written, "write", lambda *_: pytest.fail("the teacher was asked again"))
    found = recover(sparse, tmp_path / "out", resume=True, **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    curves = [
        [(r["step"], r["train"], r["held_out"]) for r in each["recovery"]["curve"]]
        for each in (found, expected)
    ]
    assert curves[0] == curves[1]


def test_a_rate_that_diverges_stops_says_so_and_keeps_the_best(pair, tmp_path, text):
    dense, sparse = pair
    report = recover(sparse, tmp_path / "out", data=text, **{**LITTLE, "lr": 30.0, "evaluations": 16})
    found = report["recovery"]
    assert found["diverged"] and found["steps"] < 32 and found["kl"]["step"] == 0
    told = " ".join(report["warnings"])
    assert (
        "training stopped there, use a smaller --lr than 30" in told
        and "the weights are those of SPARSE" in told
    )
    assert {
        k: torch.equal(v, tensors(tmp_path / "out")[k]) for k, v in tensors(sparse).items()
    } == dict.fromkeys(tensors(sparse), True)


def test_a_diverged_run_that_was_cut_off_ends_as_it_would_have(pair, tmp_path, text, monkeypatch):
    _, sparse = pair
    options = {"data": text, **LITTLE, "lr": 30.0, "evaluations": 16}
    expected = recover(sparse, tmp_path / "expected", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "prepare_to_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            recover(sparse, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", lambda self: pytest.fail("trained again"))
        found = recover(sparse, tmp_path / "out", resume=True, **options)
    assert found["recovery"]["diverged"] == expected["recovery"]["diverged"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_what_the_teacher_wrote_and_said_is_not_asked_for_again(pair, tmp_path, monkeypatch):
    _, sparse = pair
    options = {"data": "self", "top_k": 8, **LITTLE}
    expected = recover(sparse, tmp_path / "expected", **options)
    real = Written.write

    def cut(self, model, progress):
        real(self, model, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Written, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            recover(sparse, tmp_path / "out", **options)
    monkeypatch.setattr(recovering, "load_model", lambda *_: pytest.fail("the teacher was loaded again"))
    monkeypatch.setattr(Sampler, "__call__", lambda *_: pytest.fail("the text was written again"))
    found = recover(sparse, tmp_path / "out", resume=True, **options)
    assert found["files"] == expected["files"]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        f.name for f in (tmp_path / "expected").iterdir()
    }


def test_a_disk_that_is_full_at_the_first_look_keeps_what_the_teacher_wrote(pair, tmp_path, monkeypatch):
    _, sparse = pair
    options = {"data": "self", "top_k": 8, **LITTLE}
    real = torch.save

    def full(state, file):
        if "values" in state:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="the disk is full; make room .* --resume"):
            recover(sparse, tmp_path / "out", **options)
    monkeypatch.setattr(recovering, "load_model", lambda *_: pytest.fail("the teacher was loaded again"))
    monkeypatch.setattr(Sampler, "__call__", lambda *_: pytest.fail("the text was written again"))
    assert recover(sparse, tmp_path / "out", resume=True, **options)["recovery"]["steps"]


def test_only_one_of_two_models_is_in_memory_where_the_teacher_is_written_down(
    pair, tmp_path, text, monkeypatch
):
    _, sparse = pair
    teachers, alive, load, build = [], [], recovering.load_model, recovering.Student

    def loaded(*given):
        model = load(*given)
        teachers.append(weakref.ref(model))
        return model

    def student(*given):
        gc.collect()
        alive.append([each() is not None for each in teachers])
        return build(*given)

    monkeypatch.setattr(recovering, "load_model", loaded)
    monkeypatch.setattr(recovering, "Student", student)
    for top_k, wanted in ((8, False), (0, True)):
        recover(sparse, tmp_path / f"out{top_k}", data=text, top_k=top_k, **LITTLE)
        assert alive.pop() == [*[False] * (len(teachers) - 1), wanted]


def test_a_broken_model_is_refused_and_nothing_is_left(pair, tmp_path, text):
    _, sparse = pair
    weights = load_file(sparse / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, sparse / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the divergence of SPARSE from its teacher is not finite"):
        recover(sparse, tmp_path / "out", data=text, **LITTLE)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_the_run_goes_on_later(pair, tmp_path, text, monkeypatch):
    _, sparse = pair
    expected = recover(sparse, tmp_path / "expected", data=text, **LITTLE)
    real, saved = torch.save, []

    def full(state, file):
        saved.append(file)
        if len(saved) == 5:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="could not be written: the disk is full; make room .* --resume"):
            recover(sparse, tmp_path / "out", data=text, **LITTLE)
    found = recover(sparse, tmp_path / "out", data=text, resume=True, **LITTLE)
    assert found["files"] == expected["files"]


def test_what_was_trained_on_a_grid_is_what_is_written(pair, tmp_path, text):
    _, sparse = pair
    report = recover(sparse, tmp_path / "out", data=text, values="int4:32", train="linears", **LITTLE)
    assert report["grid"]["values"] == "int4:32" and report["tables"][0]["values"] == "int8"
    codes, stored = GridFile.open(tmp_path / "out"), tensors(tmp_path / "out")
    assert {n for n in codes.names if "layers" in n} == set(pruned(sparse))
    for name in codes.names:
        codes.check(name, stored[name])
    again = recover(tmp_path / "out", tmp_path / "again", data=text, **LITTLE)  # goes on on the same grid
    assert again["grid"]["values"] == "int4:32"
    assert again["recovery"]["kl"]["before"] == pytest.approx(report["recovery"]["kl"]["after"], rel=1e-4)
    scales = [GridFile.open(tmp_path / f) for f in ("out", "again")]
    assert all(torch.equal(scales[0].scales(n), scales[1].scales(n)) for n in codes.names)


def test_the_teacher_may_write_the_text(pair, tmp_path):
    _, sparse = pair
    report = recover(sparse, tmp_path / "out", data="self", **LITTLE)
    assert report["recovery"]["sources"][0]["source"] == "self"
    assert report["recovery"]["kl"]["after"] < report["recovery"]["kl"]["before"]


def test_a_short_text_is_read_again_and_its_epochs_are_told(pair, tmp_path):
    _, sparse = pair
    (tmp_path / "short.txt").write_text("abcdefgh " * 40)
    report = recover(sparse, tmp_path / "out", data=str(tmp_path / "short.txt"), **LITTLE)
    windows = report["recovery"]["windows"]
    assert windows["trained"] + windows["held_out"] == 11 and windows["held_out"] == 1
    assert report["recovery"]["epochs"] == pytest.approx(report["recovery"]["tokens"] / (10 * 32))


def test_the_teacher_is_the_model_that_was_pruned_unless_another_is_named(pair, tmp_path, text):
    dense, sparse = pair
    other = save_tiny("llama", tmp_path / "other", seed=1)
    own = recover(sparse, tmp_path / "own", data=text, **LITTLE)["recovery"]
    named = recover(sparse, tmp_path / "named", data=text, teacher=str(other), **LITTLE)["recovery"]
    assert own["teacher"] == str(dense) and named["teacher"] == str(other)
    assert named["kl"]["before"] > 2 * own["kl"]["before"]


def test_held_out_text_is_not_trained_on(pair, tmp_path, text, monkeypatch):
    _, sparse = pair
    trained, real = set(), Beside.read

    def read(self, rows):
        if torch.is_grad_enabled() is False and len(rows) == 2:
            trained.update(rows)
        return real(self, rows)

    monkeypatch.setattr(Beside, "read", read)
    report = recover(sparse, tmp_path / "out", data=text, batch_size=2, **LITTLE)["recovery"]
    count = report["windows"]["trained"]
    assert trained == set(range(count))  # the held-out ones come after, and go one at a time
