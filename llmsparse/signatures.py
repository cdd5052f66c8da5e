"""A function's signature from its source alone: options are known before torch is imported."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmsparse.recipe import with_options
from llmsparse.recovery import Recovery

ANNOTATIONS = {"Path": Path, "Any": Any, "Callable": Callable, "Recovery": Recovery}


def signature_of(module: str, function: str) -> inspect.Signature:
    """What ``inspect.signature`` says of a function of this package, without importing its module.

    A module that spells out a recipe's options (``function.__signature__ = with_options(function, ...)``) is
    understood.
    """
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    names = {**ANNOTATIONS, **_constants(tree)}
    own = inspect.Signature([*_parameters(found.args, names)], return_annotation=dict[str, Any])
    extended = next((call for call in map(_extension, tree.body) if call and call[0] == function), None)
    if extended is None:
        return own

    def stub() -> None:
        """Has the parameters that ``with_options`` extends."""

    stub.__signature__ = own  # type: ignore[attr-defined]
    return with_options(stub, *(_value(argument, names) for argument in extended[1]))


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names of the module that stand for literals."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def _extension(node: ast.stmt) -> tuple[str, list[ast.expr]] | None:
    """Of ``f.__signature__ = with_options(f, ...)``: f, and what follows it."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if not isinstance(target, ast.Attribute) or target.attr != "__signature__":
        return None
    assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    return ast.unparse(target.value), node.value.args[1:]


def _parameters(arguments: ast.arguments, names: dict[str, Any]) -> Iterator[inspect.Parameter]:
    plain, empty = arguments.args, inspect.Parameter.empty
    missing = [None] * (len(plain) - len(arguments.defaults))
    defaults: list[ast.expr | None] = [*missing, *arguments.defaults, *arguments.kw_defaults]
    for number, (argument, default) in enumerate(zip([*plain, *arguments.kwonlyargs], defaults, strict=True)):
        positional = number < len(plain)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        value = empty if default is None else _value(default, names)
        annotation = empty if argument.annotation is None else _value(argument.annotation, names)
        yield inspect.Parameter(argument.arg, kind, default=value, annotation=annotation)
    if (rest := arguments.kwarg) is not None:
        yield inspect.Parameter(rest.arg, inspect.Parameter.VAR_KEYWORD)


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    """Of an annotation or a default in this package's own source."""
    return eval(compile(ast.Expression(expression), "<signature>", "eval"), dict(names))
