"""What this machine has: which native kernels run, why others do not, and what is installed."""

import importlib.util
from typing import Any

import torch

from llmsparse import choice
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
    that runs, None where packed weights are unpacked by torch for every product. ``products`` are the timings, in
    seconds, by which packed layers were given the faster product.

    Raises:
        UserError: LLMSPARSE_ISA names an instruction set that cannot be used here.
    """
    kernels = library.available()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "used": library.used(),
        "products": {
            key: {
                "packed": timing.packed,
                "dense": timing.dense,
                "used": "dense" if timing.dense_wins else "packed",
            }
            for key, timing in choice.remembered().items()
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "extras": {
            name: {"installed": importlib.util.find_spec(module) is not None, "for": use}
            for name, (module, use) in EXTRAS.items()
        },
    }
