"""Settle weights in the order in which a model uses them, each on inputs that the settled ones produced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmsparse.processes import Processes
from llmsparse.skeleton import Weight
from llmsparse.statistics import Statistics
from llmsparse.walk import Gate, Twinned, Walk

Pass = Walk | Twinned
Solve = Callable[[str, Statistics | None], None]  # edits the weight in place


class Settling:
    """Let every pass run once; whenever all stand before a weight, solve it from the inputs that wait there.

    So a block costs one forward pass, not one to observe and one to replay, and each weight is solved on what
    the pruned weights before it produce. Weights that wait for the very same tensor (q, k and v; gate and up)
    share one statistics object, and are solved one after another while only one pass goes from one to the next.
    Passes beyond ``keep`` are not kept waiting but started anew, which costs time
    and changes nothing.
    """

    def __init__(
        self, weights: list[Weight], views: dict[str, Tensor], kinds: dict[str, type[Statistics]],
        device: torch.device, processes: Processes,
    ) -> None:  # fmt: skip
        self.gate = Gate({name: views[name] for name in kinds})
        self._experts = {w.name for w in weights if w.expert is not None}
        self._turns = {w.name: _turn(number, w) for number, w in enumerate(weights)}
        self.kinds, self.device, self.processes = kinds, device, processes
        self.leaders: dict[str, str] = {}  # weight name -> the weight whose statistics it shares
        self.statistics: dict[str, Statistics] = {}
        self._merged: set[str] = set()
        self._counted: dict[Pass, set[str]] = {}
        self._latest: dict[
            Pass, tuple[str, Tensor]
        ] = {}  # the tensor is kept: its address must not be given out again

    def arrive(self, walk: Pass, windows: int) -> None:
        """Book the inputs of a pass of so many ``windows`` that has just stopped."""
        name, inputs = walk.waiting, walk.inputs
        assert name is not None and inputs is not None
        before, tensor = self._latest.get(walk, (name, inputs))
        same = _identity(tensor) == _identity(inputs) and self.kinds[before] is self.kinds[name]
        leader = self.leaders.setdefault(name, before if same else name)
        self._latest[walk] = (leader, inputs)
        counted = self._counted.setdefault(walk, set())
        if leader in counted:
            return
        counted.add(leader)
        if leader not in self.statistics:
            self.statistics[leader] = self.kinds[leader].zeros(inputs.shape[-1], self.device)
        parts = 1 if name in self._experts else windows  # an expert's tokens do not come by windows
        windowed = inputs.reshape(parts, -1, inputs.shape[-1])
        targets = [None] * parts if walk.targets is None else walk.targets.reshape(windowed.shape)
        for window, target in zip(windowed, targets, strict=True):
            self.statistics[leader].update(window, target)  # one by one: sums do not depend on the batch size

    def forget(self, walk: Pass) -> None:
        """Start a pass anew when its turn comes; what it contributed stays counted."""
        walk.abandon()
        self._latest.pop(walk, None)

    def inherit(self, parts: list[Pass], whole: Pass) -> None:
        """``parts`` take the place of ``whole``, whose contributions stay counted."""
        for part in parts:
            self._counted[part] = set(self._counted.get(whole, ()))

    def complete(self, name: str | None) -> bool:
        """Whether a weight that one pass waits for has all its statistics, from a settled weight with the same input.

        Never an expert: only what every pass of every process uses may be solved before all of them stand there.
        """
        return name is not None and name not in self._experts and self.leaders.get(name) in self.gate.settled

    def next(self, stood: list[str]) -> str | None:
        """The weight whose turn it is among those that the passes of all processes wait for."""
        waiting = [name for name in stood if name not in self.gate.settled]
        first = min(waiting, key=self._turns.__getitem__, default=None)
        everyone = [name for name in self.processes.gather(first) if name is not None]
        return min(everyone, key=self._turns.__getitem__, default=None)

    def solve(self, name: str, solve: Solve) -> None:
        """Settle one weight with the statistics of all processes."""
        leader = self._merge(name)
        for other in [o for o in self.statistics if o != leader and o in self.gate.settled]:
            del self.statistics[other]
        solve(name, self.statistics[leader])
        self.gate.settled.add(name)

    def _merge(self, name: str) -> str:
        mine = self.leaders.get(name)
        if self.processes.count == 1:
            assert mine is not None
            return mine
        width = self.statistics[mine].sums().shape[0] if mine in self.statistics else None
        everyone = [(leader, w) for leader, w in self.processes.gather((mine, width)) if leader is not None]
        leader = next((one for one, _ in everyone if one in self._merged), name)
        self.leaders[name] = leader
        if leader not in self._merged:
            if leader not in self.statistics:  # no pass of this process came here
                width = next(w for _, w in everyone if w is not None)
                self.statistics[leader] = self.kinds[leader].zeros(width, self.device)
            self.processes.add(self.statistics[leader])
            self._merged.add(leader)
        return leader


def _turn(number: int, weight: Weight) -> tuple[int, int, int]:
    """Experts before all else, in the order of their numbers: a pass may come to them later than others do.

    Every pass meets every other weight, so those are solved only when all passes stand there.
    """
    return (1, 0, number) if weight.expert is None else (0, weight.expert, number)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.numel(), tensor._version
