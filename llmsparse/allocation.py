"""One sparsity budget and the weights that it is divided among: what an allocator is given and gives back.

An allocator is a frozen dataclass in ``llmsparse/allocators``; its fields are its options (``--set allocate.KEY=VALUE``).
``windows`` is how many calibration windows it looks at, 0 for none, and ``models``, if there, how often the whole model
is in memory. It is called with the dense model on the calibration
text (``llmsparse.dense_model``), a ``Target`` and a ``Memory``, and returns a pattern for each weight of the target.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from llmsparse import plugins
from llmsparse.costs import Costs
from llmsparse.divide import Curve, divide, exactly, optimal
from llmsparse.errors import UserError
from llmsparse.pattern import NM, Pattern, Unstructured
from llmsparse.skeleton import Weight

Divided = Unstructured | NM  # patterns whose sparsity can be divided
EPSILON = 1e-9  # of rounding 0.3 x 10 down to 3


class Allocator(Protocol):
    """How one budget is divided."""

    @property
    def windows(self) -> int: ...

    def __call__(self, dense: Any, target: "Target", memory: "Memory") -> dict[str, Pattern]: ...


@dataclass
class Memory:
    """What an allocator wants to find again after an interruption, and what the report is to say of it."""

    state: Any = None  # JSON, as it was saved last; None at the beginning
    keep: Callable[[Any], None] = lambda state: None
    notes: dict[str, Any] = field(default_factory=dict)  # for the report

    def save(self, state: Any) -> None:
        """Keep ``state`` where an interrupted run finds it."""
        self.state = state
        self.keep(state)


class Choice(NamedTuple):
    """One weight's place: ``parts`` pruned of each row, or of each group of n:m, and ``fewer`` weights less in all."""

    parts: int
    fewer: int = 0


@dataclass(frozen=True, eq=False)
class Levels:
    """What one weight may be pruned to, the densest first.

    Level by level one more of the inputs of a row, on average, is pruned, or one more of each m: some solvers count by
    rows. ``cost`` (levels,) is what is left of the weight, in the budget's unit.
    """

    weight: Weight
    pattern: Divided  # before the budget was divided
    low: int  # parts that are pruned at the first level
    cost: np.ndarray

    @cached_property
    def parts(self) -> np.ndarray:
        """Pruned of ``of`` at each level, (levels,)."""
        return np.arange(self.low, self.low + len(self.cost))

    @property
    def of(self) -> int:
        """Inputs of a row, or m."""
        return parts_of(self.weight, self.pattern)

    @property
    def unit(self) -> int:
        """Weights of one part."""
        return self.weight.out_features * self.weight.in_features // self.of

    def at(self, choice: Choice) -> Divided:
        """The pattern of one choice."""
        if isinstance(self.pattern, NM):
            return NM(self.pattern.m - choice.parts, self.pattern.m)
        pruned = choice.parts * self.unit - choice.fewer
        return Unstructured(pruned / (self.unit * self.of), self.pattern.scope)


@dataclass(frozen=True, eq=False)
class Target:
    """The weights whose patterns an allocator chooses. Weights of equal patterns share one budget."""

    weights: dict[str, Weight]  # in the model's order
    patterns: dict[str, Divided]
    costs: Costs
    seed: int = 0

    @cached_property
    def groups(self) -> dict[Divided, list[str]]:
        """Pattern -> the names of the weights that it was asked for."""
        found: dict[Divided, list[str]] = {}
        for name, pattern in self.patterns.items():
            found.setdefault(pattern, []).append(name)
        return found

    def levels(self, bound: float = 1.0) -> dict[str, Levels]:
        """Each weight's levels, at most ``bound`` of sparsity away from its pattern, in n:m at least one n."""
        found = {}
        for name, weight in self.weights.items():
            pattern, of = self.patterns[name], parts_of(weight, self.patterns[name])
            low, high = _range(pattern, of, bound)
            unit = weight.out_features * weight.in_features // of
            kept = (of - np.arange(low, high + 1)) * unit
            found[name] = Levels(weight, pattern, low, self.costs.of(weight, pattern, kept))
        return found

    def asked(self, pattern: Divided) -> float:
        """The budget of the weights of ``pattern``: what they would cost if all were pruned to it."""
        names = self.groups[pattern]
        sizes = {name: self.weights[name].out_features * self.weights[name].in_features for name in names}
        if self.costs.whole:
            whole = sum(sizes.values())
            return whole - (
                pattern.pruned(whole) if isinstance(pattern, Unstructured) else whole - kept(pattern, whole)
            )
        return sum(self.cost(name, pattern) for name in names)

    def cost(self, name: str, pattern: Divided) -> float:
        """What one weight costs under ``pattern``."""
        weight = self.weights[name]
        left = np.array([kept(pattern, weight.out_features * weight.in_features)])
        return self.costs.of(weight, pattern, left)[0].item()

    def divide(self, levels: dict[str, Levels], damage: dict[str, np.ndarray]) -> dict[str, Choice]:
        """The choices of least ``damage`` (one array (levels,) a weight) in each group's budget, its total exact.

        In parameters the total is what was asked, in n:m that or the nearest below it; in bytes and time it is at most
        what was asked, by less than any step.
        """
        chosen: dict[str, Choice] = {}
        for pattern, names in self.groups.items():
            self._check(pattern, [levels[name] for name in names])
            found, rest = self._divided(pattern, [Curve(levels[name].cost, damage[name]) for name in names])
            for name, level in zip(names, found, strict=True):
                fewer = min(rest, level * levels[name].unit) if _takes_any(pattern) else 0
                chosen[name] = Choice(int(levels[name].parts[level]), fewer)
                rest -= fewer
        return {name: chosen[name] for name in self.patterns}

    def nearest(self, levels: dict[str, Levels], wanted: dict[str, float]) -> dict[str, Choice]:
        """The choices whose sparsities are the nearest to ``wanted``, in the mean square over all weights."""
        damage = {}
        for name, each in levels.items():
            damage[name] = each.unit * each.of * (each.parts / each.of - wanted[name]) ** 2
        return self.divide(levels, damage)

    def _divided(self, pattern: Divided, curves: list[Curve]) -> tuple[list[int], int]:
        """A level for each curve, and how many parameters less than was asked they keep."""
        asked = self.asked(pattern)
        if not self.costs.whole:
            return divide(curves, asked), 0
        found = optimal(curves, int(asked)) if isinstance(pattern, NM) else None
        found = divide(curves, asked) if found is None else found
        rest = int(asked) - sum(int(c.cost[i]) for c, i in zip(curves, found, strict=True))
        return exactly(curves, found, rest)

    def _check(self, pattern: Divided, levels: list[Levels]) -> None:
        """Refuse a budget that whole levels cannot meet: a percent of few inputs."""
        asked = self.asked(pattern)
        most, least = (sum(level.cost[i].item() for level in levels) for i in (0, -1))
        if least > asked or (self.costs.whole and most < asked):
            raise UserError(
                f"pattern {pattern} cannot be divided among its {len(levels)} weights: {least:g} to {most:g} can be "
                f"kept, {asked:g} were asked for; use --allocate uniform, or a larger bound"
            )

    def chosen(self, levels: dict[str, Levels], choices: dict[str, Choice]) -> dict[str, Pattern]:
        """The patterns of ``choices``."""
        return {name: levels[name].at(choice) for name, choice in choices.items()}


def parts_of(weight: Weight, pattern: Divided) -> int:
    """Of how many parts sparsity is counted: the inputs of a row, or m."""
    return pattern.m if isinstance(pattern, NM) else weight.in_features


def kept(pattern: Divided, count: int) -> int:
    """How many of ``count`` weights ``pattern`` keeps."""
    return count * pattern.n // pattern.m if isinstance(pattern, NM) else count - pattern.pruned(count)


def sparsity_of(pattern: Divided) -> float:
    """The share that ``pattern`` prunes."""
    return 1 - pattern.n / pattern.m if isinstance(pattern, NM) else pattern.sparsity


def _takes_any(pattern: Divided) -> bool:
    """Whether a weight may have any count of zeros, not only as many in each row."""
    return isinstance(pattern, Unstructured) and pattern.scope != "row"


def _range(pattern: Divided, of: int, bound: float) -> tuple[int, int]:
    """The least and the most parts that may be pruned."""
    if isinstance(pattern, NM):
        steps = max(1, math.floor(bound * of + EPSILON))
        return max(1, of - pattern.n - steps), min(of - 1, of - pattern.n + steps)
    middle, room = pattern.sparsity * of, bound * of
    low = min(math.ceil(middle - room - EPSILON), math.floor(middle + EPSILON))
    high = max(math.floor(middle + room + EPSILON), math.ceil(middle - EPSILON))
    return min(max(1, low), of - 1), max(min(of - 1, high), 1)


def allocator_of(asked: Any, options: dict[str, Any], budget: str, patterns: dict[str, Pattern]) -> Allocator:
    """The allocator that was given, or the named one with its options; ``patterns`` are those to be divided.

    Raises:
        UserError: it is unknown or has no such option, or there is nothing to divide, or nothing that it would do.
    """
    if not isinstance(asked, str):
        if options:
            raise UserError(
                "--set allocate.KEY goes with an allocator's name; give the options to the object itself"
            )
        found = asked
    else:
        make = plugins.load("allocators", asked).allocator
        known = [option.name for option in fields(make)]
        if unknown := sorted(set(options) - set(known)):
            has = ", ".join(known) or "none"
            raise UserError(f"--set allocate.{unknown[0]}: {asked} has no such option; it has {has}")
        try:
            found = make(**options)
        except TypeError as error:
            shown = " ".join(f"allocate.{key}={value}" for key, value in options.items())
            raise UserError(f"--set {shown}: {asked} cannot use it ({error})") from error
    if asked == "uniform":
        if budget != "parameters":
            raise UserError(
                f"--budget {budget} is what an allocator divides; give --allocate error or another too"
            )
    elif not any(True for _ in divisible(patterns)):
        raise UserError(
            f"--allocate {asked}: no two weights share a pattern such as 50% or 2:4; there is nothing to divide"
        )
    return found


def divisible(patterns: dict[str, Pattern]) -> Iterator[str]:
    """The weights that share a pattern, whose sparsity can be divided, with another."""
    seen = [pattern for pattern in patterns.values() if isinstance(pattern, Unstructured | NM)]
    shared = {pattern for pattern in set(seen) if seen.count(pattern) > 1}
    return (
        name
        for name, pattern in patterns.items()
        if isinstance(pattern, Unstructured | NM) and pattern in shared
    )


def check_positive(owner: str, options: Any, *names: str) -> None:
    """Refuse options of an allocator that are not above zero."""
    for name in names:
        if not getattr(options, name) > 0:
            raise UserError(f"--set allocate.{name}={getattr(options, name)}: {owner} needs a number above 0")
