"""How long a large checkpoint takes: a random one of Llama-2-7B's shape, pruned by each calibrated solver.

    python -m benchmarks.large --device cuda

Weights and therefore masks are random: seconds by phase and peak memory are all that is measured.
"""

import argparse
import json
import sys
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="narrower, to try the benchmark out")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--solvers", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--results", default=rows.RESULTS / "large.json")
    options = parser.parse_args()
    shape = {**SHAPE, "hidden_size": options.hidden, "intermediate_size": options.hidden * 43 // 16}
    with tempfile.TemporaryDirectory(prefix="llmsparse-large-") as work:
        parameters = save_random(
            {**shape, "max_position_embeddings": 4096}, options.blocks, Path(work, "model")
        )
        print(
            "| solver | pattern | seconds | by phase | host peak | device peak |\n|---|---|---|---|---|---|"
        )
        for solver in options.solvers:
            for pattern in options.patterns:
                row = _measure(Path(work), solver, pattern, options)
                rows.append(
                    Path(options.results), {"parameters": parameters, **shape, **row, **rows.provenance()}
                )
                print(_line(row), flush=True)


def _measure(work: Path, solver: str, pattern: str, options: Any) -> dict[str, Any]:
    print(f"{solver} {pattern}", file=sys.stderr)
    asked = {
        "solver": solver, "pattern": pattern, "device": options.device, "calibration": "builtin",
        "samples": options.samples, "sequence_length": options.sequence_length, "overwrite": 1,
    }  # fmt: skip
    arguments = [f"{key}={value}" for key, value in asked.items()]
    result = process.run("benchmarks.process", work / "model", work / "out", *arguments)
    report = json.loads((work / "out" / "report.json").read_text())
    used = {"device": report["options"]["device"], "dtype": report["options"]["dtype"]}
    return {**asked, "blocks": options.blocks, **used, "phases": report["seconds"], **result}


def _line(row: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["phases"].items())
    device = megabytes(row["device_peak"])
    return (
        f"| {row['solver']} | {row['pattern']} | {row['seconds']:.0f} | {phases} "
        f"| {megabytes(row['peak'] - row['imported'])} | {device} |"
    )


if __name__ == "__main__":
    main()
