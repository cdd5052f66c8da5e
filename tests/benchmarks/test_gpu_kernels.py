"""The GPU benchmarks, run on a CPU: what they check, what they write, and what a bad kernel does to them."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_forms, gpu_kernels
from llmsparse import plugins

ROOT = Path(__file__).parents[2]
SHAPE = (64, 128)


def kernel(**changed: Any) -> ModuleType:
    """A kernel of any 8:16 weight as kernels/*.py promise it, in plain torch."""
    module: Any = ModuleType("some_gemv")

    def dense(tensors: tuple[Tensor, ...], shape: tuple[int, int], values: str) -> Tensor:
        if values == "bf16":
            return tensors[0].view(torch.bfloat16)
        numbers, scales = tensors
        return (numbers.float().view(shape[0], scales.shape[1], -1) * scales.float()[:, :, None]).view(shape)

    def why_not(numbers: Tensor, values: str) -> str | None:
        return None if ((numbers != 0).view(-1, 16).sum(1) <= 8).all() else "more than 8 of 16"

    module.MAX_TOKENS = 8
    module.why_not = why_not
    module.pack = lambda numbers, values, scales: (numbers,) if scales is None else (numbers, scales)
    module.linear = lambda tensors, shape, values, x: (
        x.float() @ dense(tensors, shape, values).float().T
    ).to(x.dtype)
    module.unpack = lambda tensors, shape, values, out: out.copy_(dense(tensors, shape, values))
    for name, value in changed.items():
        setattr(module, name, value)
    return module


def case(monkeypatch: pytest.MonkeyPatch, tokens: int, **modules: ModuleType) -> dict[str, Any]:
    """The forms of one case by name, with these kernels alone."""
    monkeypatch.setattr(plugins, "names", lambda kind: list(modules))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"llmsparse.kernels.{name}", module)
    bench = gpu_cases.Bench({"device": "cpu", "bad": {}, "rounds": 2})
    return {form["form"]: form for form in bench.case(SHAPE, tokens)["forms"]}


def test_a_kernel_is_checked_and_timed_on_the_freest_pattern_that_it_holds(monkeypatch) -> None:
    found = case(monkeypatch, 1, some_gemv=kernel())
    for values, stored in (
        ("bf16", 64 * 128 * 2),
        ("int8", 64 * 129 + 64),
        ("int4:32", 64 * 128 + 64 * 4 * 2),
    ):
        form = found[f"some_gemv {values}"]
        assert (form["pattern"], form["stored_bytes"], form["copies"]) == ("8:16", stored, 2)
        assert form["error"] < 0.004 and form["low"] <= form["seconds"] <= form["high"]
        assert form["to_cublas"] == found["cuBLAS bf16"]["seconds"] / form["seconds"]


def test_more_tokens_than_a_kernel_takes_are_unpacked_for(monkeypatch) -> None:
    found = case(monkeypatch, 9, some_gemv=kernel(), some_gemv_unpack=kernel())
    assert "some_gemv bf16" not in found
    assert found["some_gemv_unpack + cuBLAS"]["error"] < 0.004


def test_what_cannot_be_measured_is_a_row_with_its_reason(monkeypatch) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no launch\nof it")

    wrong = kernel(linear=lambda tensors, shape, values, x: x.new_zeros(len(x), shape[0]))
    refusing = kernel(why_not=lambda numbers, values: "never")
    unfinished = kernel(linear=lambda tensors, shape, values, x: x.new_full((len(x), shape[0]), torch.nan))
    modules = {
        "wrong": wrong,
        "failing": kernel(linear=fails),
        "refusing": refusing,
        "unfinished": unfinished,
    }
    found = case(monkeypatch, 1, **modules)
    why = {name: found[f"{name} bf16"]["failed"] for name in modules}
    assert why["wrong"] == "relative error 1 against float64, more than 0.01"
    assert why["failing"] == "ValueError: no launch"
    assert why["refusing"] == "refused; 50%: never; 8:16: never; 2:4: never"
    assert "relative error inf" in why["unfinished"]
    assert [found[f"{name} bf16"]["unavailable"] for name in modules] == [False, False, True, False]
    assert found["nm_mma bf16"]["failed"] == "there is no kernels/nm_mma.py"
    assert not any("seconds" in found[f"{name} bf16"] for name in modules)


DYING = """
import json, os, sys, time
asked = json.load(sys.stdin)
print(json.dumps({"at": "start"}), flush=True)
print("a library's own words", flush=True)
for outputs, inputs, tokens in asked["cases"]:
    for name in ("first", "second"):
        print(json.dumps({"at": name, "shape": [outputs, inputs], "tokens": tokens}), flush=True)
        if name == "second" and tokens == 2 and name not in asked["bad"]:
            DEATH
    forms = [{"form": "first", "values": "bf16", "seconds": 1.0}]
    print(json.dumps({"case": {"shape": [outputs, inputs], "tokens": tokens, "forms": forms}}), flush=True)
"""


@pytest.mark.parametrize(
    ("death", "why"),
    [
        ("os._exit(7)", "ended the process with status 7 at 4 x 8 with 2 tokens"),
        ("time.sleep(60)", "hung for 2 s at 4 x 8 with 2 tokens"),
        (
            "print(json.dumps({'fault': name, 'why': 'bad address'})); os._exit(86)",
            "broke the device: bad address",
        ),
    ],
)
def test_a_form_that_ends_the_process_costs_no_other_its_figures(death: str, why: str) -> None:
    options = Namespace(device="cpu", rounds=1, minutes=1.0, patience=2.0)
    run = gpu_kernels.Run([(4, 8, 1), (4, 8, 2), (4, 8, 3)], options)
    run.command = (sys.executable, "-c", DYING.replace("DEATH", death))
    assert [row["tokens"] for row in run] == [1, 2, 3]
    assert run.bad == {"second": why} and run.left == []


def test_a_process_that_cannot_begin_is_not_begun_again() -> None:
    run = gpu_kernels.Run([(4, 8, 1)], Namespace(device="cpu", rounds=1, minutes=1.0, patience=9.0))
    run.command = (sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(3)")
    assert list(run) == [] and run.bad == {"start": "ended the process with status 3"}
    assert "status 3" in gpu_kernels.table([], run)


def test_the_most_telling_cases_come_first_and_none_is_left_out() -> None:
    wanted = gpu_kernels.cases("cuda")
    assert (
        wanted[0] == (14336, 4096, 1) and (4096, 4096, 1) in wanted[:3] and (14336, 4096, 2048) in wanted[:6]
    )
    assert len(set(wanted)) == len(wanted) == 8 * 9


def test_the_benchmark_runs_on_a_cpu_and_writes_rows_only_where_asked(tmp_path: Path) -> None:
    start = time.monotonic()
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--minutes", "0.4", "--results", str(file)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found[0]["shape"] == [64, 128] and found[0]["tokens"] == 1 and time.monotonic() - start < 60
    for row in found:
        assert {"commit", "versions", "device", "copy_bytes_per_second", "matmul_flops"} <= set(row)
        assert all(("seconds" in form) != ("failed" in form) for form in row["forms"])
        assert "seconds" in row["forms"][0] and row["forms"][0]["form"] == "cuBLAS bf16"
    assert "| 64 x 128 | 1 |" in done.stdout and set(gpu_forms.EXPECTED) <= {
        form["form"].split()[0] for form in found[0]["forms"]
    }
