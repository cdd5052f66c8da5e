"""Where a block can be made narrower: the weights that read MLP channels or heads, and the rows that make them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.skeleton import Skeleton, Weight

CHANNELS, HEADS = "channels", "heads"
MLPS = {  # what reads the channels -> what makes them; w gate and up in one weight
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)),
    "fc2": (("fc1",),),
    "c_proj": (("c_fc",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
    "w2": (("w1", "w3"),),
}
QKV = ("q_proj", "k_proj", "v_proj")
ATTENTIONS = {"o_proj": (QKV, ("qkv_proj",)), "out_proj": (QKV,), "dense": (QKV,)}


class Span(NamedTuple):
    """Rows of a weight that are groups one after another: group g begins at ``first + g * unit``."""

    first: int
    unit: int


@dataclass(frozen=True)
class Producer:
    """A weight (out, in) whose rows make groups of another weight's inputs; ``bias``: its tensor on disk."""

    weight: Weight
    bias: str | None
    spans: tuple[Span, ...]

    def rows(self, kept: Tensor) -> Tensor:
        """The rows of the groups ``kept``, in their order."""
        return torch.cat([_members(kept, span) for span in self.spans])


@dataclass(frozen=True)
class Cut:
    """``consumer`` reads ``groups`` groups of inputs, of which ``kept`` are to stay."""

    kind: str
    consumer: Weight
    bias: str | None  # of the consumer, on disk
    producers: tuple[Producer, ...]
    groups: int
    kept: int

    @property
    def unit(self) -> int:
        """Inputs a group."""
        return self.consumer.in_features // self.groups

    def columns(self, kept: Tensor) -> Tensor:
        """The inputs of the groups ``kept``."""
        return _members(kept, Span(0, self.unit))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor on disk -> its shape when the groups are gone."""
        found: dict[str, tuple[int, ...]] = {}
        for producer in self.producers:
            rows = sum(span.unit for span in producer.spans) * self.kept
            found[producer.weight.source] = _stored(producer.weight, rows, producer.weight.in_features)
            if producer.bias:
                found[producer.bias] = (rows,)
        consumer = self.consumer
        found[consumer.source] = _stored(consumer, consumer.out_features, self.kept * self.unit)
        return found


def _members(groups: Tensor, span: Span) -> Tensor:
    inside = torch.arange(span.unit, device=groups.device)
    return (span.first + groups[:, None] * span.unit + inside).flatten()


def _stored(weight: Weight, rows: int, columns: int) -> tuple[int, int]:
    return (columns, rows) if weight.transposed else (rows, columns)


def mlps(skeleton: Skeleton) -> list[Cut]:
    """The MLP of every block, whole.

    Raises:
        UserError: a mixture of experts, an MLP of another layout, blocks of several widths.
    """
    name = skeleton.config.model_type
    if any(weight.expert is not None for weight in skeleton.weights):
        raise UserError(
            f"{name} is a mixture of experts, which width does not make narrower; use depth, or prune its weights, e.g. 2:4"
        )
    found = list(_cuts(skeleton, CHANNELS))
    if {cut.consumer.block for cut in found} != set(range(len(skeleton.blocks))):
        raise UserError(
            f"{name} cannot be made narrower: its MLPs have none of the known layouts; use depth, or prune its weights"
        )
    widths = sorted({cut.groups for cut in found})
    if len(widths) > 1 or len(found) != len(skeleton.blocks):
        raise UserError(
            f"{name} cannot be made narrower: its MLPs have {', '.join(map(str, widths))} channels, and one number for "
            "all blocks is cut"
        )
    return found


def attentions(skeleton: Skeleton) -> list[Cut]:
    """The attention of every block, whole, in groups of a key/value head with its queries; empty where none is known."""
    found = list(_cuts(skeleton, HEADS))
    everywhere = {cut.consumer.block for cut in found} == set(range(len(skeleton.blocks)))
    return found if everywhere and len(found) == len(skeleton.blocks) else []


def _cuts(skeleton: Skeleton, kind: str) -> Iterator[Cut]:
    parents: dict[str, dict[str, Weight]] = defaultdict(dict)
    for weight in skeleton.weights:
        parent, _, leaf = weight.parameter.removesuffix(".weight").rpartition(".")
        if weight.block is not None:
            parents[parent][leaf] = weight
    for leaves in parents.values():
        for reader, makers in (MLPS if kind == CHANNELS else ATTENTIONS).items():
            named = next((names for names in makers if {reader, *names} <= set(leaves)), None)
            if named and (cut := _cut(skeleton, kind, leaves[reader], [leaves[n] for n in named])):
                yield cut


def _cut(skeleton: Skeleton, kind: str, consumer: Weight, makers: list[Weight]) -> Cut | None:
    """None where the shapes are not those of the layout that the names stand for."""
    whole = [consumer, *makers]
    if any(len(skeleton.sources[w.parameter]) != 1 or skeleton.sources[w.parameter][0][1] for w in whole):
        return None  # made of several tensors on disk
    width, config = consumer.in_features, skeleton.config
    if kind == CHANNELS:
        groups = width
        spans = (
            [[Span(0, 1)]] * len(makers)
            if makers[0].out_features == width
            else [[Span(0, 1), Span(width, 1)]]
        )
    else:
        queries = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or queries
        query, head = width // groups, width // queries
        spans = [[Span(0, query)], [Span(0, head)], [Span(0, head)]]
        if len(makers) == 1:  # queries, keys and values one after another in one weight
            spans = [[Span(0, query), Span(width, head), Span(width + groups * head, head)]]
    for maker, parts in zip(makers, spans, strict=True):
        if maker.out_features != sum(span.unit for span in parts) * groups:
            return None
    producers = tuple(
        Producer(maker, _bias(skeleton, maker), tuple(parts))
        for maker, parts in zip(makers, spans, strict=True)
    )
    return Cut(kind, consumer, _bias(skeleton, consumer), producers, groups, groups)


def _bias(skeleton: Skeleton, weight: Weight) -> str | None:
    parts = skeleton.sources.get(bias_of(weight))
    return parts[0][0] if parts else None


def bias_of(weight: Weight) -> str:
    """The parameter that is the bias of ``weight``, if the model has one."""
    return weight.parameter.removesuffix("weight") + "bias"
