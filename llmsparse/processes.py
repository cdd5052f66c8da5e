"""The processes of an ``accelerate launch``: windows are split, sums are added, weights are solved in turn."""

import os
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from llmsparse.statistics import Statistics


class Processes:
    """This process's place among all of them; alone it does nothing."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        self.rank = dist.get_rank() if self.count > 1 else 0

    @classmethod
    def alone(cls) -> "Processes":
        """A single process, whatever was launched."""
        processes = cls.__new__(cls)
        processes.count, processes.rank = 1, 0
        return processes

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

    def add(self, statistics: Statistics) -> None:
        """Add the statistics of all processes into each one's."""
        dist.all_reduce(statistics.sums())
        tokens = torch.tensor(statistics.tokens, device=statistics.sums().device)
        dist.all_reduce(tokens)
        statistics.tokens = int(tokens)
