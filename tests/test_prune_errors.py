"""What prune refuses: one clear error, and nothing left behind."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsparse.errors import UserError
from llmsparse.plan import plan
from llmsparse.prune import prune
from llmsparse.work import verify
from tests.pruned import SMALL, hashes
from tests.tiny import save_tiny

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
        "alps has no such option; it has damping, penalty",
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


def test_existing_output_needs_overwrite(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    prune(source, tmp_path / "out", calibration=text, overwrite=True, **SMALL)
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "mine.txt").exists()


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_stored_in_eight_bits_are_refused_by_plan_and_prune(dtype, tmp_path, text):
    folder = save_tiny("llama", tmp_path / "m")
    file = folder / "model.safetensors"
    stored = load_file(file)
    save_file(
        {k: v.to(dtype) if "proj" in k else v for k, v in stored.items()}, file, metadata={"format": "pt"}
    )
    expected = rf"_proj\.weight is stored as {str(dtype)[6:]}; prune the unquantised checkpoint"
    with pytest.raises(UserError, match=expected):
        plan(folder, calibration=text, **SMALL)
    with pytest.raises(UserError, match=expected):
        prune(folder, tmp_path / "out", calibration=text, **SMALL)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_a_cast_can_spoil_is_found(dtype):
    mask = torch.tensor([[True, False], [True, True]])
    good = torch.tensor([[1.0, 0.0], [-2.0, -0.0]], dtype=dtype)
    verify("w", good, mask)
    verify("w", good.T, mask.T)
    for wrong in (-0.0, 1e-3, float("nan")):
        with pytest.raises(RuntimeError, match="w: pruned weights are not \\+0.0"):
            verify(
                "w",
                good.clone().index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(wrong, dtype=dtype)),
                mask,
            )
    for wrong in (float("inf"), -float("inf"), float("nan")):
        with pytest.raises(UserError, match="w: the solved weights are not finite"):
            verify(
                "w",
                good.clone().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(wrong, dtype=dtype)),
                mask,
            )


def test_full_disk_is_one_clear_error(tmp_path, text, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="the disk is full: .* needs"):
        prune(source, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
