"""Decoding's products on a CPU: packed weights against torch and against good dense kernels of the same values.

    python -m benchmarks.cpu_products [NAME=FOLDER ...] [--threads 1,2] [--patterns 50% 70%]

Cases: eight random matrices of 4096 x 4096, the linear layers of a random llama of 1B shapes (16 blocks, 2048 wide,
8192 inside), and those of every model named. One process, all forms in turn, at least 96 calls a shape; each layer
comes round after all others, so that weights come from memory. Ratios are of minima: hosts are shared.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import models, rows
from llmsparse.bench import Layer, bench, products, timed, totals
from llmsparse.kernels.cpu import library
from llmsparse.pattern import parse
from llmsparse.progress import Quiet
from llmsparse.values import Values

VALUES = ("bf16", "int8", "int4:32")
BLOCK = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
RANDOM = {"4096 x 4096": 8 * [(4096, 4096)], "1B shapes": 16 * BLOCK}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="NAME=FOLDER, besides the random ones")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--patterns", nargs="+", default=["50%", "70%"])
    parser.add_argument("--calls", type=int, default=96)
    parser.add_argument("--results", default=rows.RESULTS / "cpu_products.json")
    options = parser.parse_args()
    measured = []
    for pattern in options.patterns:
        for case, shapes in RANDOM.items():
            measured += _record(case, pattern, list(_random(shapes, pattern, options)), options)
        for name, folder in map(models.named, options.models):
            found = bench(
                folder, pattern=pattern, values=",".join(VALUES), threads=options.threads, tokens=options.tokens,
                calls=options.calls,
            )  # fmt: skip
            measured += _record(name, pattern, found["rows"], options)
    print(table(measured))


def _random(shapes: list[tuple[int, int]], pattern: str, options: Any) -> Iterator[dict[str, Any]]:
    """Rows of layers with random weights, pruned by magnitude."""
    random, chosen = torch.Generator().manual_seed(0), parse(pattern)
    kinds, layers = [Values.parse(text) for text in VALUES], []
    for shape in shapes:
        weight = torch.randn(shape, generator=random) * 0.02
        weight = weight.masked_fill(~chosen.select(weight.abs()), 0.0).to(torch.bfloat16)
        inputs = torch.randn(options.tokens, shape[1], generator=random).to(torch.bfloat16)
        layers.append(Layer(shape, 0.0, inputs, products(weight, kinds)))
    before = torch.get_num_threads()
    for count in map(int, options.threads.split(",")):
        yield from timed(layers, count, options.calls, Quiet())
    torch.set_num_threads(before)


def _record(case: str, pattern: str, found: list[dict[str, Any]], options: Any) -> list[dict[str, Any]]:
    """Write one row with every shape's figures, and return the sums over all layers."""
    sums = [{"case": case, "pattern": pattern, **total} for total in totals(found)]
    row = {
        "case": case,
        "pattern": pattern,
        "tokens": options.tokens,
        "isa": library.used(),
        "rows": found,
        "totals": totals(found),
    }
    rows.append(Path(options.results), {**row, **rows.provenance()})
    return sums


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: minima in ms over all layers of a case, and the packed forms' ratios to both baselines."""
    lines = [
        "| layers | zeros | threads | values | torch fp32 | torch bf16 | dense C | packed | to torch bf16 | to dense C |",
        "|" + "---|" * 10,
    ]
    cases = dict.fromkeys((row["case"], row["pattern"], row["threads"]) for row in measured)
    for case, pattern, threads in cases:
        found = {
            row["form"]: row
            for row in measured
            if (row["case"], row["pattern"], row["threads"]) == (case, pattern, threads)
        }
        for values in VALUES:
            forms = [
                found[name]["min"]
                for name in ("torch fp32", "torch bf16", f"dense C {values}", f"packed {values}")
            ]
            ratios = [f"{forms[1] / forms[3]:.2f}", f"{forms[2] / forms[3]:.2f}"]
            cells = [case, pattern, str(threads), values, *(f"{1e3 * time:.3g}" for time in forms), *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
