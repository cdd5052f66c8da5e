"""Make a model narrower block by block: inputs of a weight go with the rows that make them, and the rest takes over."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmsparse.block import Block
from llmsparse.channels import fluctuation, largest, least_error, refit
from llmsparse.cuts import HEADS, Cut, bias_of
from llmsparse.errors import SolverError, UserError
from llmsparse.moments import Moments
from llmsparse.narrowing import Narrowing
from llmsparse.shrinking import Width
from llmsparse.stream import BlockStream
from llmsparse.work import Work


@dataclass(frozen=True)
class Narrowed:
    """The ``groups`` of inputs that stay, the ``weight`` (out, kept inputs) that reads them and its ``bias`` (out,)."""

    groups: Tensor
    weight: Tensor
    bias: Tensor | None
    record: dict[str, Any]


def remove(cut: Cut, weight: Tensor, bias: Tensor | None, moments: Moments, width: Width) -> Narrowed:
    """Choose the groups of ``cut`` that stay, and let ``weight`` (out, in) or ``bias`` (out,) make up for the rest.

    The error is that of the layer's output: the sum of squares that is lost over that of the dense output.
    """
    gram = moments.gram()
    if width.score == "flap":
        kept = largest(fluctuation(weight, moments.variance, cut.groups), cut.kept)
    else:
        factor = gram.factor(width.damping)
        alive = weight.masked_fill(factor.dead, 0.0)
        batch = 1 if cut.kind == HEADS else width.batch
        kept = least_error(alive, factor.upper.T @ factor.upper, cut.groups, cut.kept, batch)
    inputs = cut.columns(kept)
    full = torch.zeros_like(weight)
    damping = None
    if width.compensation == "refit":
        damped, damping, _ = gram.damped(width.damping)
        full[:, inputs] = refit(weight, damped, inputs)
    else:
        full[:, inputs] = weight[:, inputs]
    lost, second = weight - full, gram.matrix
    if bias is not None and width.compensation == "bias":
        bias = bias + lost @ moments.mean
        second = second - torch.outer(moments.mean, moments.mean)
    whole = ((weight @ gram.matrix) * weight).sum()
    error = float(((lost @ second) * lost).sum() / whole) if whole > 0 else 0.0
    record = {
        "name": cut.consumer.name,
        "groups": [cut.groups, cut.kept],
        "error": error,
        "tokens": moments.tokens,
    }
    heads = {"kept": kept.tolist()} if cut.kind == HEADS else {}
    used = {} if damping is None else {"damping": damping}
    return Narrowed(kept, full[:, inputs], bias, {**record, **heads, **used})


@dataclass
class NarrowDesk:
    """The cuts of one block while they are made; ``disk``: the block's changed tensors as they will be written."""

    work: Work
    block: Block
    cuts: dict[str, Cut]
    width: Width
    disk: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def solve(self, name: str, moments: Any) -> None:
        """Make one cut: in the model as zeros, so that its shapes stay, and on the disk for good."""
        job, cut = self.work.job, self.cuts[name]
        source = job.checkpoint.tensor(cut.consumer.source)
        stored = cut.consumer.stored(source).clone()
        bias = None if cut.bias is None else job.checkpoint.tensor(cut.bias)
        narrowed = self.work.processes.first(
            self.work.processes.together(
                lambda: self._remove(cut, stored, bias, moments) if self.work.main else None
            )
        )
        inputs = cut.columns(narrowed.groups)
        stored.zero_()
        stored[:, inputs] = narrowed.weight.to(stored)
        if not bool(torch.isfinite(stored).all()):
            raise UserError(
                f"{name}: the narrowed weights are not finite in {stored.dtype}; use other calibration text"
            )
        self.block.views[name].copy_(stored)
        self.disk[cut.consumer.source] = cut.consumer.oriented(stored[:, inputs])
        if bias is not None and cut.bias is not None:
            self.disk[cut.bias] = narrowed.bias.to(bias)
            job.skeleton.model.get_parameter(bias_of(cut.consumer)).data.copy_(self.disk[cut.bias])
        for producer in cut.producers:
            rows = producer.rows(narrowed.groups)
            weight = producer.weight
            self.disk[weight.source] = weight.oriented(
                weight.stored(job.checkpoint.tensor(weight.source))[rows]
            )
            if producer.bias:
                self.disk[producer.bias] = job.checkpoint.tensor(producer.bias)[rows]
        self.records.append(narrowed.record)
        self.work.progress.tell("narrowing", f"error {narrowed.record['error']:.4f} {name}")

    def _remove(self, cut: Cut, stored: Tensor, bias: Tensor | None, moments: Moments) -> Narrowed:
        device = self.work.job.device
        try:
            found = remove(
                cut, stored.to(device, torch.float32), None if bias is None else bias.to(device, torch.float32),
                moments, self.width,
            )  # fmt: skip
        except (SolverError, torch.linalg.LinAlgError) as error:
            raise SolverError(
                f"{cut.consumer.name}: {error}; use more calibration text or --dtype float32"
            ) from error
        bias = None if found.bias is None else found.bias.cpu()
        return Narrowed(found.groups.cpu(), found.weight.cpu(), bias, found.record)

    def finish(self) -> None:
        """Write the block, when every cut was made."""
        if missing := [name for name in self.cuts if name not in {record["name"] for record in self.records}]:
            raise UserError(
                f"{self.work.job.skeleton.config.model_type} cannot be made narrower: no matrix product of its forward was "
                f"recognised as {missing[0]}"
            )
        writer, names = self.work.writer, self.work.job.tensors(self.block.index)
        if self.work.main:
            writer.write(self.disk)
            writer.copy(name for name in names if name not in self.disk)


def narrow(
    work: Work, windows: Tensor, narrowing: Narrowing, width: Width
) -> tuple[list[dict[str, Any]], Tensor]:
    """Write every block narrower; the next one sees what the narrowed ones before it put out.

    Attention comes first, then the MLP on what the narrowed attention gives. Returns a record for each cut, and what
    the last block makes of the first window (1, length, width).
    """
    job, records = work.job, []
    stream = BlockStream(
        job.skeleton, windows, job.dtype, job.device, job.batch_size(), job.recipe.offload, work.writer.work
    )
    stream.keep = job.passes_kept(stream.batch_size)
    try:
        for block in stream:
            desk = NarrowDesk(work, block, narrowing.of(block.index), width)
            block.settle(dict.fromkeys(desk.cuts, Moments), desk.solve, work.processes)
            desk.finish()
            records += desk.records
            work.progress.advance("narrowing")
        return records, stream.hidden.read(range(1)).clone()
    finally:
        stream.close()
