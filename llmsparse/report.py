"""What report.json records besides the run's own facts: versions, time and memory by phase, errors."""

import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsparse.statistics import Gram, SquaredNorm

PACKAGES = (
    "llmsparse",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
    "tokenizers",
    "triton",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Phases:
    """Seconds and peak memory (bytes) by phase; ``facts`` are other things found on the way.

    ``tell`` is called with the name of the phase that now runs, whenever it changes.
    """

    def __init__(self, device: torch.device | None = None, tell: Callable[[str], None] | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.facts: dict[str, Any] = {}
        self._tell = tell or (lambda name: None)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Book the time inside to ``name``; a phase inside another one is not booked twice."""
        self._book()
        self._running.append(name)
        self._tell(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()
            self._tell(self._running[-1] if self._running else "")

    def _book(self) -> None:
        """End one stretch of the running phase, and begin the next with fresh high-water marks."""
        if self.device is not None:
            torch.cuda.synchronize(self.device)  # queued work belongs to the phase that queued it
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._since, 3)
            self.peak[name] = max(self.peak.get(name, 0), resident_peak())
            if self.device is not None:
                key = f"{name} (device)"
                self.peak[key] = max(self.peak.get(key, 0), torch.cuda.max_memory_allocated(self.device))
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):  # Linux: forget the high-water mark of the resident size
            Path("/proc/self/clear_refs").write_text("5")
        self._since = now


def resident_peak() -> int:
    """The largest resident size of this process in bytes, on Linux since the phase began.

    On Linux from the kernel's own high-water mark: ``ru_maxrss`` is inherited from the parent process there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line:
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finite(value: Any) -> Any:
    """``value`` with infinities and NaN as None: JSON knows neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def relative_error(dense: Tensor, pruned: Tensor, statistics: Gram | SquaredNorm | None) -> float | None:
    """tr(D G DT) / tr(W G WT) with D = W - pruned, both (out, in); None without statistics.

    With only the diagonal of G known, off-diagonal terms count as zero.
    """
    if statistics is None or statistics.tokens == 0:
        return None
    difference = dense - pruned
    if isinstance(statistics, SquaredNorm):
        lost, whole = ((w.square() @ statistics.value).sum() for w in (difference, dense))
    else:
        gram = statistics.matrix
        lost, whole = (((w @ gram) * w).sum() for w in (difference, dense))
    return float(lost / whole) if whole > 0 else 0.0
