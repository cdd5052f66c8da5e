"""A function's signature from its source alone: options are known before torch is imported."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmsparse.recipe import with_options

ANNOTATIONS = {"Path": Path, "Any": Any, "Callable": Callable}


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
    extended = next((node.value for node in tree.body if _extends(node, function)), None)
    if not isinstance(extended, ast.Call):
        return own

    def stub() -> None:
        """Has the parameters that ``with_options`` extends."""

    stub.__signature__ = own  # type: ignore[attr-defined]
    return with_options(stub, *(_value(argument, names) for argument in extended.args[1:]))


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


def _extends(node: ast.stmt, function: str) -> bool:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(target, ast.Attribute) and ast.unparse(target) == f"{function}.__signature__"


def _parameters(arguments: ast.arguments, names: dict[str, Any]) -> Iterator[inspect.Parameter]:
    plain, empty = arguments.args, inspect.Parameter.empty
    defaults = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    both = [*zip(plain, defaults, [kinds[0]] * len(plain), strict=True)]
    both += zip(
        arguments.kwonlyargs, arguments.kw_defaults, [kinds[1]] * len(arguments.kwonlyargs), strict=True
    )
    for argument, default, kind in both:
        value = empty if default is None else _value(default, names)
        annotation = empty if argument.annotation is None else _value(argument.annotation, names)
        yield inspect.Parameter(argument.arg, kind, default=value, annotation=annotation)
    if (rest := arguments.kwarg) is not None:
        yield inspect.Parameter(rest.arg, inspect.Parameter.VAR_KEYWORD)


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    """Of an annotation or a default in this package's own source."""
    return eval(compile(ast.Expression(expression), "<signature>", "eval"), dict(names))
