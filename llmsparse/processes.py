"""The processes of an ``accelerate launch``: windows are split, sums are added, weights are solved in turn."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from llmsparse.errors import UserError
from llmsparse.statistics import Statistics

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # for one that writes text or solves a large weight; NCCL's own is ten minutes


class Processes:
    """This process's place among all of them; alone it does nothing."""

    def __init__(self, device: str = "cpu") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            if re.fullmatch(r"\w+:\d+", device):
                raise UserError(
                    f"--device {device} would put {self.count} processes on one device; use --device auto"
                )
            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
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

    def device(self, asked: torch.device) -> torch.device:
        """The device of this process, where ``asked`` names a kind of device."""
        if self.count == 1 or asked.type == "cpu":
            return asked
        return self._state.device

    def together(self, act: Callable[[], T]) -> T:
        """Do something in every process; where one fails, all raise its error."""
        result, error = None, None
        try:
            result = act()
        except Exception as caught:
            error = caught
        failed = [other for other in self.gather(error) if other is not None]
        if error is not None:
            raise error
        if failed:
            raise failed[0]
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            self._state.destroy_process_group()

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

    def average(self, tensor: Tensor) -> Tensor:
        """``tensor`` as the mean over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def add(self, statistics: Statistics) -> None:
        """Add the statistics of all processes into each one's."""
        dist.all_reduce(statistics.sums())
        cross = getattr(statistics, "cross", None)
        if cross is not None:
            dist.all_reduce(cross)
        tokens = torch.tensor(statistics.tokens, device=statistics.sums().device)
        dist.all_reduce(tokens)
        statistics.tokens = int(tokens)
