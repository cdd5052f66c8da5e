"""Seconds of a call on a device: CUDA graphs over many copies of a weight between two events; a clock on a CPU."""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks import rows

GRAPH_CALLS = 16  # at least so many short calls a graph: starting one costs as much as several of them
TURN_SECONDS = 2e-3  # long against what two events cost
LONGEST_TURN = 20e-3  # a turn of slow calls takes fewer copies: what they read cannot stay in a cache


class Turns:
    """The calls of one form, one a copy of its weight, to be timed in turn with other forms.

    ``copies`` says how many are used, ``graph`` is the CUDA graph that replays them, and ``no_graph`` says why there
    is none on a GPU.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device) -> None:
        self.calls = list(calls)
        self.device = device
        self.graph: Any = None
        self.no_graph: str | None = None
        self.runs = 1
        self.copies = len(self.calls)
        if device.type != "cuda":
            return
        seconds = self._warm_up()
        self.copies = min(self.copies, max(2, int(LONGEST_TURN / seconds)))
        short = min(GRAPH_CALLS, TURN_SECONDS / seconds)
        self.calls = self.calls[: self.copies] * max(1, math.ceil(short / self.copies))
        self.graph = self._capture()
        for _ in range(2):  # the first run also warms up
            once = self.turn() * len(self.calls)
            self.runs = max(1, min(1000, math.ceil(TURN_SECONDS / max(once, 1e-6))))

    def turn(self) -> float:
        """Seconds of one call, the mean of a turn."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / len(self.calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.runs > 1:
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

    def _warm_up(self) -> float:
        """Seconds of a call that is launched from Python, on the stream of the warm-up that graphs need."""
        stream, first = _side(), self.calls[:2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in first:
                call()
            stream.synchronize()
            start = time.perf_counter()
            for call in first:
                call()
            stream.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        return max((time.perf_counter() - start) / len(first), 1e-6)

    def _capture(self) -> Any:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for call in self.calls:
                    call()
        except Exception as error:  # a call that waits for the device cannot be captured, whoever wrote it
            torch.cuda.set_stream(stream)  # a failed capture leaves its own as the current one
            torch.cuda.synchronize()
            self.no_graph = rows.reason(error)
            return None
        return graph


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
