"""How long pruning takes at Llama-2-7B's shapes on a GPU: seconds by phase, and peak host and device memory.

    python -m benchmarks.gpu_prune [--minutes 5] [--solvers sparsegpt wanda]

A random checkpoint, made on the spot: its weights and therefore the masks say nothing, the times do. A run of one
block and one of a few give what a block costs and what is paid once; rows of a few blocks carry the sum of the fixed
part and 32 blocks as ``extrapolated``. All 32 are pruned as well where the minutes allow it by that estimate.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import process, rows
from benchmarks.memory import megabytes, save_random

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
MARGIN = 1.25  # a run is begun when this multiple of its estimate is left
TWO_RUNS = "per_block = (seconds - seconds of the run of one block) / (blocks - 1), fixed = seconds - blocks x per_block"
ONE_RUN = "per_block = (seconds - fixed) / blocks, with the fixed part of {}"


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="llmsparse-prune-") as work:
        bench = Bench(Path(work), options)
        print("| solver | pattern | blocks | seconds | by phase | host peak | device peak | of all blocks |")
        print("|---|---|---|---|---|---|---|---|")
        for row in bench.rows():
            if options.results or options.device != "cpu":
                rows.append(Path(options.results or rows.RESULTS / "gpu_prune.json"), row | rows.provenance())
            print(_line(row), flush=True)
    for left in bench.left:
        print(f"Left out: {left}.")
    sys.exit(1 if bench.failed else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="with cpu no rows are kept unless --results is given"
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--few",
        type=int,
        default=4,
        help="blocks that are measured first, fewer in too few minutes (default 4)",
    )
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="narrower, to try the benchmark out")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--solvers", nargs="+", default=["sparsegpt", "alps"])
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--results", help="default: gpu_prune.json")
    return parser.parse_args()


class Bench:
    """Yields rows until the minutes are over; ``left`` says what was not measured, and why."""

    def __init__(self, work: Path, options: Any) -> None:
        self.work, self.options = work, options
        self.end = time.monotonic() + 60 * options.minutes
        self.left: list[str] = []
        self.failed = False
        self.models: dict[int, tuple[Path, int, float]] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """A few blocks by every solver and pattern; then all of them, by the first."""
        blocks = self.options.blocks
        cases = [(solver, pattern) for pattern in self.options.patterns for solver in self.options.solvers]
        self._warm_up()
        one = self._run(*cases[0], 1, 0.0)
        if one:
            yield one
        few, longer = self._few(one) if one else 0, []
        for case in cases if one else []:
            row = self._run(*case, few, longer[-1]["process_seconds"] if longer else 0.0)
            if row:
                longer.append(row | {"extrapolated": extrapolated(row, one, longer, blocks)})
                yield longer[-1]
        if longer and blocks > few:
            first = longer[0]
            imports = first["process_seconds"] - first["seconds"]
            estimate = first["extrapolated"]["seconds"] + imports + self.models[few][2] * blocks / few
            whole = self._run(*cases[0], blocks, estimate)
            if whole:
                yield whole

    def _few(self, one: dict[str, Any]) -> int:
        """--few, or the most blocks, of at least two, whose first run ends in time if each costs no more than ``one``."""
        room = (self.end - time.monotonic()) / MARGIN - one["process_seconds"]
        return min(self.options.few, max(2, 1 + int(room / one["seconds"])))

    def _warm_up(self) -> None:
        """A tiny run, thrown away: the first process reads libraries from a cold disk."""
        folder = self.work / "tiny"
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        save_random({**SHAPE, **tiny, "num_key_value_heads": 4}, 1, folder, self.options.device)
        asked = ("solver=sparsegpt", "calibration=builtin", "samples=2", "sequence_length=64")
        with contextlib.suppress(subprocess.SubprocessError):  # the same will be told of the first row
            device, left = f"device={self.options.device}", max(1.0, self.end - time.monotonic())
            process.run("benchmarks.process", folder, self.work / "tiny-out", *asked, device, timeout=left)

    def _run(self, solver: str, pattern: str, blocks: int, estimate: float) -> dict[str, Any] | None:
        """Nothing is begun that would not end in time, and a run that fails does not stop the next one."""
        what, remains = f"{solver} {pattern}, {blocks} blocks", self.end - time.monotonic()
        if remains <= MARGIN * estimate:
            self.left.append(f"{what}: about {estimate:.0f} s, and {max(0, remains):.0f} s are left")
            return None
        print(what, file=sys.stderr)
        try:
            return self._measure(solver, pattern, blocks)
        except subprocess.TimeoutExpired:
            self.left.append(f"{what}: the minutes were over before it ended")
        except Exception as error:
            self.left.append(f"{what}: {rows.reason(error)}")
        self.failed = True
        return None

    def _measure(self, solver: str, pattern: str, blocks: int) -> dict[str, Any]:
        options, out = self.options, self.work / "out"
        model, parameters, made = self._model(blocks)
        asked = {
            "solver": solver, "pattern": pattern, "device": options.device, "calibration": "builtin",
            "samples": options.samples, "sequence_length": options.sequence_length, "overwrite": 1,
        }  # fmt: skip
        arguments = [f"{key}={value}" for key, value in asked.items()]
        timeout = max(1.0, self.end - time.monotonic())
        result = process.run("benchmarks.process", model, out, *arguments, timeout=timeout)
        report = json.loads((out / "report.json").read_text())
        used = {key: report["options"].get(key) for key in ("device", "dtype", "batch_size")}
        facts = {"parameters": parameters, "blocks": blocks, "checkpoint_seconds": made, **self._shape()}
        phases = {"phases": report["seconds"], "phase_peaks": report["peak_memory"]}
        return {**facts, **asked, **used, **phases, **result}

    def _model(self, blocks: int) -> tuple[Path, int, float]:
        """The random checkpoint of so many blocks, its parameters, and the seconds that it took to make."""
        if blocks not in self.models:
            folder, start = self.work / f"model{blocks}", time.perf_counter()
            positions = {"max_position_embeddings": max(4096, self.options.sequence_length)}
            parameters = save_random({**self._shape(), **positions}, blocks, folder, self.options.device)
            self.models[blocks] = folder, parameters, time.perf_counter() - start
        return self.models[blocks]

    def _shape(self) -> dict[str, Any]:
        hidden = self.options.hidden
        return {**SHAPE, "hidden_size": hidden, "intermediate_size": hidden * 43 // 16}


def extrapolated(
    row: dict[str, Any], one: dict[str, Any], before: list[dict[str, Any]], blocks: int
) -> dict[str, Any]:
    """Seconds of ``blocks`` blocks after imports: what is paid once, and what a block costs, both measured.

    ``one`` is the run of one block by the solver and pattern of the first of the longer runs (``before``, or
    ``row`` itself); what is paid once (text, embeddings, output layer) depends on neither.
    """
    if not before:
        each = (row["seconds"] - one["seconds"]) / max(1, row["blocks"] - one["blocks"])
        fixed, how = row["seconds"] - row["blocks"] * each, TWO_RUNS
    else:
        fixed = before[0]["extrapolated"]["fixed"]
        each = (row["seconds"] - fixed) / row["blocks"]
        how = ONE_RUN.format(f"{one['solver']} {one['pattern']}")
    return {"blocks": blocks, "seconds": fixed + blocks * each, "per_block": each, "fixed": fixed, "how": how}


def _line(row: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["phases"].items())
    found = row.get("extrapolated")
    whole = f"{found['blocks']} blocks, extrapolated: {found['seconds']:.0f} s" if found else "measured"
    return (
        f"| {row['solver']} | {row['pattern']} | {row['blocks']} | {row['seconds']:.1f} | {phases} "
        f"| {megabytes(row['peak'] - row['imported'])} | {megabytes(row['device_peak'])} | {whole} |"
    )


if __name__ == "__main__":
    main()
