"""Products of pruned linear layers on a GPU: every Triton kernel, cuSPARSELt and int4, against cuBLAS.

    python -m benchmarks.gpu_kernels [--minutes 3] [--device cpu]

The linear layers of Llama-3-8B and SmolLM2-135M, 1 to 4096 tokens in bf16, the most telling cases first until the
minutes are over. Each form goes round copies of its weight that together exceed the L2 cache; every product is
compared with float64 before it is timed; medians of turns that all forms take one after another. A process of its
own measures, so that a kernel that faults or hangs costs its own figures and no others.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from benchmarks import rows

# (out, in): gate and up, q and o, down, k and v of Llama-3-8B; the same of SmolLM2-135M
SHAPES = [(14336, 4096), (4096, 4096), (4096, 14336), (1024, 4096)]
SHAPES += [(1536, 576), (576, 576), (576, 1536), (192, 576)]
TOKENS = [1, 16, 2048, 8, 64, 32, 256, 4096, 1024]
TINY = {"shapes": [(64, 128)], "tokens": [1, 8, 40]}  # for the interpreter
PATIENCE = 90  # seconds without a word from the measuring process: a kernel that hangs
RESTARTS = 6
Case = tuple[int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="cpu: tiny shapes in Triton's interpreter, to try it out"
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form (default 5)")
    parser.add_argument("--patience", type=float, default=PATIENCE, help=argparse.SUPPRESS)
    parser.add_argument("--results", help="default: gpu_kernels.json; with --device cpu no rows are kept")
    options = parser.parse_args()
    file = Path(options.results or rows.RESULTS / "gpu_kernels.json")
    run = Run(cases(options.device), options)
    measured = []
    with contextlib.suppress(KeyboardInterrupt):  # what was measured is told
        for row in run:
            measured.append(row)
            if options.results or options.device != "cpu":
                rows.append(file, row | rows.provenance())
            print(f"{row['shape'][0]} x {row['shape'][1]}, {row['tokens']} tokens", file=sys.stderr)
    print(table(measured, run))
    every = [form for row in measured for form in row["forms"]]
    if run.bad or not measured or any("failed" in form and not form["unavailable"] for form in every):
        sys.exit(1)


def cases(device: str) -> list[Case]:
    """Every shape and number of tokens, those that say most first."""
    shapes, tokens = (TINY["shapes"], TINY["tokens"]) if device == "cpu" else (SHAPES, TOKENS)
    ranked = [(i + j, i, (*shape, count)) for i, shape in enumerate(shapes) for j, count in enumerate(tokens)]
    return [case for _, _, case in sorted(ranked)]


class Run:
    """Iterates the rows; starts the measuring process again, without the form that ended it."""

    command = (sys.executable, "-m", "benchmarks.gpu_cases")

    def __init__(self, wanted: list[Case], options: Any) -> None:
        self.left = list(wanted)
        self.options = options
        self.end = time.monotonic() + 60 * options.minutes
        self.bad: dict[str, str] = {}
        self.rates: dict[str, float] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(RESTARTS):
            seconds = self.end - time.monotonic()
            if not self.left or seconds <= 0:
                return
            before = len(self.bad)
            yield from self._process(seconds)
            if len(self.bad) == before or "start" in self.bad:  # it ended as it should, or cannot begin
                return

    def _process(self, seconds: float) -> Iterator[dict[str, Any]]:
        device, rounds = self.options.device, self.options.rounds
        asked = {"device": device, "cases": self.left, "bad": self.bad, "rounds": rounds, "seconds": seconds}
        process = subprocess.Popen(
            self.command, cwd=rows.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked | {"rates": not self.rates}))
            process.stdin.close()
            yield from self._rows(process)
        finally:
            process.kill()
            process.wait()

    def _rows(self, process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
        at = "start"
        for event in _events(process, self.options.patience, self.end):
            if "rates" in event:
                self.rates = event["rates"]
            elif "case" in event:
                row = event["case"]
                self.left.remove((*row["shape"], row["tokens"]))
                yield row | self.rates | {"device": self.options.device}
            elif "fault" in event:
                self.bad[event["fault"]] = f"broke the device: {event['why']}"
                return
            elif "lost" in event:
                self.bad[at] = f"{event['lost']} at {at_case(event)}" if "tokens" in event else event["lost"]
                return
            else:
                at = event["at"]


def at_case(event: dict[str, Any]) -> str:
    return f"{event['shape'][0]} x {event['shape'][1]} with {event['tokens']} tokens"


def _events(process: Any, patience: float, end: float) -> Iterator[dict[str, Any]]:
    """What the process tells; ``lost`` with the reason when it died or fell silent before its time was over."""
    lines: Queue[str | None] = Queue()

    def read() -> None:
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last: dict[str, Any] = {}
    while True:
        grace = end + 20 - time.monotonic()  # a case that began in time may end
        try:
            line = lines.get(timeout=max(0.0, min(patience, grace)))
        except Empty:
            if patience <= grace:
                yield last | {"lost": f"hung for {patience:.0f} s"}
            return
        if line is None:
            status = process.wait()
            if status:
                yield last | {"lost": f"ended the process with status {status}"}
            return
        try:
            last = json.loads(line)
        except json.JSONDecodeError:  # something that a library printed
            continue
        yield last


def table(measured: list[dict[str, Any]], run: Run) -> str:
    """Markdown: what each form gains over cuBLAS, the best rates of the device, what failed and what was left out."""
    if not measured:
        return "nothing was measured: " + ("; ".join(run.bad.values()) or "no time")
    first = measured[0]
    copy, product = first.get("copy_bytes_per_second", 0.0), first.get("matmul_flops", 0.0)
    lines = [
        f"Copy {copy / 1e12:.2f} TB/s, bf16 product of {first.get('matmul_size')}^3 {product / 1e12:.0f} TFLOP/s. "
        "cuBLAS in microseconds; other forms as multiples of its speed (lowest to highest turn).\n"
    ]
    every = [form for row in measured for form in row["forms"]]
    names = list(dict.fromkeys(form["form"] for form in every if "seconds" in form))
    lines += [f"| out x in | tokens | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    for row in sorted(measured, key=lambda row: (-row["shape"][0] * row["shape"][1], row["tokens"])):
        found = {form["form"]: form for form in row["forms"]}
        cells = [_cell(found.get(name), row["forms"][0]) for name in names]
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['tokens']} | {' | '.join(cells)} |")
    lines += ["", *_best(measured), *_failures(measured)]
    if run.left:
        lines.append(
            f"Not reached in the time given: {', '.join(f'{o} x {i} at {t}' for o, i, t in run.left)}."
        )
    return "\n".join(lines)


def _cell(form: dict[str, Any] | None, base: dict[str, Any]) -> str:
    if form is None:
        return ""
    if "seconds" not in form:
        return "failed"
    mark = "" if form.get("graph") or form.get("no_graph") is None else " *"  # launches are in the time
    if form is base or "to_cublas" not in form:  # cuBLAS itself, or a case in which that failed
        low, middle, high = (1e6 * form[key] for key in ("low", "seconds", "high"))
        return f"{middle:.4g} ({low:.4g}-{high:.4g}){mark}"
    low, high = (base["seconds"] / form[key] for key in ("high", "low"))
    return f"{form['to_cublas']:.2f} ({low:.2f}-{high:.2f}){mark}"


def _best(measured: list[dict[str, Any]]) -> list[str]:
    """Each form's highest rates, as shares of what the device reaches."""
    copy, product = measured[0].get("copy_bytes_per_second"), measured[0].get("matmul_flops")
    if not copy or not product:
        return []
    every = [form for row in measured for form in row["forms"] if "seconds" in form]
    lines = ["| form | pattern | most bytes stored/s | of the copy | most dense FLOP/s | of the product |"]
    lines.append("|" + "---|" * 6)
    for name in dict.fromkeys(form["form"] for form in every):
        own = [form for form in every if form["form"] == name]
        read, flops = (max(form[key] for form in own) for key in ("stored_bytes_per_second", "dense_flops"))
        lines.append(
            f"| {name} | {own[0]['pattern']} | {read / 1e12:.3f} T | {read / copy:.0%} "
            f"| {flops / 1e12:.1f} T | {flops / product:.0%} |"
        )
    return [*lines, ""]


def _failures(measured: list[dict[str, Any]]) -> list[str]:
    every = [form for row in measured for form in row["forms"]]
    failed = Counter((form["form"], form["failed"]) for form in every if "failed" in form)
    uncaptured = Counter((form["form"], form["no_graph"]) for form in every if form.get("no_graph"))
    lines = [f"- {name}: {why} ({count} cases)" for (name, why), count in failed.items()]
    return lines + [f"- * {name}, no graph: {why} ({count})" for (name, why), count in uncaptured.items()]


if __name__ == "__main__":
    main()
