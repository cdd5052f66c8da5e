"""The processes of an ``accelerate launch``: windows are split, sums are added, weights are solved in turn."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from llmsparse.observe import Observer


class Processes:
    """This process's place among all of them; alone it does nothing."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        self.rank = dist.get_rank() if self.count > 1 else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """This process's part of the calibration windows."""
        return items[self.rank :: self.count]

    def owns(self, number: int) -> bool:
        return number % self.count == self.rank

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value`` (picklable), by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The main process's ``value``."""
        return self.gather(value)[0]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        if self.count > 1:
            dist.broadcast(tensor, owner)
        return tensor

    def merge(self, observer: Observer, names: Iterable[str]) -> None:
        """Add the statistics of all processes into each one's ``observer``."""
        if self.count == 1:
            return
        widths = {leader: s.sums().shape[0] for leader, s in observer.statistics.items()}
        everyone = self.gather((observer.shared, widths))
        for shared, _ in everyone:
            for name, leader in shared.items():
                observer.shared.setdefault(name, leader)
        sizes = {leader: width for _, widths in everyone for leader, width in widths.items()}
        for leader in dict.fromkeys(observer.shared[n] for n in names if n in observer.shared):
            if leader not in observer.statistics:  # an expert that saw no token here
                observer.statistics[leader] = observer.kinds[leader].zeros(sizes[leader], observer.device)
            statistics = observer.statistics[leader]
            dist.all_reduce(statistics.sums())
            tokens = torch.tensor(statistics.tokens, device=observer.device)
            dist.all_reduce(tokens)
            statistics.tokens = int(tokens)
