"""What this machine has: which native kernels run, why others do not, and what is installed."""

import importlib.util
from typing import Any

import torch

from llmsparse.device import processor
from llmsparse.kernels.cpu import library
from llmsparse.report import versions

EXTRAS = {  # extra -> a module that it brings, what it is for
    "eval": ("lm_eval", "zero-shot tasks"),
    "report": ("matplotlib", "the report page"),
    "gguf": ("gguf", "reading GGUF files"),
}


def doctor() -> dict[str, Any]:
    """Kernels by instruction set with the reason why not, processor, threads, GPU, versions and extras.

    ``kernels`` is ``{instruction set: None or why it cannot be used here}``, the fastest first; ``used`` is the one
    that runs, None where packed weights are unpacked by torch for every product.
    """
    kernels = library.available()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "used": next((name for name, reason in kernels.items() if reason is None), None),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "extras": {
            name: {"installed": importlib.util.find_spec(module) is not None, "for": use}
            for name, (module, use) in EXTRAS.items()
        },
    }
