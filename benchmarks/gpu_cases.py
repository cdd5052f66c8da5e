"""A process that measures forms of linear layers on one device, told by gpu_kernels what to measure.

    echo '{"device": "cuda", "cases": [[4096, 4096, 1]], "bad": {}, "rounds": 5, "seconds": 60}' |
        python -m benchmarks.gpu_cases

prints a JSON line before each form, so that whoever reads knows what ended or keeps the process, and after each
case. A kernel that faults leaves the device unusable to its process: this one ends then, and another goes on.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

FAULT = 86  # exit status: the device answers no more
LIMIT = 0.01  # relative error against float64; a bf16 result that is right has 0.002
CHECKED = 256  # tokens of a product that are compared with float64
COPIES = 512


class Wrong(Exception):
    """A product that differs from float64's, or that an earlier process died of."""


def main() -> None:
    asked = json.load(sys.stdin)
    if asked["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: Triton decides then
    end = time.monotonic() + asked["seconds"]
    tell(at="start")
    bench = Bench(asked)
    if asked.get("rates"):
        from benchmarks.device_clock import rates

        tell(rates=rates(bench.device))
    for outputs, inputs, tokens in asked["cases"]:
        if time.monotonic() > end:
            break
        tell(case=bench.case((outputs, inputs), tokens))


def tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


class Bench:
    """Forms of weights, which are kept from case to case while memory lasts."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import torch

        from benchmarks import gpu_forms

        self.device = torch.device(asked["device"])
        self.bad: dict[str, str] = asked["bad"]
        self.rounds: int = asked["rounds"]
        self.forms = list(gpu_forms.forms())
        self.kept: dict[Any, Any] = {}

    def case(self, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
        """The row of one shape and number of tokens: every form checked, then all of them timed in turn."""
        import torch

        random = torch.Generator(self.device).manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=random, device=self.device).to(torch.bfloat16)
        fitting = [form for form in self.forms if form.least <= tokens <= form.most]
        found: dict[str, dict[str, Any]] = {f.name: {"form": f.name, "values": f.values} for f in fitting}
        turns: dict[str, Any] = {}
        times: dict[str, list[float]] = {form.name: [] for form in fitting}
        for form in fitting:
            with self._caught(found[form.name], shape, tokens):
                facts, turns[form.name] = self._ready(form, shape, x)
                found[form.name] |= facts
        for _ in range(self.rounds):
            for name in turns:
                with self._caught(found[name], shape, tokens):
                    times[name].append(turns[name].turn())
        for name, seconds in times.items():
            if seconds and "failed" not in found[name]:
                found[name] |= _figures(seconds, found[name]["stored_bytes"], shape, tokens)
        return {"shape": shape, "tokens": tokens, "forms": _compared(list(found.values()))}

    def _ready(self, form: Any, shape: tuple[int, int], x: Any) -> tuple[dict[str, Any], Any]:
        from benchmarks.device_clock import Turns

        if form.name in self.bad:
            raise Wrong(self.bad[form.name])
        held, copies = self._copies(form, shape)
        call, notes = held.prepare(held.tensors, x)
        error = _error(call(held.tensors), x, held.exact())
        if not error <= LIMIT:
            raise Wrong(f"relative error {error:.3g} against float64, more than {LIMIT}")
        turns = Turns([partial(call, copy) for copy in copies], self.device)
        graph = {"graph": turns.graph is not None, "no_graph": turns.no_graph}
        facts = {"pattern": held.pattern, "stored_bytes": _bytes(held.tensors), "copies": turns.copies}
        return {**facts, "error": error, **graph, **notes}, turns

    def _copies(self, form: Any, shape: tuple[int, int]) -> tuple[Any, list[Any]]:
        """The held weight, and copies that together are more than twice the L2 cache, as memory allows."""
        from benchmarks.device_clock import second_level_cache
        from benchmarks.gpu_forms import Weights
        from llmsparse.device import available_memory

        key = (form.name, shape)
        if key not in self.kept:
            if self.device.type == "cuda" and available_memory(self.device) < 16 << 30:
                self._drop()
            try:
                held = form.hold(Weights(shape, self.device))
                size = _bytes(held.tensors)
                wanted = max(2, math.ceil(2 * second_level_cache(self.device) / size) + 1)
                count = max(1, min(wanted, COPIES, available_memory(self.device) // (8 * size)))
                clones = [tuple(tensor.clone() for tensor in held.tensors) for _ in range(count - 1)]
                self.kept[key] = held, [held.tensors, *clones]
            except Exception as error:
                self.kept[key] = error  # packed once, refused once
        if isinstance(self.kept[key], Exception):
            raise self.kept[key]
        return self.kept[key]

    def _drop(self) -> None:
        import torch

        self.kept.clear()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _caught(self, row: dict[str, Any], shape: tuple[int, int], tokens: int) -> Iterator[None]:
        """What fails becomes the reason in the form's row; what broke the device ends this process."""
        import torch

        from benchmarks import gpu_forms, rows

        tell(at=row["form"], shape=shape, tokens=tokens)
        try:
            yield
        except Exception as error:
            absent = isinstance(error, gpu_forms.Unavailable | NotImplementedError)
            row["failed"] = str(error)[:300] if isinstance(error, Wrong) or absent else rows.reason(error)
            row["unavailable"] = absent  # no fault of the form's
            try:
                torch.ones(1, device=self.device).sum().item()
            except Exception:
                tell(fault=row["form"], why=row["failed"])
                os._exit(FAULT)  # destructors would wait for a device that does not answer


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _error(y: Any, x: Any, exact: Any) -> float:
    """Relative to the product in float64, over a few hundred tokens; infinite where any number is not finite."""
    import torch

    if y.shape != (len(x), len(exact)) or y.dtype != x.dtype:
        raise Wrong(f"the product is {tuple(y.shape)} of {y.dtype}, not {(len(x), len(exact))} of {x.dtype}")
    if not bool(y.isfinite().all()):
        return math.inf
    some = torch.linspace(0, len(x) - 1, min(len(x), CHECKED), device=x.device).round().long()
    right = x[some].double() @ exact.T
    return float((y[some].double() - right).norm() / right.norm())


def _figures(seconds: list[float], stored: int, shape: tuple[int, int], tokens: int) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "low": min(seconds),
        "high": max(seconds),
        "stored_bytes_per_second": stored / middle,
        "dense_flops": 2 * shape[0] * shape[1] * tokens / middle,
    }


def _compared(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With each form's speed as a multiple of cuBLAS's, which comes first; none where that failed."""
    base = found[0].get("seconds")
    return [row | {"to_cublas": base / row["seconds"]} if base and "seconds" in row else row for row in found]


if __name__ == "__main__":
    main()
