"""Which weight gets which pattern: REGEX=PATTERN rules, --skip and --include."""

import re
from typing import Any

from llmsparse.errors import UserError
from llmsparse.pattern import Pattern, parse
from llmsparse.recipe import Recipe
from llmsparse.shrinking import Shrink
from llmsparse.skeleton import Skeleton, Weight


def rule(text: Any, scope: str | None) -> tuple[re.Pattern[str] | None, Pattern | Shrink]:
    """The regular expression, or None, and the pattern of one --pattern; a pattern object is taken as it is."""
    if not isinstance(text, str):
        return None, text  # a pattern object
    expression, equals, pattern = text.rpartition("=")
    if not equals:
        return None, parse(text, scope)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UserError(f"--pattern {text}: {expression!r} is not a regular expression: {error}") from error
    return compiled, parse(pattern, scope if pattern.rstrip().endswith("%") else None)


def assign(skeleton: Skeleton, rules: list, recipe: Recipe) -> dict[str, Pattern]:
    """Weight name -> pattern: the last matching REGEX=PATTERN, else the last plain pattern."""
    default = [pattern for expression, pattern in rules if expression is None]
    patterns: dict[str, Pattern] = {}
    for option in ("skip", "include"):
        for expression in getattr(recipe, option):
            if not any(_matches([expression], w) for w in skeleton.weights):
                names = ", ".join(w.name for w in skeleton.weights[:2])
                raise UserError(
                    f"--{option} {expression!r} matches no linear weight; their names look like {names}"
                )
    used = set()
    for weight in skeleton.weights:
        if _matches(recipe.skip, weight) or (weight.block is None and not _matches(recipe.include, weight)):
            continue
        special = [
            i for i, (expression, _) in enumerate(rules) if expression and _matches([expression], weight)
        ]
        used.update(special)
        if special or default:
            patterns[weight.name] = rules[special[-1]][1] if special else default[-1]
            _check_width(weight, patterns[weight.name])
    for index, (expression, pattern) in enumerate(rules):
        if expression is not None and index not in used:
            raise UserError(
                f"--pattern {expression.pattern}={pattern} matches no weight that is to be pruned"
            )
    if not patterns:
        raise UserError("nothing is left to prune; loosen --skip, or give a plain --pattern such as 50%")
    return patterns


def _matches(expressions: Any, weight: Weight) -> bool:
    return any(re.search(e, weight.name) or re.search(e, weight.parameter) for e in expressions)


def _check_width(weight: Weight, pattern: Pattern) -> None:
    if pattern.width and weight.in_features % pattern.width:
        raise UserError(
            f"pattern {pattern} needs in_features divisible by {pattern.width}; {weight.name} has "
            f"{weight.in_features}; exclude it with --skip"
        )
