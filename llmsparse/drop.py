"""Which decoder blocks a model can do without: one after another, the one whose absence changes its answers least.

As Shortened LLaMA (arXiv 2402.02834) does, with the KL divergence from the whole model in place of perplexity.
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


class Dropped(NamedTuple):
    """``blocks`` that go, in the order found, the ``divergences`` in nats a token with each of them gone too, and what the
    last block that stays makes of the first window (1, length, width)."""

    blocks: list[int]
    divergences: list[float]
    states: Tensor


def choose(job: Job, windows: Tensor, count: int, folder: Path, progress: Any) -> Dropped:
    """The ``count`` blocks that can go, found greedily; the blocks are read once for each.

    One block is in memory at a time, with the activations of every model that lacks one more: as many as there are blocks.
    They wait where the job's hidden states do, on disk in ``folder``.
    """
    blocks: list[int] = []
    found: list[float] = []
    whole: HiddenStates | None = None
    while len(blocks) < count:
        stream = BlockStream(
            job.skeleton, windows, job.dtype, job.device, job.batch_size(), job.recipe.offload, folder
        )
        shortened = _run(stream, blocks, progress)
        if whole is None:
            whole = stream.hidden  # of the first round, in which no block is gone
        losses = _losses(stream, whole, shortened)
        least = min(losses, key=lambda index: (losses[index], index))
        blocks.append(least)
        found.append(losses[least])
        states = shortened[least].read(range(1)).clone()
        for each in [*shortened.values(), *([] if stream.hidden is whole else [stream.hidden])]:
            each.close()
        progress.tell("dropping blocks", f"KL {losses[least]:.4f} {job.skeleton.block_path}.{least}")
    assert whole is not None
    whole.close()
    return Dropped(blocks, found, states)


@torch.no_grad()
def _run(stream: BlockStream, gone: list[int], progress: Any) -> dict[int, HiddenStates]:
    """What leaves the last block in each model that lacks, besides ``gone``, the block of that number."""
    shortened: dict[int, HiddenStates] = {}
    for block in stream:
        progress.advance("dropping blocks")
        if block.index in gone:
            continue
        without = stream.new_states()
        for indices in stream.batches():
            without.write(indices, stream.hidden.read(indices))
        for states in (*shortened.values(), stream.hidden):
            _advance(stream, block, states)
        shortened[block.index] = without
    return shortened


def _advance(stream: BlockStream, block: Block, states: HiddenStates) -> None:
    for indices in stream.batches():
        states.write(indices, block.forward(block.module, states.read(indices)))


@torch.no_grad()
def _losses(stream: BlockStream, whole: HiddenStates, shortened: dict[int, HiddenStates]) -> dict[int, float]:
    """KL(whole || shortened) in nats, the mean over all tokens, of the models that may be the nearest.

    A sum over windows only grows, but for rounding: a model is given up, and not tried on further windows, once its sum
    exceeds the final sum of the model that was best on the first.
    """
    model, totals = stream.skeleton.model, dict.fromkeys(shortened, 0.0)
    with stream.outside(model):
        model.tie_weights()

        def add(window: int, indices: list[int]) -> None:
            expected = stream.logits(window, whole)[0]
            for index in indices:
                totals[index] += _total(expected, stream.logits(window, shortened[index])[0])

        running = list(shortened)
        add(0, running)
        best = min(running, key=totals.__getitem__)
        for window in range(1, len(stream.windows)):
            add(window, [best])
        for window in range(1, len(stream.windows)):
            running = [index for index in running if totals[index] <= totals[best]]
            if running == [best]:
                break
            add(window, [index for index in running if index != best])
    if not all(map(math.isfinite, totals.values())):
        raise UserError(
            "the model's outputs are not finite on the calibration text; use --dtype float32 or other text"
        )
    return {index: totals[index] / stream.windows.numel() for index in running}


def _total(expected: Tensor, found: Tensor) -> float:
    parts = (kl_divergence(expected[span].float(), found[span].float()) for span in pieces(0, len(found)))
    return float(sum(part.double().sum() for part in parts))
