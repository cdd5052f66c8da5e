"""Channels in another order: a checkpoint that computes the same, and of which an n:m pattern keeps more."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmsparse.block import Block
from llmsparse.calibration import Calibration
from llmsparse.errors import first_line
from llmsparse.pattern import NM
from llmsparse.permutation import arrange
from llmsparse.producers import Channels, bias_of, permutable
from llmsparse.skeleton import Skeleton, Weight
from llmsparse.statistics import SquaredNorm
from llmsparse.work import Work

PHASE = "permuting channels"
CHANGED = 1e-5  # of what a block adds to a token: more than float64 and a norm in float32 round, less than any mistake
BLIND = (1, 32)  # windows and tokens with which a run without calibration text checks that nothing changes


class Order(NamedTuple):
    """A new order (sets, width) of some channels, and the share of the scores that the pattern keeps in each."""

    channels: Channels
    order: Tensor
    before: float
    after: float


def permute(work: Work, text: Calibration | None) -> dict[str, Any]:
    """Write every block with the channels inside it in a better order for the patterns of the weights that read them.

    The score of a weight is w^2 E[x^2], its own part of the layer's squared output (w^2 without calibration text). What
    a block computes is checked to stay: where it does not, the channels are left as they are. Returns ``weights``, each
    with the share of its scores that its pattern keeps ``before`` and ``after``, and ``skipped`` with a ``reason``.
    """
    job = work.job
    found, reasons = permutable(job.skeleton, job.patterns)
    shape, size = BLIND, job.skeleton.config.get_text_config().vocab_size
    blind = torch.randint(size, shape, generator=torch.Generator().manual_seed(0))
    windows = work.processes.share(text.windows) if text else blind
    work.progress.start(PHASE, len(job.skeleton.blocks))
    records: list[dict[str, Any]] = []
    with work.stream(windows) as stream:
        for block in stream:
            inside = [channels for channels in found if channels.consumer.block == block.index]
            done = work.writer.finished.get(block.name)
            if done is None:
                with work.phases(PHASE):
                    done = _permute_block(work, block, inside, text is not None)
            else:
                block.run()
            records += done
            work.progress.advance(PHASE)
    records += [{"name": name, "reason": reason} for name, reason in reasons.items()]
    return {
        "weights": [record for record in records if "reason" not in record],
        "skipped": [record for record in records if "reason" in record],
    }


def _permute_block(work: Work, block: Block, found: list[Channels], observed: bool) -> list[dict[str, Any]]:
    """Choose, check and write; a record for each weight whose inputs were to be reordered."""
    states = _exact(block.stream.hidden.read(range(1))) if work.main else None
    squares: dict[str, Tensor] = {}

    def note(name: str, seen: Any) -> None:
        squares[name] = seen.value

    watched = [channels.consumer.name for channels in found] if observed else []
    block.settle(dict.fromkeys(watched, SquaredNorm), note, work.processes)
    if states is None:
        return []
    reasons, orders = dict[str, str](), list[Order]()
    for channels in found:
        name = channels.consumer.name
        if observed and name not in squares:
            reasons[name] = "no calibration token came to it"
        else:
            orders.append(_order(work, channels, squares.get(name)))
    reasons |= _changing(block, states, orders)
    kept = [each for each in orders if each.channels.consumer.name not in reasons]
    records = [{"name": o.channels.consumer.name, "before": o.before, "after": o.after} for o in kept]
    records += [{"name": name, "reason": reason} for name, reason in reasons.items()]
    _write(work, block, kept, records)
    return records


def _order(work: Work, channels: Channels, squares: Tensor | None) -> Order:
    job, weight = work.job, channels.consumer
    pattern = job.patterns[weight.name]
    assert isinstance(pattern, NM)
    scores = _exact(weight.stored(job.checkpoint.tensor(weight.source)).to(job.device)).square()
    if squares is not None:
        scores *= squares.to(scores)
    sets = [arrange(part, pattern) for part in channels.scores(scores)]
    whole = float(scores.sum()) or 1.0
    before, after = (sum(getattr(one, when) for one in sets) / whole for when in ("before", "after"))
    return Order(channels, torch.stack([one.order.cpu() for one in sets]), before, after)


def _exact(value: Any) -> Any:
    """``value`` with every floating-point tensor in it as a float64 one; on the host where a device may lack that."""
    if isinstance(value, Tensor):
        where = value.device if value.is_cuda else "cpu"
        return value.to(where, torch.float64 if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, list | tuple):
        return type(value)(map(_exact, value))
    return {key: _exact(each) for key, each in value.items()} if isinstance(value, dict) else value


def _changing(block: Block, states: Tensor, orders: list[Order]) -> dict[str, str]:
    """Why an order is not kept, by the consumer's name: on ``states`` (1, length, width) the block computes otherwise.

    Attention, MLP and experts are tried one after another, on a copy of the block in float64.
    """
    skeleton = block.stream.skeleton
    module = copy.deepcopy(block.module).to(states.device, torch.float64)
    tensors = {f"{block.name}.{name}": parameter.data for name, parameter in module.named_parameters()}
    involved = {w.name: w for o in orders for w, _, _ in o.channels.moves(o.order)}
    views = skeleton.views(list(involved.values()), tensors)
    args, kwargs = _exact(block.stream.calls(1)[block.index])
    found: dict[str, str] = {}
    try:
        dense = _output(module, states, args, kwargs)
        for kind in dict.fromkeys(o.channels.kind for o in orders):
            tried = [o for o in orders if o.channels.kind == kind]
            for each in tried:
                _move(skeleton, each, lambda w: views[w.name], tensors.__getitem__)
            moved = _output(module, states, args, kwargs)
            if bool(((moved - dense).norm(dim=-1) > CHANGED * (dense - states).norm(dim=-1)).any()):
                found |= {o.channels.consumer.name: "the model does more between its weights" for o in tried}
                for each in tried:
                    back = each._replace(order=each.order.argsort(-1))
                    _move(skeleton, back, lambda w: views[w.name], tensors.__getitem__)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = f"its block does not run in float64, so it cannot be checked: {first_line(error)}"
        return {o.channels.consumer.name: reason for o in orders}
    return found


@torch.no_grad()
def _output(module: nn.Module, states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    output = module(states.clone(), *args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _move(
    skeleton: Skeleton, order: Order, view: Callable[[Weight], Tensor], bias: Callable[[str], Tensor]
) -> None:
    """Reorder, in place, the columns of the consumer and the rows and biases of the producers."""
    for weight, are_rows, comes in order.channels.moves(order.order):
        here = view(weight)
        comes = comes.to(here.device)
        here.copy_(here[comes] if are_rows else here[:, comes])
        if are_rows and (name := bias_of(skeleton, weight)) is not None:
            bias(name).copy_(bias(name)[comes])


def _write(work: Work, block: Block, orders: list[Order], records: list[dict[str, Any]]) -> None:
    """The block as it is in the source, but for the orders."""
    job, disk = work.job, dict[str, Tensor]()

    def stored(name: str) -> Tensor:
        if name not in disk:
            disk[name] = job.checkpoint.tensor(name).clone()
        return disk[name]

    def bias(parameter: str) -> Tensor:
        return stored(job.skeleton.sources[parameter][0][0])

    for each in orders:
        _move(job.skeleton, each, lambda w: w.stored(stored(w.source)), bias)
    work.writer.write(disk)
    work.writer.copy(name for name in job.tensors(block.index) if name not in disk)
    work.writer.finish_block(block.name, records)
