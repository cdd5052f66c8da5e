"""Seconds and peak memory of exports, each in a process of its own.

    python -m benchmarks.export_cost "NAME=FOLDER" [--formats gguf packed] [--values int8 int4:32 none]

Peak resident memory above what was resident after imports, beside the largest tensor of the checkpoint.
"""

import argparse
import statistics
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import models, process, rows
from llmsparse.checkpoint import Checkpoint

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders, or NAME=FOLDER")
    parser.add_argument("--formats", nargs="*", default=["gguf", "packed"])
    parser.add_argument(
        "--values", nargs="*", default=["none", "int8", "int4:32"], help="none: as the folder has them"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", default=rows.RESULTS / "export_cost.json")
    options = parser.parse_args()
    measured = []
    for name, folder in map(models.named, options.models):
        for format in options.formats:
            for values in options.values:
                measured.append(_measure(name, folder, format, values, options.runs))
                rows.append(Path(options.results), measured[-1])
    print(table(measured))


def _measure(name: str, folder: Path, format: str, values: str, runs: int) -> dict[str, Any]:
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="llmsparse-export-") as place:
            found.append(
                process.run("benchmarks.export_cost", "--run", folder, Path(place, "out"), format, values)
            )
    checkpoint = Checkpoint.open(folder)
    return {
        "model": name,
        "format": format,
        "values": values,
        "seconds": [round(run["seconds"], 2) for run in found],
        "process_seconds": [round(run["process_seconds"], 2) for run in found],
        "bytes_above_imports": [run["peak"] - run["imported"] for run in found],
        "largest_tensor_bytes": max(map(checkpoint.bytes, checkpoint.names())),
        **rows.provenance(),
    }


def run(folder: str, out: str, format: str, values: str) -> None:
    """One export, in the process that is measured."""
    from llmsparse.export import export

    for late in (f"llmsparse.exporters.{format.replace('-', '_')}", *(("gguf",) if format == "gguf" else ())):
        import_module(late)
    with process.Measured() as measured:
        export(folder, out, format=format, values=None if values == "none" else values)
    measured.show()


def table(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| model | format | values | seconds, whole process | peak above imports | largest tensor | above that |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        seconds, peak = row["process_seconds"], statistics.median(row["bytes_above_imports"])
        lines.append(
            f"| {row['model']} | {row['format']} | {row['values']} | {statistics.median(seconds):.1f} "
            f"({min(seconds):.1f} to {max(seconds):.1f}) | {peak / MIB:.0f} MiB "
            f"| {row['largest_tensor_bytes'] / MIB:.0f} MiB | {(peak - row['largest_tensor_bytes']) / MIB:.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main()
