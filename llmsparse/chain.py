"""Solvers by name, alone or one around another: ``refit:swaps:ria`` is Refit(Swaps(Ria()))."""

from dataclasses import fields
from typing import Any

from llmsparse import plugins
from llmsparse.errors import UserError

INNER = "inner"  # the field of a solver that holds another


def solver_of(text: str, options: dict[str, Any]) -> Any:
    """The solver that ``text`` names, the outermost first; the last one that can hold another holds its default.

    ``options``: NAME.KEY for one of them, or KEY for each that has it.

    Raises:
        UserError: an unknown solver, one that cannot hold another, an option that none has, a value that is refused.
    """
    names = [part.strip() for part in text.split(":")]
    makers = [plugins.load("solvers", name).solver for name in names]
    given = _given(names, makers, options)
    found = None
    for part, make, own in zip(reversed(names), reversed(makers), reversed(given), strict=True):
        if found is not None:
            if INNER not in options_of(make, inner=True):
                raise UserError(
                    f"solver {text}: {part} does not take the mask of another; {', '.join(_holders())} do"
                )
            own = {**own, INNER: found}
        try:
            found = make(**own)
        except TypeError as error:
            shown = " ".join(f"{key}={value}" for key, value in own.items() if key != INNER)
            raise UserError(f"--set {shown}: {part} cannot use it ({error})") from error
    return found


def innermost(solver: Any) -> Any:
    """What the solvers around it hold; a solver that holds none is it."""
    return parts(solver)[-1]


def parts(solver: Any) -> list[Any]:
    """``solver`` and what it holds, the outermost first."""
    inner = getattr(solver, INNER, None)
    return [solver] if inner is None else [solver, *parts(inner)]


def options_of(make: Any, inner: bool = False) -> list[str]:
    """The names of a solver's options."""
    return [field.name for field in fields(make) if inner or field.name != INNER]


def _given(parts: list[str], makers: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each part."""
    given: list[dict[str, Any]] = [{} for _ in parts]
    for name, value in options.items():
        whose, dot, key = name.rpartition(".")
        matches = [
            i
            for i, (part, make) in enumerate(zip(parts, makers, strict=True))
            if key in options_of(make) and (not dot or part == whose)
        ]
        if not matches:
            alone = len(parts) == 1
            known = [
                key if alone else f"{part}.{key}"
                for part, make in zip(parts, makers, strict=True)
                for key in options_of(make)
            ]
            raise UserError(
                f"--set {name}: {':'.join(parts)} has no such option; it has {', '.join(known) or 'none'}"
            )
        for i in matches:
            given[i][key] = value
    return given


def _holders() -> list[str]:
    return [name for name in plugins.names("solvers") if INNER in _names(name)]


def _names(solver: str) -> list[str]:
    return options_of(plugins.load("solvers", solver).solver, inner=True)
