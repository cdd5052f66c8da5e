"""Seconds of solving one layer with a large model's shape, solver beside solver.

    python -m benchmarks.solve_speed [--shapes 4096x11008 4096x14336] [--solvers sparsegpt alps] [--patterns 50% 2:4]

Shapes are outputs x inputs. Weights are random, and so is the Gram: a quarter as many directions as inputs, of strengths
that fall as 1/k, above a floor, and inputs whose sizes then spread over orders of magnitude. Every solve starts from a Gram
of which nothing has been computed yet; solvers take turns, and a row has the median of its runs, the lowest and the
highest. ``error`` is tr((W-B) G (W-B)T) / tr(W G WT).
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from llmsparse.chain import solver_of
from llmsparse.device import pick_device
from llmsparse.pattern import parse_mask
from llmsparse.statistics import Gram

FLOOR = 1e-3  # of the mean of the diagonal, added to it before inputs get their sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(4096, 11008), (4096, 14336)])
    parser.add_argument("--solvers", nargs="+", default=["sparsegpt", "alps"])
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=rows.RESULTS / "solve_speed.json")
    options = parser.parse_args()
    print("| outputs x inputs | pattern | solver | seconds | to the first | error | iterations |")
    print("|" + "---|" * 7)
    for size in options.shapes:
        for row in measure(size, options):
            rows.append(options.results, row | rows.provenance())
            print(_line(row), flush=True)


def shape(text: str) -> tuple[int, int]:
    out, _, width = text.partition("x")
    return int(out), int(width)


def measure(size: tuple[int, int], options: Any) -> Iterator[dict[str, Any]]:
    """A row for each pattern and solver."""
    device = pick_device(options.device)
    outputs, inputs = size
    weight, total = problem(outputs, inputs, device)
    for pattern in options.patterns:
        turns = [
            [solve(weight, total, solver, pattern) for solver in options.solvers] for _ in range(options.runs)
        ]
        first = statistics.median(turn[0]["seconds"] for turn in turns)
        for solver, runs in zip(options.solvers, zip(*turns, strict=True), strict=True):
            seconds = [run["seconds"] for run in runs]
            median = statistics.median(seconds)
            yield {
                "outputs": outputs, "inputs": inputs, "pattern": pattern, "solver": solver, "device": device.type,
                "runs": options.runs, "seconds": median, "lowest": min(seconds), "highest": max(seconds),
                "to_first": median / first, **{key: runs[0][key] for key in ("error", "iterations")},
            }  # fmt: skip


def problem(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight (outputs, inputs) and a Gram (inputs, inputs), float32, the same for the same sizes on one device."""
    random = torch.Generator(device).manual_seed(0)
    normal = {"generator": random, "device": device}
    directions = torch.randn(max(inputs // 4, 1), inputs, **normal)  # type: ignore[call-overload]
    directions /= torch.arange(1, len(directions) + 1, device=device)[:, None].sqrt()
    gram = directions.T @ directions
    gram.diagonal().add_(FLOOR * gram.diagonal().mean())
    sizes = torch.randn(inputs, **normal).exp()  # type: ignore[call-overload]
    gram.mul_(sizes).mul_(sizes[:, None])
    return torch.randn(outputs, inputs, **normal) * inputs**-0.5, gram  # type: ignore[call-overload]


def solve(weight: Tensor, total: Tensor, solver: str, pattern: str) -> dict[str, Any]:
    """Prune ``weight`` once: seconds, error, iterations where the solver counts them."""
    gram, asked = Gram(total.clone(), tokens=1), parse_mask(pattern)
    made = solver_of(solver, {})
    started = _now(weight.device)
    found = made(weight, gram, asked)
    seconds = _now(weight.device) - started
    lost = weight - found.weight
    error = ((lost @ total) * lost).sum() / ((weight @ total) * weight).sum()
    return {"seconds": seconds, "error": float(error), "iterations": found.notes.get("iterations")}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _line(row: dict[str, Any]) -> str:
    spread = "{seconds:.1f} ({lowest:.1f} to {highest:.1f})".format(**row)
    facts = f"{row['to_first']:.1f} | {row['error']:.2e} | {row['iterations'] or ''}"
    return f"| {row['outputs']} x {row['inputs']} | {row['pattern']} | {row['solver']} | {spread} | {facts} |"


if __name__ == "__main__":
    main()
