"""Patterns that make the model itself smaller: ``width:25%`` and ``depth:2``, with their options."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from llmsparse.errors import UserError

SCORES = ("obs", "flap")
COMPENSATIONS = ("refit", "bias")
MULTIPLE = 64  # of a narrowed MLP's width: what kernels and formats for GPUs and CPUs divide by
APART = (
    "skip",
    "include",
    "scope",
    "embeddings",
    "reconstruct",
    "compensate",
)  # options that go with pruned weights alone


@dataclass(frozen=True)
class Width:
    """Every block without ``share`` of its MLP channels and of its key/value heads with their queries.

    ``score``: the exact error of removing a group of inputs from the weight that reads them (``obs``), or the variance of
    each input times the weight's squared norm (``flap``, arXiv 2312.11983). ``compensation``: that weight is solved again
    (``refit``), or its bias takes the mean of what is gone (``bias``). ``damping``: of the Gram, a fraction of its mean
    diagonal. ``batch``: MLP channels that ``obs`` removes between two updates of all scores.
    """

    share: float
    score: str = "obs"
    compensation: str = "refit"
    damping: float = 0.01
    batch: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(
                f"{self} must remove more than 0 % and less than 100 % of the width, e.g. use width:25%"
            )
        for name, known in (("score", SCORES), ("compensation", COMPENSATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"width.{name} {getattr(self, name)} is unknown; use {' or '.join(known)}")
        if not (isinstance(self.damping, int | float) and self.damping > 0):
            raise UserError(f"width.damping must be positive; {self.damping} was given, its default is 0.01")
        if not (isinstance(self.batch, int) and self.batch >= 1):
            raise UserError(
                f"width.batch must be a whole number of at least 1; {self.batch} was given, its default is 16"
            )

    def __str__(self) -> str:
        return f"width:{self.share * 100:.6g}%"

    def channels(self, count: int) -> int:
        """How many of ``count`` MLP channels stay: the largest multiple of ``MULTIPLE`` within what is asked."""
        kept = int((1 - self.share) * count / MULTIPLE + 1e-9) * MULTIPLE
        if not kept:
            raise UserError(
                f"{self} would leave {(1 - self.share) * count:.6g} of {count} MLP channels, and at least {MULTIPLE} must "
                "stay; remove less"
            )
        return kept

    def heads(self, count: int) -> int:
        """How many of ``count`` key/value heads stay: the nearest number, at least one."""
        return max(1, round((1 - self.share) * count))


@dataclass(frozen=True)
class Depth:
    """The model without ``blocks`` of its decoder blocks.

    One after another that one goes whose absence moves the next-token distribution the least: by the mean KL divergence
    from the whole model over the first ``windows`` calibration windows. A quarter of them tries every block, the others
    the four blocks that were the best on it.
    """

    blocks: int
    windows: int = 8

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"{self} must drop at least one block, e.g. use depth:2")
        if not (isinstance(self.windows, int) and self.windows >= 1):
            raise UserError(
                f"depth.windows must be a whole number of at least 1; {self.windows} was given, its default is 8"
            )

    def __str__(self) -> str:
        return f"depth:{self.blocks}"


Shrink = Width | Depth
KINDS: dict[type[Shrink], str] = {Depth: "depth", Width: "width"}  # in the order in which they are done


def read(text: str) -> Shrink | None:
    """``width:25%`` or ``depth:2``; None where the text is of another kind.

    Raises:
        UserError: it begins like one and is none.
    """
    text = text.strip()
    if match := re.fullmatch(r"width:(\d+(?:\.\d+)?)\s*%", text):
        return Width(float(match[1]) / 100)
    if match := re.fullmatch(r"depth:(\d+)", text):
        return Depth(int(match[1]))
    if text.startswith(("width:", "depth:")):
        raise UserError(
            f"pattern {text!r} is unknown; width takes a percentage, e.g. width:25%, and depth a number of blocks, e.g. "
            "depth:2"
        )
    return None


def split(rules: list[tuple[Any, Any]], recipe: Any) -> tuple[tuple[Shrink, ...], list[tuple[Any, Any]]]:
    """What makes the model smaller, in the order in which it is done and with its options, and the other rules.

    A rule is (regular expression or None, pattern).

    Raises:
        UserError: one for some weights only, one twice, options of one that was not asked for.
    """
    for expression, pattern in rules:
        if isinstance(pattern, Shrink) and expression is not None:
            raise UserError(
                f"--pattern {expression.pattern}={pattern}: {pattern} is of the whole model; give it alone"
            )
    shrinks = []
    for kind, name in KINDS.items():
        found = [pattern for _, pattern in rules if isinstance(pattern, kind)]
        if len(found) > 1:
            raise UserError(f"--pattern {found[0]} and {found[1]}: give {name} once")
        options = recipe.options_for(name)
        if options and not found:
            example = {"width": "width:25%", "depth": "depth:2"}[name]
            raise UserError(
                f"--set {name}.{next(iter(options))} goes with a pattern such as --pattern {example}"
            )
        shrinks += [_with_options(pattern, name, options) for pattern in found]
    return tuple(shrinks), [rule for rule in rules if not isinstance(rule[1], Shrink)]


def _with_options(pattern: Any, name: str, options: dict[str, Any]) -> Shrink:
    known = [f.name for f in fields(pattern)][1:]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"--set {name}.{unknown[0]}: there is no such option; known: {', '.join(known)}")
    return replace(pattern, **options)


def summary(section: dict[str, Any]) -> str:
    """What was done, of a report's section on it, in one line."""
    sizes = {
        "blocks": "blocks",
        "mlp_channels": "MLP channels",
        "attention_heads": "heads",
        "key_value_heads": "key/value heads",
        "parameters": "parameters",
    }
    parts = [
        f"{name} {section[key][0]:,} to {section[key][1]:,}" for key, name in sizes.items() if key in section
    ]
    note = f" ({section['note']})" if section.get("note") else ""
    return f"{section['pattern']}: {', '.join(parts)}{note}"


def refuse_apart(recipe: Any, shrinks: tuple[Shrink, ...]) -> None:
    """Raise UserError for options that have no effect where nothing but ``shrinks`` is asked for."""
    given = [name for name in APART if getattr(recipe, name)]
    given += [f"set {key}" for key in recipe.options_for("solver")]
    if given:
        raise UserError(
            f"--{given[0]} goes with a pattern of weights; only {' and '.join(map(str, shrinks))} was asked for, add e.g. "
            "--pattern 2:4"
        )
