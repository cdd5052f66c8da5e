"""The packages that an export target needs beyond llmsparse's own, and which versions are known to work."""

from importlib import metadata
from typing import NamedTuple

from llmsparse.errors import UserError


class Extra(NamedTuple):
    """What ``pip install 'llmsparse[name]'`` brings: package -> oldest version, as pyproject.toml says too."""

    name: str | None = None
    packages: dict[str, str] = {}
    check: dict[str, str] = {}  # what --check needs besides


def require(asked: str, extra: Extra, packages: dict[str, str]) -> None:
    """Find each package in a version that is new enough.

    Raises:
        UserError: one is absent or older; the message has the command that installs it.
    """
    for package, oldest in packages.items():
        found = version(package)
        if found is None:
            raise UserError(
                f"{asked} needs the package {package}, which is not installed; pip install 'llmsparse[{extra.name}]'"
            )
        if _numbers(found) < _numbers(oldest):
            raise UserError(
                f"{asked} needs {package} {oldest} or newer, and {found} is installed; "
                f"pip install -U 'llmsparse[{extra.name}]'"
            )


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """``1.2.3rc1`` as (1, 2): what ends in letters is left out."""
    parts = text.split("+")[0].split(".")
    whole = next((i for i, part in enumerate(parts) if not part.isdigit()), len(parts))
    return tuple(int(part) for part in parts[:whole])
