"""What this machine has: which native kernels run, why others do not, and what is installed."""

import importlib.util
from typing import Any

import torch

from llmsparse import choice, dispatch, extras, gpu, plugins
from llmsparse.device import processor
from llmsparse.kernels.cpu import library
from llmsparse.report import versions

EXTRAS = {  # extra -> a module that it brings, what it is for
    "eval": ("lm_eval", "zero-shot tasks"),
    "report": ("matplotlib", "the report page"),
}


def doctor() -> dict[str, Any]:
    """Kernels by instruction set with the reason why not, processor, threads, GPU, versions and extras.

    ``kernels`` is ``{instruction set: None or why it cannot be used here}``, the fastest first; ``used`` is the one
    that runs, None where packed weights are unpacked by torch for every product. ``products`` are the timings, in
    seconds, by which packed layers were given the faster product; ``gpu_kernels`` and ``gpu_products`` say the same of
    a GPU, in words.

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
        "gpu_kernels": _gpu_kernels() if torch.cuda.is_available() else {},
        "gpu_products": dispatch.remembered(),
        "versions": versions(),
        "extras": _extras(),
    }


def _extras() -> dict[str, dict[str, Any]]:
    """Whether what each extra brings is installed, and what it is for."""
    found = {
        name: {"installed": importlib.util.find_spec(module) is not None, "for": use}
        for name, (module, use) in EXTRAS.items()
    }
    for format in plugins.names("exporters"):
        extra = plugins.load("exporters", format).EXTRA
        if extra.name is not None:
            installed = all(map(extras.version, extra.packages))
            found[extra.name] = {"installed": installed, "for": f"export --format {format}"}
    return found


def _gpu_kernels() -> dict[str, str | None]:
    """For each kernel why it does not run on the GPU here, or None."""
    names, device = (*gpu.KERNELS, gpu.CUSPARSELT), torch.device("cuda", torch.cuda.current_device())
    if (reason := gpu.why_no_kernels()) is not None:
        return dict.fromkeys(names, reason)
    return {name: gpu.unusable(name, device, "bf16", torch.bfloat16) for name in names}
