"""bench and doctor: every form is timed, and what is missing is said."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmsparse import plugins
from llmsparse.bench import bench
from llmsparse.doctor import doctor
from llmsparse.errors import UserError
from llmsparse.kernels.cpu import library
from llmsparse.prune import prune
from tests.packed_tiny import packed
from tests.pruned import ONE_THREAD
from tests.tiny import save_tiny

needs_kernels = pytest.mark.skipif(
    all(library.available().values()), reason="the native kernels were not built"
)
FORMS = {"torch fp32", "torch bf16"} | {
    f"{form} {v}" for form in ("dense C", "packed") for v in ("bf16", "int8", "int4:32")
}


@needs_kernels
def test_every_form_of_every_shape_is_timed(tmp_path, text) -> None:
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", solver="magnitude")
    before = torch.get_num_threads()
    result = bench(tmp_path / "out", calls=8, threads="1,2")
    shapes = {(32, 32), (16, 32), (64, 32), (32, 64)}
    assert {(tuple(r["shape"]), r["form"], r["threads"]) for r in result["rows"]} == {
        (shape, form, threads) for shape in shapes for form in FORMS for threads in (1, 2)
    }
    for row in result["rows"]:
        assert row["calls"] >= 8 and 0 < row["min"] <= row["spread"][0] <= row["median"] <= row["spread"][1]
    for total in result["totals"]:
        mine = [r for r in result["rows"] if (r["form"], r["threads"]) == (total["form"], total["threads"])]
        assert total["min"] == pytest.approx(sum(r["layers"] * r["min"] for r in mine))
    assert sum(r["layers"] for r in result["rows"] if r["form"] == "packed int8" and r["threads"] == 1) == 21
    assert result["zeros"] == pytest.approx(0.5) and torch.get_num_threads() == before


@needs_kernels
def test_a_dense_model_needs_a_pattern(tmp_path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(UserError, match="--pattern 50%"):
        bench(source)
    assert bench(source, pattern="2:4", calls=1, values="int8")["zeros"] == 0.5


@needs_kernels
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "0"}, "threads"),
        ({"values": "int9"}, "int9"),
        ({"values": "fp16"}, "fp16"),
        ({"tokens": 9}, "1 to 8"),
        ({"tokens": 0}, "tokens"),
        ({"calls": 0}, "calls"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        bench(save_tiny("llama", tmp_path / "source"), pattern="50%", **options)


@needs_kernels
def test_a_packed_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="exported from"):
        bench(packed(tmp_path, "llama", "int8"))


def test_without_kernels_bench_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(library, "available", lambda: {"native": "not built here"})
    with pytest.raises(UserError, match="not built here"):
        bench(save_tiny("llama", tmp_path / "source"), pattern="50%")


def test_doctor_names_the_kernels_and_why_others_do_not_run() -> None:
    found = doctor()
    assert found["kernels"] == library.available()
    usable = [name for name, why in found["kernels"].items() if why is None]
    assert found["used"] == (usable[0] if usable else None)
    assert found["versions"]["torch"] == torch.__version__
    wanted = {plugins.load("exporters", name).EXTRA.name for name in plugins.names("exporters")} - {None}
    assert set(found["extras"]) == {"eval", "report"} | wanted


def test_doctor_without_a_library_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(library, "available", lambda: {"native": "not built here"})
    found = doctor()
    assert found["used"] is None and found["kernels"] == {"native": "not built here"}


@needs_kernels
@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["bench", "model", "--pattern", "50%"],
        ["generate", "packed", "--prompt", "a", "--max-new-tokens", "4"],
    ],
)
def test_an_instruction_set_that_is_unknown_is_one_line(command: list[str], tmp_path) -> None:
    save_tiny("llama", tmp_path / "model")
    packed(tmp_path / "made", "llama", "int8").rename(tmp_path / "packed")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "llmsparse", *command], cwd=tmp_path, capture_output=True, text=True,
        env={**ONE_THREAD, "LLMSPARSE_ISA": "mmx", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "LLMSPARSE_ISA=mmx is unknown; known are" in done.stderr
