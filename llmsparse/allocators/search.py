"""Search: evolution of the allocation, judged by the divergence from the dense model (EvoPress, arXiv 2410.14649)."""

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from llmsparse.allocation import Choice, Levels, Memory, Target, check_positive, sparsity_of
from llmsparse.allocators.error import Error, by_rows
from llmsparse.dense_model import DenseModel
from llmsparse.errors import UserError
from llmsparse.pattern import Pattern
from llmsparse.skeleton import Weight
from llmsparse.statistics import Gram
from llmsparse.trial import Rebuilding, Source, Trial

MOST_PAIRS = 3  # of weights that trade in one offspring
TRIES = 100  # of finding a pair that can
Choices = dict[str, Choice]


@dataclass(frozen=True)
class Search:
    """Options: so many ``generations`` of ``offspring``, judged on the last ``fitness`` windows of the calibration text.

    The first parent is what ``error`` finds with the same ``bound``, ``damping`` and ``windows``, or the uniform
    allocation where that is nearer to the dense model. A pair of weights
    trades about ``step`` of the smaller one. The whole model is in memory twice, on the device and on the host, besides
    the dense logits of the fitness windows and, for ``refit`` steps of conjugate gradients a level, one Gram matrix
    (in, in) float32 for each distinct input; without refit a vector for each.
    """

    generations: int = 30
    offspring: int = 8
    fitness: int = 4
    step: float = 0.02
    refit: int = 2
    bound: float = 0.1
    damping: float = 0.01
    windows: int = 16
    models: ClassVar[int] = 2  # that are in memory at once, for `plan`

    def __post_init__(self) -> None:
        names = ("generations", "offspring", "fitness", "step", "bound", "damping", "windows")
        check_positive("search", self, *names)
        if self.refit < 0:
            raise UserError(
                f"--set allocate.refit={self.refit}: search needs a number of steps, or 0 for none"
            )

    def __call__(self, dense: DenseModel, target: Target, memory: Memory) -> dict[str, Pattern]:
        """The best allocation that was found; an interrupted search goes on with the next generation."""
        levels, sources = target.levels(self.bound), dict[str, Source]()

        def learn(weight: Weight, statistics: Any, importance: Tensor) -> None:
            known = self.refit > 0 and isinstance(statistics, Gram) and statistics.tokens > 0
            gram = statistics.damped(self.damping)[0] if known else None
            rows = by_rows(levels[weight.name].pattern, statistics)
            sources[weight.name] = Source(importance, rows, gram)

        error = Error(self.bound, self.damping, self.windows)
        seed = error.choose(dense, target, levels, learn)
        with dense.whole() as model:
            rebuilding = Rebuilding(levels, sources, self.refit)
            trial = Trial(dense.job.skeleton, model, dense.windows[-self.fitness :], rebuilding)
            mutations = Mutations(target, levels, self.step)
            best = self._evolve(trial, mutations, seed, memory, dense.progress)
        return target.chosen(levels, best)

    def _evolve(
        self, trial: Trial, mutations: "Mutations", parent: Choices, memory: Memory, progress: Any
    ) -> Choices:
        """The survivor of all generations; each is remembered with the divergence of its survivor."""
        if memory.state is not None:
            parent = {name: Choice(*choice) for name, choice in memory.state["choices"].items()}
            trial.put(parent)
            history = memory.state["kl"]
        else:
            trial.put(parent)
            parent, least = fittest(trial, parent, trial.divergence(), [mutations.uniform()])
            history = [least]
            memory.save({"choices": parent, "kl": history})
        progress.start("search", self.generations)
        for generation in range(1, self.generations + 1):
            if generation >= len(history):
                chance = random.Random(f"{mutations.target.seed} {generation}")
                children = [mutations.child(parent, chance) for _ in range(self.offspring)]
                parent, least = fittest(trial, parent, history[-1], children)
                history = [*history, least]
                memory.save({"choices": parent, "kl": history})
            progress.advance("search", f"KL {history[-1]:.4f}")
        memory.notes["kl"] = history
        return parent


def fittest(trial: Trial, parent: Choices, least: float, children: list[Choices]) -> tuple[Choices, float]:
    """The nearest to the dense model of ``parent``, whose divergence is ``least``, and its ``children``; it is put."""
    best = parent
    for child in children:
        if child != parent:
            with trial.tried(child):
                found = trial.divergence(least)
            if found < least:
                best, least = child, found
    trial.put(best)
    return best, least


@dataclass(frozen=True)
class Mutations:
    """Trades of sparsity between weights of one budget."""

    target: Target
    levels: dict[str, Levels]
    step: float

    def uniform(self) -> Choices:
        """Every weight as near to its own pattern as whole levels and the budget allow."""
        wanted = {name: sparsity_of(pattern) for name, pattern in self.target.patterns.items()}
        return self.target.nearest(self.levels, wanted)

    def child(self, parent: Choices, chance: random.Random) -> Choices:
        """``parent`` after a few trades, fewer more often, at the same cost in parameters and at no more in others."""
        child = dict(parent)
        groups = [names for names in self.target.groups.values() if len(names) > 1]
        for _ in range(min(chance.randint(1, MOST_PAIRS), chance.randint(1, MOST_PAIRS))):
            for _ in range(TRIES):
                names = chance.choices(groups, [len(names) for names in groups])[0]
                sparser, denser = chance.sample(names, 2)
                trade = self._whole if self.target.costs.whole else self._within
                if moved := trade(sparser, denser, child):
                    child.update(moved)
                    break
            if not self.target.costs.whole:
                self._spend(names, child, chance)
        return child

    def _whole(self, sparser: str, denser: str, child: Choices) -> Choices | None:
        """A trade of exactly equal numbers of weights."""
        units = self.levels[sparser].unit, self.levels[denser].unit
        least = math.lcm(*units)
        amount = max(1, round(self._amount(sparser, denser) / least)) * least
        up, down = amount // units[0], amount // units[1]
        place, last = self._place(sparser, child), len(self.levels[sparser].cost) - 1
        left = self._place(denser, child) - down
        if place + up > last or left * units[1] < child[denser].fewer or left < 0:
            return None
        return {sparser: _more(child[sparser], up), denser: _more(child[denser], -down)}

    def _within(self, sparser: str, denser: str, child: Choices) -> Choices | None:
        """A trade in which one takes as many levels as the other, and what was left before, pay for."""
        up = max(1, round(self._amount(sparser, denser) / self.levels[sparser].unit))
        costs, place = self.levels[sparser].cost, self._place(sparser, child)
        if place + up >= len(costs):
            return None
        before = self._place(denser, child)
        names = self.target.groups[self.target.patterns[denser]]
        free = self._left(names, child) + costs[place] - costs[place + up]
        affordable = self.levels[denser].cost <= self.levels[denser].cost[before] + free
        down = before - int(np.argmax(affordable))
        return {sparser: _more(child[sparser], up), denser: _more(child[denser], -down)} if down > 0 else None

    def _spend(self, names: list[str], child: Choices, chance: random.Random) -> None:
        """Take steps towards density while one fits into the budget."""
        while True:
            left, fitting = self._left(names, child), []
            for name in names:
                place, cost = self._place(name, child), self.levels[name].cost
                if place > 0 and cost[place - 1] - cost[place] <= left:
                    fitting.append(name)
            if not fitting:
                return
            name = chance.choice(fitting)
            child[name] = _more(child[name], -1)

    def _left(self, names: list[str], child: Choices) -> float:
        """What ``child`` does not use of the budget of ``names``."""
        used = sum(self.levels[name].cost[self._place(name, child)] for name in names)
        return self.target.asked(self.target.patterns[names[0]]) - used

    def _place(self, name: str, choices: Choices) -> int:
        return choices[name].parts - self.levels[name].low

    def _amount(self, first: str, second: str) -> float:
        """About how many weights change places."""
        return self.step * min(self.levels[name].unit * self.levels[name].of for name in (first, second))


def _more(choice: Choice, parts: int) -> Choice:
    return choice._replace(parts=choice.parts + parts)


allocator = Search
