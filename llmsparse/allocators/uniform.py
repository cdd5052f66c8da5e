"""Uniform: every weight is pruned to the pattern that was asked for."""

from dataclasses import dataclass
from typing import Any, ClassVar

from llmsparse.allocation import Memory, Target
from llmsparse.pattern import Pattern


@dataclass(frozen=True)
class Uniform:
    """Nothing is moved from one weight to another."""

    windows: ClassVar[int] = 0

    def __call__(self, dense: Any, target: Target, memory: Memory) -> dict[str, Pattern]:
        """The patterns as they are."""
        return dict(target.patterns)


allocator = Uniform
