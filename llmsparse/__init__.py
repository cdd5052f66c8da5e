"""llmsparse: make large language models sparse after training, and make the sparsity pay."""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name -> the module that defines it, imported when it is first used
    "prune": "llmsparse.prune",
    "recover": "llmsparse.recover",
    "quantize": "llmsparse.quantize",
    "plan": "llmsparse.plan",
    "evaluate": "llmsparse.eval.evaluate",
    "compare": "llmsparse.compare",
    "inspect": "llmsparse.inspect",
    "bench": "llmsparse.bench",
    "doctor": "llmsparse.doctor",
    "export": "llmsparse.export",
    "load": "llmsparse.quantizer",
    "register": "llmsparse.quantizer",
    "push": "llmsparse.push",
    "card": "llmsparse.card",
    "generate": "llmsparse.generate",
    "demo": "llmsparse.demo",
    "Unstructured": "llmsparse.pattern",
    "NM": "llmsparse.pattern",
    "UserError": "llmsparse.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmsparse' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps ``llmsparse.prune`` the function, also after the module of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
