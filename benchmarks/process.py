"""A pruning run in a process of its own: started, timed and measured; and llmsparse's side of that process.

    python -m benchmarks.process MODEL OUT [option=value...]

calls ``llmsparse.prune(MODEL, OUT, option=value...)`` and prints one JSON line: seconds and peak memory.
"""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A first load imports these; both sides of a comparison do it before the clock and the count of memory start.
IMPORTED_LATE = (
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
)


class Measured:
    """Seconds, and bytes of peak resident memory above those resident after imports."""

    device_peak: int | None = None

    def __enter__(self) -> "Measured":
        for name in IMPORTED_LATE:
            import_module(name)

        self.imported = resident("VmRSS")
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.peak = resident("VmHWM")

    def show(self) -> None:
        import torch

        device = self.device_peak
        if device is None and torch.cuda.is_available():
            device = torch.cuda.max_memory_allocated()
        figures = {
            "seconds": self.seconds,
            "imported": self.imported,
            "peak": self.peak,
            "device_peak": device,
        }
        print(json.dumps(figures))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes.

    Not ``ru_maxrss``: on Linux a child starts with its parent's peak in it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def run(module: str, *arguments: str | Path, timeout: float | None = None) -> dict[str, Any]:
    """``python -m module arguments`` from the repository root.

    Returns its JSON line with ``process_seconds``, the whole process's wall time, added.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout,
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def main(model: str, out: str, *options: str) -> None:
    from llmsparse.prune import prune

    with Measured() as measured:
        report = prune(
            model, out, **{name: value(text) for name, _, text in (o.partition("=") for o in options)}
        )
    # pruning starts the kernel's high-water marks anew with every phase, and reports each phase's own
    peaks = report["peak_memory"]
    measured.peak = max(measured.peak, *(v for k, v in peaks.items() if not k.endswith("(device)")))
    measured.device_peak = max((v for k, v in peaks.items() if k.endswith("(device)")), default=None)
    measured.show()


def value(text: str) -> Any:
    return int(text) if text.isdecimal() else text


if __name__ == "__main__":
    main(*sys.argv[1:])
