"""Seconds of a call on a device: CUDA graphs over many copies of a weight between two events; a clock on a CPU."""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks import rows

GRAPH_CALLS = 16  # at least so many calls a graph: starting one costs as much as several short kernels
TURN_SECONDS = 2e-3  # long against what two events cost


class Turns:
    """The calls of one form, one a copy of its weight, to be timed in turn with other forms.

    ``graph`` says whether a CUDA graph replays them; ``no_graph`` why not, on a GPU.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device) -> None:
        self.calls = list(calls) * (math.ceil(GRAPH_CALLS / len(calls)) if device.type == "cuda" else 1)
        self.device = device
        self.no_graph: str | None = None
        self.graph = self._capture() if device.type == "cuda" else None
        self.runs = 1
        for _ in range(2 if device.type == "cuda" else 0):  # the first run also warms up
            seconds = self.turn() * len(self.calls)
            self.runs = max(1, min(1000, math.ceil(TURN_SECONDS / max(seconds, 1e-6))))

    def turn(self) -> float:
        """Seconds of one call, the mean of a turn."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / len(self.calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run()  # clocks and caches are as this form leaves them, not as the one before did
        start.record()
        for _ in range(self.runs):
            self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self.runs * len(self.calls))

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for call in self.calls:
            call()

    def _capture(self) -> Any:
        stream = _side()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run_all()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run_all()
        except Exception as error:  # a call that waits for the device cannot be captured, whoever wrote it
            torch.cuda.synchronize()
            self.no_graph = rows.reason(error)
            return None
        return graph

    def _run_all(self) -> None:
        for call in self.calls:
            call()


@cache
def _side() -> Any:
    """One stream to warm up on: each stream keeps memory of its own."""
    return torch.cuda.Stream()


def rates(device: torch.device) -> dict[str, Any]:
    """What the device reaches at best: bytes/s of a copy (read and written), FLOP/s of a bf16 matrix product."""
    size, length = (8192, 1 << 29) if device.type == "cuda" else (128, 1 << 16)
    source = torch.ones(length, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = _best(Turns([lambda: target.copy_(source)], device))
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return {
        "copy_bytes_per_second": 4 * length / copied,
        "matmul_flops": 2 * size**3 / _best(Turns([lambda: a @ b], device)),
        "matmul_size": size,
        "second_level_cache": second_level_cache(device),
        "cuda": torch.version.cuda,
    }


def _best(turns: Turns) -> float:
    return min(turns.turn() for _ in range(5))


def second_level_cache(device: torch.device) -> int:
    """Bytes of the device's L2 cache; on a CPU 0, where nothing is to be said of memory."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
