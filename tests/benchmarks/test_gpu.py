"""make gpu: steps in order and in time; and pruning's rows, which are extrapolated from few blocks."""

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_prune, rows
from benchmarks.gpu import Step


def python(code: str, name: str = "step", **options: Any) -> Step:
    return Step(name, [sys.executable, "-c", code], 1.0, minutes=False, **{"least": 1.0, **options})


def test_a_step_that_fails_does_not_stop_the_next_and_fails_the_whole(tmp_path: Path, capfd: Any) -> None:
    wanted = [
        python("raise SystemExit(3)", "bad"),
        python("print('it ran')", "good"),
        python("", "lacking", needs="pytest is not installed"),
        python("", "late", least=1e6),
    ]
    assert gpu.run(wanted, 60 + gpu.RESERVE, tmp_path / "out") == 1
    out = capfd.readouterr().out
    assert "it ran" in out and (tmp_path / "out" / "good.log").read_text() == "it ran\n"
    outcomes = {line.split(" | ")[0]: line.split(" | ")[2] for line in out.splitlines() if line[:2] == "| "}
    assert outcomes["| bad"] == "failed with status 3 |" and outcomes["| good"] == "done |"
    assert outcomes["| lacking"] == "not run: pytest is not installed |"
    assert outcomes["| late"].startswith("not run: only ")
    assert gpu.run(wanted[1:], 60) == 0


def test_a_step_that_takes_too_long_is_interrupted_and_ends_with_what_it_started(
    tmp_path: Path, capfd: Any
) -> None:
    lived = tmp_path / "lived"
    child = f"import time; time.sleep(4); open({str(lived)!r}, 'w')"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far")
"""
    start = time.monotonic()
    assert gpu.run([python(code)], gpu.RESERVE + 2) == 1
    out = capfd.readouterr().out
    assert "so far" in out and "| stopped after 2 s |" in out and time.monotonic() - start < 4
    time.sleep(max(0.0, 5 - (time.monotonic() - start)))
    assert not lived.exists()


def test_every_step_is_a_module_here_and_minds_its_results_folder(tmp_path: Path) -> None:
    for step in gpu.steps(tmp_path):
        module = step.command[2]
        assert module == "pytest" or (gpu.ROOT / (module.replace(".", "/") + ".py")).exists()
        assert module == "pytest" or str(tmp_path / f"{step.name}.json") in step.command


def options(**changed: Any) -> Namespace:
    given = {"solvers": ["sparsegpt"], "patterns": ["50%", "2:4"], "few": 4, "blocks": 32, "minutes": 10.0}
    return Namespace(**given, device="cpu", hidden=64, **changed)


def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minutes: float = 10.0, bad: str = "") -> Any:
    """One of which a run of n blocks would take 7 + 3 n seconds."""
    made = gpu_prune.Bench(tmp_path, options())
    made.end = time.monotonic() + 60 * minutes
    made.models[4] = (tmp_path, 0, 2.0)

    def measure(solver: str, pattern: str, blocks: int) -> dict[str, Any]:
        if pattern == bad:
            raise RuntimeError("out of memory")
        seconds = 7.0 + 3 * blocks
        return {"solver": solver, "pattern": pattern, "blocks": blocks, "seconds": seconds} | {
            "process_seconds": seconds + 5
        }

    monkeypatch.setattr(made, "_measure", measure)
    monkeypatch.setattr(made, "_warm_up", lambda: None)
    return made


def test_all_blocks_are_extrapolated_from_two_runs_and_measured_where_time_allows(
    monkeypatch, tmp_path
) -> None:
    made = bench(monkeypatch, tmp_path)
    found = list(made.rows())
    assert [(row["pattern"], row["blocks"]) for row in found] == [
        ("50%", 1),
        ("50%", 4),
        ("2:4", 4),
        ("50%", 32),
    ]
    for row, how in zip(
        found[1:3], (gpu_prune.TWO_RUNS, "with the fixed part of sparsegpt 50%"), strict=True
    ):
        extrapolated = row["extrapolated"]
        assert (extrapolated["per_block"], extrapolated["fixed"]) == pytest.approx((3.0, 7.0))
        assert extrapolated["seconds"] == pytest.approx(7 + 32 * 3) and how in extrapolated["how"]
    assert "extrapolated" not in found[3] and not made.left and not made.failed


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, tmp_path) -> None:
    made = bench(monkeypatch, tmp_path, minutes=2.0)  # 103 + 5 + 16 s, and a margin
    assert [row["blocks"] for row in made.rows()] == [1, 4, 4] and not made.failed
    assert made.left[0].startswith("sparsegpt 50%, 32 blocks: about 124 s, and 1")


def test_fewer_blocks_are_measured_where_the_minutes_would_not_do(monkeypatch, tmp_path) -> None:
    made = bench(
        monkeypatch, tmp_path, minutes=0.75
    )  # 45 s: a margin, 15 s for one block, 10 s for each other
    made.models[3] = (tmp_path, 0, 2.0)
    assert [row["blocks"] for row in made.rows()] == [1, 3, 3] and not made.failed


def test_a_run_that_fails_does_not_stop_the_others(monkeypatch, tmp_path) -> None:
    made = bench(monkeypatch, tmp_path, bad="2:4")
    assert [row["blocks"] for row in made.rows()] == [1, 4, 32]
    assert made.failed and made.left == ["sparsegpt 2:4, 4 blocks: RuntimeError: out of memory"]


@pytest.mark.long
def test_pruning_is_measured_end_to_end(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "rows.json"
    small = ["--hidden", "64", "--few", "2", "--blocks", "2", "--samples", "2", "--sequence-length", "64"]
    given = ["gpu_prune", "--device", "cpu", "--patterns", "50%", "--results", str(file), *small]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        gpu_prune.main()
    assert ended.value.code == 0
    measured = [(row["solver"], row["blocks"]) for row in rows.read(file)]
    assert measured == [("sparsegpt", 1), ("sparsegpt", 2), ("alps", 2)]


def test_sources_without_git_say_which_commit_they_are_only_where_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows.commit() == "unknown"
    monkeypatch.setenv("LLMSPARSE_COMMIT", "abc")
    assert rows.commit() == "abc"
