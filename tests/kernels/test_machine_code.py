"""What kernels compile to, without a GPU: no spills, wide loads, and instructions for each weight within a budget.

BUDGETS holds, for a Triton version and a kernel, lane instructions for each dense weight of the default launch at 50 %
sparsity: a tenth above what was measured when it was written. A new Triton is measured before it is trusted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton")

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]


class Expected(NamedTuple):
    budget: dict[str, float]  # Triton's minor version -> lane instructions for each dense weight
    wide: str | None = "LDG.128"  # what loads weights; None where they are gathered
    also: str | None = None  # an instruction that is promised


EXPECTED = {
    "nm_mma": Expected({"3.6": 1.4, "3.9": 1.35}, also="HMMA.SP"),
    "nm_mma_unpack": Expected({"3.6": 8.8, "3.9": 8.8}),
    "nm_mma_inputs": Expected({}, None),
    "obs_sweep": Expected({}, None),
    "grid_fit": Expected({}, None),
    "nm_gemv": Expected({"3.6": 3.7, "3.9": 3.7}),
    "n16_gemv": Expected({"3.6": 6.5, "3.9": 4.5}),
    "bitmask_gemv": Expected({"3.6": 14.0, "3.9": 13.5}, None),
    "nm_gemv_unpack": Expected({"3.6": 8.2, "3.9": 6.0}),
    "n16_gemv_unpack": Expected({"3.6": 26.0, "3.9": 25.0}, None),
    "bitmask_gemv_unpack": Expected({"3.6": 11.6, "3.9": 16.5}, None),
    "splits": Expected({}, None),
}
MINOR = ".".join(triton.__version__.split(".")[:2])


def compiled(*arguments: str, script: str = "machine_code.py") -> list[Row]:
    """The rows of a script in a process where Triton compiles, with the Triton of this one."""
    folders = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT)]
    settings = {"PYTHONPATH": os.pathsep.join(folders), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "tests/kernels" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def defaults() -> list[Row]:
    return compiled(*EXPECTED, "--targets", "80", "90")


@pytest.mark.parametrize("kernel", EXPECTED)
def test_default_launches_do_not_spill_and_load_wide(kernel: str, defaults: list[Row]) -> None:
    rows = [row for row in defaults if row["kernel"] == kernel]
    assert {row["target"] for row in rows} == {80, 90}
    for row in rows:
        assert row["triton"] == triton.__version__
        assert row["spills"] == 0, row
        assert row["broken"] is None, row
        for wanted in (EXPECTED[kernel].wide, EXPECTED[kernel].also):
            assert wanted is None or row["loop"].get(wanted, 0) > 0, row


@pytest.mark.parametrize("kernel", [kernel for kernel, expected in EXPECTED.items() if expected.budget])
def test_instructions_for_each_weight_are_within_the_budget(kernel: str, defaults: list[Row]) -> None:
    budget = EXPECTED[kernel].budget
    if MINOR not in budget:
        pytest.skip(f"no budget for {kernel} with Triton {MINOR}: measured are {', '.join(budget)}")
    for row in defaults:
        if row["kernel"] == kernel:
            assert row["per_weight"] <= budget[MINOR], row


@pytest.mark.long
@pytest.mark.parametrize("kernel", EXPECTED)
def test_every_launch_compiles_without_spills(kernel: str) -> None:
    rows = compiled(kernel, "--targets", "80", "89", "90", "120", "--all")
    assert {row["target"] for row in rows} == {80, 89, 90, 120}
    assert not [row for row in rows if row["spills"] or row["broken"]]


@pytest.mark.long
@pytest.mark.parametrize("kernel", [kernel for kernel in EXPECTED if not kernel.startswith("nm_mma")])
def test_every_launch_compiles_for_amd(kernel: str) -> None:
    rows = compiled(kernel, script="amd_code.py")
    assert rows
    for row in rows:
        assert row["scratch"] == 0, row  # bytes of spills
