"""Watch the matrix products of a forward pass and gather statistics of their inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmsparse.statistics import Statistics


class Enough(Exception):
    """Raised inside a forward pass when nothing that is left of it can be observed."""


class Observer(TorchFunctionMode):
    """Gather one statistics object per distinct *input* of the watched weights.

    Products are recognised by the memory of their weight operand, so linears, transposed linears and slices
    of three-dimensional expert parameters need no hook of their own. Weights that read the same tensor
    (q, k and v; gate and up) share one object.
    """

    def __init__(
        self, views: dict[str, Tensor], kinds: dict[str, type[Statistics]], device: torch.device
    ) -> None:
        super().__init__()
        self.kinds, self.device = kinds, device
        self.shared: dict[str, str] = {}  # weight name -> the weight whose statistics it shares
        self.statistics: dict[str, Statistics] = {}
        self._spans = {name: _span(views[name]) for name in kinds}
        self._known: dict[tuple, list[str]] = {}
        self._seen: dict[tuple, tuple[str, Tensor]] = {}
        self._left: set[str] = set()
        self._stop = False

    def begin(self, stop_early: bool) -> None:
        """Start a forward pass; with ``stop_early`` it may end (``Enough``) once every weight was seen."""
        self._seen.clear()
        self._left, self._stop = set(self.kinds), stop_early

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs, operand = _operands(function, args, kwargs or {})
        if inputs is not None and operand is not None and (watched := self._watched(operand)):
            self._observe(watched, inputs)
            self._left.difference_update(watched)
            if self._stop and not self._left:
                raise Enough
        return function(*args, **(kwargs or {}))

    def _watched(self, operand: Tensor) -> list[str]:
        start, end = _span(operand)
        key = (start, end)
        if key not in self._known:
            self._known[key] = [
                n for n, (first, last) in self._spans.items() if start <= first and last <= end
            ]
        return self._known[key]

    def _observe(self, watched: list[str], inputs: Tensor) -> None:
        identity = (inputs.data_ptr(), inputs.numel(), inputs._version)
        for name in watched:
            leader = self.shared.get(name)
            if leader is None:
                leader = self._seen.get(identity, (name, inputs))[0]
                if self.kinds[leader] is not self.kinds[name]:
                    leader = name
                self.shared[name] = leader
            if leader not in self.statistics:
                self.statistics[leader] = self.kinds[leader].zeros(inputs.shape[-1], self.device)
            if identity not in self._seen or self._seen[identity][0] != leader:
                for window in inputs.detach() if inputs.dim() == 3 else [inputs.detach()]:
                    self.statistics[leader].update(
                        window
                    )  # one by one: the sums do not depend on the batch size
                self._seen[identity] = (leader, inputs)  # kept alive: its address must not be given out again


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _operands(function: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(input, weight) of a matrix product, or two Nones."""
    if function is nn.functional.linear:
        return args[0], args[1] if len(args) > 1 else kwargs["weight"]
    if function in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
        return args[0], args[1]
    if function is torch.addmm and len(args) > 2:
        return args[1], args[2]
    return None, None
