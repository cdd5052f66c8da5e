"""One decoder block: settle its weights on the activations that enter it, or only run them through."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.errors import UserError
from llmsparse.hidden import HiddenStates
from llmsparse.processes import Processes
from llmsparse.settle import Settling, Solve
from llmsparse.statistics import Statistics
from llmsparse.walk import Gate, Twinned, Walk


class Block:
    """One decoder block with its weights in memory and the hidden states that enter it."""

    def __init__(self, stream: Any, index: int) -> None:
        self.stream, self.index = stream, index
        self.name = f"{stream.skeleton.block_path}.{index}"
        self.module: nn.Module = stream.skeleton.blocks[index]
        self.weights = [w for w in stream.skeleton.weights if w.block == index]
        self.views = stream.skeleton.views(self.weights)
        self.aims: HiddenStates | None = None  # what the block is to put out

    def settle(
        self, kinds: dict[str, type[Statistics]], solve: Solve, processes: Processes | None = None,
        keep: bool = False, cross: bool = False,
    ) -> Settling:  # fmt: skip
        """Run every window through the block, stopping before each weight of ``kinds`` to ``solve`` it in place.

        Replaces the stream's hidden states by the outputs of the block as it then is, unless they are to be kept.
        ``kinds`` says which statistics each weight's solver wants; ``solve(name, statistics)`` is called once for each
        weight that any window uses. ``cross``: the statistics also know what each weight is multiplied with in the
        dense model, and the stream's dense hidden states go through the block too.
        """
        settling = Settling(
            self.weights, self.views, kinds, self.stream.device, processes or Processes.alone()
        )
        twin = self._twin(settling) if cross else None
        passes = _Passes(self, settling, twin, keep)
        try:
            while (name := passes.next()) is not None:
                settling.solve(name, solve)
            return settling
        finally:
            passes.abandon()  # after an error: no pass stays behind with its activations

    def observe(
        self, kinds: dict[str, type[Statistics]], processes: Processes | None = None, cross: bool = False
    ) -> dict[str, Statistics | None]:
        """The statistics of every weight of ``kinds`` while the block is as it is; the hidden states are kept."""
        found: dict[str, Statistics | None] = {}
        self.settle(kinds, found.__setitem__, processes, keep=True, cross=cross)
        return found

    def run(self) -> None:
        """Replace the stream's hidden states by this block's outputs."""
        self.settle({}, lambda name, statistics: None, Processes.alone())

    def aim(self) -> None:
        """Remember what the block, as it is, makes of what would enter it in the dense model, or of what enters it."""
        dense = self.stream.dense
        self.aims = dense or self.stream.new_states()
        with torch.no_grad():
            for indices in self.stream.batches():
                states = (dense or self.stream.hidden).read(indices)
                self.aims.write(indices, self.forward(self.module, states))

    def forward(self, module: nn.Module, states: Tensor) -> Tensor:
        """What ``module``, this block or a copy, makes of ``states`` (batch, length, width)."""
        args, kwargs = self.stream.calls(len(states))[self.index]
        before = states._version
        output = module(states, *args, **kwargs)
        if states._version != before:
            raise UserError(
                f"{self.stream.skeleton.config.model_type} cannot be streamed: its blocks change their input in place"
            )
        return output if isinstance(output, Tensor) else output[0]

    def _twin(self, settling: Settling) -> tuple[nn.Module, Gate]:
        """A copy of the block as it is, and the gate at which its passes wait for those of the block.

        Experts are left out: the two may send a token to different ones.
        """
        module = copy.deepcopy(self.module)
        inside = {f"{self.name}.{name}": p.data for name, p in module.named_parameters()}
        names = {w.name for w in self.weights if w.expert is None and w.name in settling.kinds}
        views = self.stream.skeleton.views([w for w in self.weights if w.name in names], inside)
        gate = Gate(views)
        gate.settled = settling.gate.settled
        return module, gate


class _Passes:
    """The forward passes of one settling, each with a part of the windows."""

    def __init__(self, block: Block, settling: Settling, twin: tuple[nn.Module, Gate] | None, keep: bool):
        self.block, self.stream, self.settling, self.keep = block, block.stream, settling, keep
        self.twin = twin
        self.walks = {indices: self._walk(indices) for indices in self.stream.batches()}
        self.stood: dict[range, str] = {}  # where each pass waits, kept or not

    def next(self) -> str | None:
        """Let every pass run to its next stop; the weight that is to be settled now."""
        for indices in sorted(self.walks, key=lambda r: r.start):
            if self.stood.get(indices) in self.settling.gate.settled or indices not in self.stood:
                self._advance(indices)
                if self.settling.complete(self.stood.get(indices)):
                    break  # the other passes need not stop there
        return self.settling.next(list(self.stood.values()))

    def abandon(self) -> None:
        for walk in self.walks.values():
            walk.abandon()

    def _advance(self, indices: range) -> None:
        """One pass to its next stop; split in two where the device runs out of memory."""
        walk, stream = self.walks[indices], self.stream
        try:
            walk.advance()
        except torch.OutOfMemoryError:
            stream.economise([w for w in self.walks.values() if w is not walk], self.settling)
            self.settling.forget(walk)
            parts = [r for r in stream.split(indices) if r]
            self.walks.pop(indices)
            self.stood.pop(indices, None)
            self.walks.update({part: self._walk(part) for part in parts})
            self.settling.inherit([self.walks[part] for part in parts], walk)
            for part in parts:
                self._advance(part)
            return
        if walk.finished:
            self._finish(indices, walk)
            return
        assert walk.waiting is not None
        self.stood[indices] = walk.waiting
        self.settling.arrive(walk, len(indices))
        if sum(w.waiting is not None for w in self.walks.values()) > stream.keep:
            self.settling.forget(walk)

    def _finish(self, indices: range, walk: Walk | Twinned) -> None:
        if not self.keep:
            self.stream.hidden.write(indices, walk.output)
        if isinstance(walk, Twinned):
            self.stream.dense.write(indices, walk.twin.output)
        self.walks.pop(indices)
        self.stood.pop(indices, None)

    def _walk(self, indices: range) -> Walk | Twinned:
        self.stream.calls(len(indices))  # rehearsed here and not inside the pass
        block, stream = self.block, self.stream

        def forward(module: nn.Module, states: HiddenStates) -> Tensor:
            return block.forward(module, states.read(indices))

        walk = Walk(partial(forward, block.module, stream.hidden), self.settling.gate)
        if self.twin is None:
            return walk
        module, gate = self.twin
        return Twinned(walk, Walk(partial(forward, module, stream.dense), gate))
