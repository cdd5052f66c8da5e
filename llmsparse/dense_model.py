"""The dense model on the first calibration windows, as allocators see it: its statistics, or all of it in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsparse.errors import UserError
from llmsparse.plan import Job
from llmsparse.processes import Processes
from llmsparse.progress import Quiet
from llmsparse.skeleton import Weight
from llmsparse.statistics import FirstTokens, Gram, SquaredNorm, Statistics
from llmsparse.stream import BlockStream

Visit = Callable[
    [Weight, Tensor, Any], None
]  # weight, its dense values (out, in) float32, statistics or None


TINY = 1e-30  # of a squared norm that is divided by


@dataclass
class DenseModel:
    """A checkpoint that nothing of has been pruned, and the calibration ``windows`` (samples, length)."""

    job: Job
    windows: Tensor
    folder: Path | None = None  # where hidden states wait with --offload disk
    progress: Any = field(default_factory=Quiet)

    def solver_kinds(self, names: list[str]) -> dict[str, Any]:
        """The statistics that the run's solver asks for of each weight; of one that asks for none, norms."""
        job = self.job
        if job.solver.statistics is not Gram:
            return dict.fromkeys(names, SquaredNorm)
        weighted = FirstTokens(job.first_token) if job.first_token != 1 else Gram
        attention = {w.name for w in job.skeleton.weights if w.feeds_attention}
        return {name: weighted if name in attention else Gram for name in names}

    def observe(self, kinds: dict[str, Any], windows: int, visit: Visit) -> dict[int | None, float]:
        """Run the first ``windows`` block by block and ``visit`` every weight of ``kinds`` with its statistics.

        One block is in memory at a time, besides the hidden states that entered it. A weight that no token came to, an
        expert, is visited without statistics. Returns each block's ``moved``, and 1 for what lies outside all blocks.
        """
        job, progress = self.job, self.progress
        if not len(self.windows[:windows]):
            raise UserError(
                f"--allocate {job.recipe.allocate} got no calibration text; its windows must be above 0"
            )
        stream = BlockStream(
            job.skeleton,
            self.windows[:windows],
            job.dtype,
            job.device,
            job.batch_size(),
            job.recipe.offload,
            self.folder,
        )
        stream.keep = job.passes_kept(stream.batch_size)
        progress.start("allocating", len(job.skeleton.blocks))
        shares: dict[int | None, float] = {None: 1.0}
        try:
            for block in stream:
                before = [states.clone() for states in _windows(stream)]
                inside = {w.name: w for w in block.weights if w.name in kinds}
                see = _Seeing(inside, block.views.__getitem__, visit, job.device)
                block.settle({name: kinds[name] for name in inside}, see)
                for name in [name for name in inside if name not in see.seen]:
                    see(name, None)
                each = [moved(*pair) for pair in zip(before, _windows(stream), strict=True)]
                shares[block.index] = sum(each) / len(each)
                progress.advance("allocating")
            outside = {w.name: w for w in job.skeleton.weights if w.block is None and w.name in kinds}
            if outside:
                see = _Seeing(
                    outside, lambda name: job.skeleton.views([outside[name]])[name], visit, job.device
                )
                wanted = {name: kinds[name] for name in outside}
                stream.settle_outside(list(outside.values()), wanted, see, Processes.alone())
        finally:
            stream.close()
        return shares

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all its weights in memory, on the device and in the dtype of forward passes."""
        skeleton = self.job.skeleton
        try:
            model = skeleton.materialize_all(self.job.dtype, self.job.device)
            with torch.no_grad():
                yield model
        finally:
            skeleton.release_all()


def moved(before: Tensor, after: Tensor) -> float:
    """Which share of its output a block adds: ||after - before||^2 / ||after||^2 of each token (..., width), their mean.

    A mean over tokens of shares: few tokens of massive activations do not decide it.
    """
    before, after = before.float(), after.float()
    change, whole = (after - before).square().sum(-1), after.square().sum(-1)
    return float((change / whole.clamp(min=TINY)).mean(dtype=torch.float64))


def _windows(stream: BlockStream) -> Iterator[Tensor]:
    """The hidden states of one window after the other, on the host."""
    return (stream.hidden.read(range(index, index + 1)).cpu() for index in range(len(stream.windows)))


class _Seeing:
    """Hands each weight on as it comes; nothing is pruned."""

    def __init__(
        self, weights: dict[str, Weight], view: Callable[[str], Tensor], visit: Visit, device: torch.device
    ) -> None:
        self.weights, self.view, self.visit, self.device = weights, view, visit, device
        self.seen: set[str] = set()

    def __call__(self, name: str, statistics: Statistics | None) -> None:
        self.seen.add(name)
        self.visit(self.weights[name], self.view(name).to(self.device, torch.float32), statistics)
