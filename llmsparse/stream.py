"""Run a model block by block, one block in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.block import Block
from llmsparse.errors import UserError
from llmsparse.heap import Heap, return_freed_memory
from llmsparse.hidden import HiddenStates
from llmsparse.processes import Processes
from llmsparse.settle import Settling, Solve
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.statistics import Statistics
from llmsparse.walk import Walk

Call = tuple[tuple, dict[str, Any]]  # a block's arguments after the hidden states


class BlockStream:
    """Iterate over the blocks of a checkpoint; each is read when its turn comes and dropped after.

    ``windows`` is (samples, length) token ids. Before the first block the model's own forward is rehearsed
    with every block replaced by a recorder, which yields the first hidden states and each block's own
    arguments (masks, rotary embeddings), whatever the architecture.
    """

    def __init__(
        self, skeleton: Skeleton, windows: Tensor, dtype: torch.dtype, device: torch.device,
        batch_size: int = 1, offload: str = "cpu", folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.skeleton, self.dtype, self.device = skeleton, dtype, device
        self.windows, self.batch_size, self._place = windows, batch_size, (offload, folder)
        self.keep = 1 << 30  # passes that may wait with their activations in memory
        self.as_tuple = False  # whether blocks return a tuple, found by the rehearsal
        self.hidden = self.new_states()
        self.dense: HiddenStates | None = None  # the same in the dense model, where it is followed
        self.reader: Callable[[int], Any] = _from_source  # where block ``index`` is read
        self._calls: dict[int, list[Call]] = {}

    def new_states(self) -> HiddenStates:
        """A place for activations, which is empty."""
        offload, folder = self._place
        return HiddenStates(offload, self.device, len(self.windows), folder)

    def follow_dense(self) -> None:
        """From now on also run the dense model: ``dense`` is what enters each block there."""
        self.dense = self.new_states()

    def close(self) -> None:
        """Forget the activations."""
        for states in (self.hidden, self.dense):
            if states is not None:
                states.close()

    def batches(self) -> Iterator[range]:
        count = len(self.hidden)
        return (range(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size))

    def split(self, indices: range) -> list[range]:
        """Half the windows a forward pass, after the device ran out of memory."""
        if len(indices) == 1:
            raise UserError(
                "out of memory with one window a forward pass; use a shorter --sequence-length, or --device cpu"
            )
        self.batch_size = len(indices) // 2
        return [indices[: self.batch_size], indices[self.batch_size :]]

    def economise(self, walks: list[Walk], settling: Settling) -> None:
        """Keep no pass waiting from now on."""
        self.keep = 0
        for walk in walks:
            settling.forget(walk)

    def calls(self, size: int) -> list[Call]:
        """Every block's other arguments for a batch of ``size`` windows."""
        if size not in self._calls:
            with self.outside(self.skeleton.model.base_model):
                self._calls[size] = self._record(self.windows[:size])[1]
        return self._calls[size]

    def __iter__(self) -> Iterator[Block]:
        self._rehearse()
        heap = Heap()
        for index in range(len(self.skeleton.blocks)):
            name = f"{self.skeleton.block_path}.{index}"
            reader = self.reader(index)
            if self.dense is not None and reader is not None:
                self._run_dense(name, index)
            self.skeleton.materialize(name, self.dtype, self.device, reader)
            block = Block(self, index)
            yield block
            block.views.clear()  # they would keep this block's weights beside the next one's
            self.skeleton.release(name)
            self.skeleton.checkpoint.close()
            heap.block_done()

    def _run_dense(self, name: str, index: int) -> None:
        """The dense model's own block, where the one that is read next was pruned before."""
        self.skeleton.materialize(name, self.dtype, self.device)
        Block(self, index).aim()
        self.skeleton.release(name)

    @contextmanager
    def outside(self, root: nn.Module) -> Iterator[None]:
        """Everything of ``root`` but the blocks in memory."""
        self.skeleton.materialize_outside(root, self.dtype, self.device)
        try:
            yield
        finally:
            self.skeleton.release_outside(root)
            self.skeleton.checkpoint.close()
            return_freed_memory()

    @torch.no_grad()
    def _rehearse(self) -> None:
        with self.outside(self.skeleton.model.base_model):
            for index, window in enumerate(self.windows):
                first, calls = self._record(window[None])
                self.hidden.write(range(index, index + 1), first)
                if self.dense is not None:
                    self.dense.write(range(index, index + 1), first)
                known = self._calls.setdefault(1, calls)
                if known is not calls and not _equal(known, calls):
                    raise UserError(
                        f"{self.skeleton.config.model_type} cannot be streamed: its blocks get arguments that depend on "
                        "the tokens, besides the hidden states"
                    )

    @torch.no_grad()
    def _record(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """One rehearsal: the hidden states that enter the first block, and every block's other arguments."""
        for as_tuple in (
            False,
            True,
        ):  # what a block returns differs between architectures; only one of them fits
            recorders = [_Recorder(as_tuple) for _ in self.skeleton.blocks]
            with suppress(_Unfit), _replaced(self.skeleton.blocks, recorders):
                self.skeleton.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
                states = [recorder.states for recorder in recorders]
                first = states[0]
                if first is not None and all(s is not None and _equal(s, first) for s in states):
                    self.as_tuple = as_tuple
                    return first, [recorder.call for recorder in recorders]
        raise UserError(
            f"{self.skeleton.config.model_type} cannot be streamed: a block's input is not the output of the one before"
        )

    def settle_outside(
        self, weights: list[Weight], kinds: dict[str, type[Statistics]], solve: Solve, processes: Processes
    ) -> None:
        """The same for weights after the last block (``lm_head``), on the last block's outputs."""
        model = self.skeleton.model
        with self.outside(model):
            model.tie_weights()
            settling = Settling(weights, self.skeleton.views(weights), kinds, self.device, processes)
            stood = []
            for index in range(len(self.windows)):
                walk = Walk(partial(self.logits, index), settling.gate)
                walk.advance()
                if walk.waiting:
                    stood.append(walk.waiting)
                    settling.arrive(walk, 1)
                    settling.forget(walk)
            while (name := settling.next(stood)) is not None:
                settling.solve(name, solve)

    def logits(self, index: int, states: HiddenStates | None = None) -> Tensor:
        """What the model makes of one window (1, length, vocabulary), with ``states`` as what its last block puts out.

        Of the stream's hidden states unless others are given; all but the blocks must be in memory, see ``outside``.
        """
        final = (self.hidden if states is None else states).read(range(index, index + 1))
        recorders = [_Recorder(self.as_tuple, final) for _ in self.skeleton.blocks]
        with _replaced(self.skeleton.blocks, recorders):
            ids = self.windows[index : index + 1].to(self.device)
            return self.skeleton.model(input_ids=ids, use_cache=False).logits


def _from_source(index: int) -> None:
    """Blocks are read from the source checkpoint."""


class _Unfit(Exception):
    """A recorder was given something that is no hidden state."""


class _Recorder:
    """Stands in for a block's forward: remembers its arguments and returns the hidden states unchanged."""

    def __init__(self, as_tuple: bool, instead: Tensor | None = None) -> None:
        self.as_tuple, self.instead = as_tuple, instead
        self.states: Tensor | None = None
        self.call: Call = ((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states", None)
        if not isinstance(states, Tensor) or states.dim() != 3:
            raise _Unfit
        self.states, self.call = states, (args[1:], kwargs)
        result = states if self.instead is None else self.instead
        return (result,) if self.as_tuple else result


@contextmanager
def _replaced(blocks: nn.ModuleList, recorders: list[_Recorder]) -> Iterator[None]:
    before = [block.__dict__.get("forward") for block in blocks]
    for block, recorder in zip(blocks, recorders, strict=True):
        block.forward = recorder
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, bool | int | float | str):
        return first == second
    return type(first) is type(second)
