"""The activations between two blocks."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmsparse.writer import disk_errors


class HiddenStates:
    """The activations between two blocks, ``count`` windows (length, width): on the host, on disk, or on the device.

    In memory they are one tensor, written over: a new one for each block would leave holes in the heap.
    """

    def __init__(self, offload: str, device: torch.device, count: int, folder: Path | None = None) -> None:
        self.offload, self.device, self.count = offload, device, count
        self._states: Tensor | None = None
        self._folder = (
            tempfile.TemporaryDirectory(prefix=".hidden-", dir=folder) if offload == "disk" else None
        )

    def __len__(self) -> int:
        return self.count

    def close(self) -> None:
        """Forget the windows, and delete what was put on disk."""
        self._states = None
        if self._folder is not None:
            self._folder.cleanup()

    def read(self, indices: range) -> Tensor:
        """A batch of windows, (batch, length, width), on the device; not to be changed, it may be no copy."""
        if self._folder is not None:
            return torch.stack([torch.load(self._path(index)) for index in indices]).to(self.device)
        assert self._states is not None
        states = self._states[indices.start : indices.stop]
        return states.data.to(self.device)  # .data counts the changes of this batch alone

    def write(self, indices: range, states: Tensor) -> None:
        """Put (batch, length, width) in the place of these windows."""
        if self._folder is not None:
            for index, window in zip(indices, states, strict=True):
                with disk_errors(self._path(index)):
                    torch.save(window.cpu().clone(), self._path(index))
            return
        if self._states is None:
            place = "cpu" if self.offload == "cpu" else states.device
            self._states = torch.empty(self.count, *states.shape[1:], dtype=states.dtype, device=place)
        self._states[indices.start : indices.stop] = states

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{index}.pt"
