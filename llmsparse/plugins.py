"""The plug-in folders: a file's name is its plug-in's name, and the folder listing is the registry."""

import importlib
from pathlib import Path
from types import ModuleType

from llmsparse.errors import UserError

ROOT = Path(__file__).parent


def names(package: str) -> list[str]:
    """The plug-ins of one kind (``solvers``...), from the folder, without importing any."""
    return sorted(file.stem for file in (ROOT / package).glob("*.py") if not file.stem.startswith("_"))


def kinds() -> list[str]:
    """The plug-in kinds that exist: every sub-folder of the package that holds at least one."""
    return sorted(
        folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists() and names(folder.name)
    )


def load(package: str, name: str) -> ModuleType:
    """Import one plug-in's module; ``c-header`` is another way to write ``c_header``.

    Raises:
        UserError: there is no plug-in of that name; the message lists the known ones.
    """
    module = name.replace("-", "_")
    if module not in names(package):
        raise UserError(f"{package[:-1]} {name!r} is unknown; known: {', '.join(names(package))}")
    return importlib.import_module(f"llmsparse.{package}.{module}")
