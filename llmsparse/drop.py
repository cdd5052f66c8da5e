"""Which decoder blocks a model can do without: one after another, the one whose absence changes its answers least.

As Shortened LLaMA (arXiv 2402.02834) does, with the KL divergence from the whole model in place of perplexity. Every
block's absence is tried on a part of the text, and on the rest of it only where that made little difference.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmsparse.block import Block
from llmsparse.errors import UserError
from llmsparse.eval.fidelity import kl_divergence
from llmsparse.eval.forward import pieces
from llmsparse.hidden import HiddenStates
from llmsparse.plan import Job
from llmsparse.stream import BlockStream

PART = 4  # of so many windows one tries every block
FINALISTS = 4  # blocks that the other windows try too


class Dropped(NamedTuple):
    """``blocks`` that go, in the order found, the ``divergences`` in nats a token with each of them gone too, and what the
    last block that stays makes of the first window (1, length, width)."""

    blocks: list[int]
    divergences: list[float]
    states: Tensor


def choose(job: Job, windows: Tensor, count: int, folder: Path, progress: Any) -> Dropped:
    """The ``count`` blocks that can go, found greedily; the blocks are read twice for each.

    One block is in memory at a time, with the activations of every model that lacks one more: as many as there are blocks.
    They wait where the job's hidden states do, on disk in ``folder``.
    """
    few = -(-len(windows) // PART)
    parts = [part for part in (windows[:few], windows[few:]) if len(part)]
    whole: list[HiddenStates] = []  # of each part, from the first round, in which no block is gone
    blocks, found = list[int](), list[float]()
    total = len(job.skeleton.blocks)
    progress.start("dropping blocks", total * len(parts) * count)
    while len(blocks) < count:
        sums = {index: 0.0 for index in range(total) if index not in blocks}
        for number, part in enumerate(parts):
            stream = BlockStream(
                job.skeleton, part, job.dtype, job.device, job.batch_size(), job.recipe.offload, folder
            )
            shortened = _run(stream, blocks, list(sums), progress)
            whole += [] if blocks else [stream.hidden]
            for index, lost in _divergences(stream, whole[number], shortened).items():
                sums[index] += lost
            if number == 0:
                sums = {index: sums[index] for index in sorted(sums, key=sums.__getitem__)[:FINALISTS]}
                states = {index: shortened[index].read(range(1)).clone() for index in sums}
            for each in [*shortened.values(), *([stream.hidden] if blocks else [])]:
                each.close()
        least = min(sums, key=sums.__getitem__)
        blocks.append(least)
        found.append(sums[least] / windows.numel())
        progress.tell("dropping blocks", f"KL {found[-1]:.4f} {job.skeleton.block_path}.{least}")
    for each in whole:
        each.close()
    return Dropped(blocks, found, states[least])


@torch.no_grad()
def _run(stream: BlockStream, gone: list[int], tried: list[int], progress: Any) -> dict[int, HiddenStates]:
    """What leaves the last block in each model that lacks, besides ``gone``, one of the blocks that are ``tried``."""
    shortened: dict[int, HiddenStates] = {}
    for block in stream:
        progress.advance("dropping blocks")
        if block.index in gone:
            continue
        if block.index in tried:
            without = stream.new_states()
            for indices in stream.batches():
                without.write(indices, stream.hidden.read(indices))
        for states in (*shortened.values(), stream.hidden):
            _advance(stream, block, states)
        if block.index in tried:
            shortened[block.index] = without
    return shortened


def _advance(stream: BlockStream, block: Block, states: HiddenStates) -> None:
    for indices in stream.batches():
        states.write(indices, block.forward(block.module, states.read(indices)))


@torch.no_grad()
def _divergences(
    stream: BlockStream, whole: HiddenStates, shortened: dict[int, HiddenStates]
) -> dict[int, float]:
    """KL(whole || shortened) in nats, the sum over all tokens of the stream's windows, of each model."""
    model, totals = stream.skeleton.model, dict.fromkeys(shortened, 0.0)
    with stream.outside(model):
        model.tie_weights()
        for window in range(len(stream.windows)):
            expected = stream.logits(window, whole)[0]
            for index, states in shortened.items():
                totals[index] += _total(expected, stream.logits(window, states)[0])
    if not all(map(math.isfinite, totals.values())):
        raise UserError(
            "the model's outputs are not finite on the calibration text; use --dtype float32 or other text"
        )
    return totals


def _total(expected: Tensor, found: Tensor) -> float:
    parts = (kl_divergence(expected[span].float(), found[span].float()) for span in pieces(0, len(found)))
    return float(sum(part.double().sum() for part in parts))
