"""Which rows of which weights make the inputs of a weight, channel by channel: what may be reordered without a trace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.pattern import NM, Pattern
from llmsparse.skeleton import Skeleton, Weight

MLP = {  # the last part of a consumer's name -> those of the weights whose outputs, elementwise, are its inputs
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)),
    "w2": (("w1", "w3"), ("w1",)),
    "fc2": (("fc1",),),
    "c_proj": (("c_fc",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
}
ATTENTION = {  # the same of the weight whose outputs are values, alone or with queries and keys
    "o_proj": ("v_proj", "qkv_proj"),
    "out_proj": ("v_proj", "qkv_proj"),
    "c_proj": ("c_attn",),
    "dense": ("query_key_value", "v_proj"),
}
BY_HEAD = "query_key_value"  # its rows may be q, k and v of one head after the other


@dataclass(frozen=True)
class Channels:
    """The inputs of ``consumer`` and the rows that make them.

    Channels come in sets (heads of values, or one for an MLP) that are not mixed; ``columns`` (sets, copies, width) are
    the inputs that read each channel, and of each producer there are rows (sets, copies, width) that make it.
    """

    kind: str  # attention, mlp or experts: what is checked together
    consumer: Weight
    columns: Tensor
    producers: tuple[tuple[Weight, Tensor], ...]

    def moves(self, order: Tensor) -> list[tuple[Weight, bool, Tensor]]:
        """(weight, whether its rows move, what comes to each place there); ``order``: (sets, width)."""
        moved = [(self.consumer, False, index(self.columns, order, self.consumer.in_features))]
        return moved + [(w, True, index(rows, order, w.out_features)) for w, rows in self.producers]

    def scores(self, scores: Tensor) -> Tensor:
        """``scores`` (out, in) of the consumer by set: (sets, copies x out, width)."""
        by_set = scores[:, self.columns.to(scores.device)]  # (out, sets, copies, width)
        return by_set.permute(1, 2, 0, 3).flatten(1, 2)


def index(places: Tensor, order: Tensor, size: int) -> Tensor:
    """What comes to each of ``size`` places when those of each set (sets, copies, width) are put into its order."""
    moved = torch.arange(size)
    moved[places.flatten()] = places.gather(2, order[:, None].expand_as(places)).flatten()
    return moved


def permutable(skeleton: Skeleton, patterns: Mapping[str, Pattern]) -> tuple[list[Channels], dict[str, str]]:
    """What may be reordered for the weights with an n:m pattern; and why not, by the names of those where it may not.

    Weights that read the hidden states are in neither: what makes those, every block has to agree on.
    """
    weights = {w.name: w for w in skeleton.weights}
    found: list[Channels] = []
    reasons: dict[str, str] = {}
    for name, pattern in patterns.items():
        if not isinstance(pattern, NM):
            continue
        channels = _channels(weights[name], weights, skeleton.config.get_text_config())
        if isinstance(channels, Channels):
            channels = _fitting(channels, pattern, skeleton)
        if isinstance(channels, str):
            reasons[name] = channels
        elif channels is not None:
            found.append(channels)
    return found, reasons


def may_permute(skeleton: Skeleton, patterns: Mapping[str, Pattern]) -> None:
    """Raises UserError: no pattern is n:m, or nothing may be reordered for one."""
    strict = [name for name, pattern in patterns.items() if isinstance(pattern, NM)]
    if not strict:
        pattern = next(iter(patterns.values()))
        raise UserError(f"--permute goes with an n:m pattern such as 2:4; in {pattern} any input may be kept")
    found, reasons = permutable(skeleton, patterns)
    if not found:
        name, reason = next(iter(reasons.items()), (strict[0], "the hidden states are its inputs"))
        raise UserError(f"--permute can reorder the inputs of no weight; of {name}: {reason}; leave it out")


def _fitting(channels: Channels, pattern: NM, skeleton: Skeleton) -> Channels | str:
    width = channels.columns.shape[-1]
    if width % pattern.m or width == pattern.m:
        return f"{pattern.m} consecutive inputs do not lie inside {width} that may be exchanged, or are all of them"
    involved = [channels.consumer, *(producer for producer, _ in channels.producers)]
    tied = [w.name for w in involved if skeleton.same_as(w.source)]
    return f"{tied[0]} is tied to another tensor" if tied else channels


def _channels(consumer: Weight, weights: dict[str, Weight], config: Any) -> Channels | str | None:
    """What makes the inputs of ``consumer``, by the names on disk; a text: why it is not known; None: hidden states.

    Whether the model does nothing else to a channel on the way is not known here.
    """
    stem, _, leaf = consumer.name.removesuffix(".weight").rpartition(".")
    if leaf not in MLP and leaf not in ATTENTION:
        return None
    if consumer.index is not None:
        return "its experts lie in one tensor"
    for names in MLP.get(leaf, ()):
        producers = [weights[key] for name in names if (key := f"{stem}.{name}.weight") in weights]
        if len(producers) == len(names):
            return _mlp(consumer, producers)
    for name in ATTENTION.get(leaf, ()):
        if (key := f"{stem}.{name}.weight") in weights:
            return _attention(consumer, weights[key], config)
    return "the weights that make its inputs are not known"


def _mlp(consumer: Weight, producers: list[Weight]) -> Channels | str:
    width = consumer.in_features
    made = []
    for producer in producers:
        copies, rest = divmod(producer.out_features, width)
        if rest or not 1 <= copies <= 2:
            return f"{producer.name} has {producer.out_features} rows for its {width} inputs"
        made.append((producer, torch.arange(copies * width).view(1, copies, width)))
    kind = "experts" if consumer.expert is not None else "mlp"
    return Channels(kind, consumer, torch.arange(width).view(1, 1, width), tuple(made))


def _attention(consumer: Weight, producer: Weight, config: Any) -> Channels | str:
    heads = config.num_attention_heads
    width, rest = divmod(consumer.in_features, heads)
    rows = _value_rows(producer, heads, width)
    if rest or rows is None or heads % len(rows):
        return f"which rows of {producer.name} make its inputs is not known"
    columns = torch.arange(consumer.in_features).view(len(rows), -1, width)
    return Channels("attention", consumer, columns, ((producer, rows),))


def _value_rows(producer: Weight, heads: int, width: int) -> Tensor | None:
    """The rows (heads of values, 1, width) of ``producer`` that are values; queries and keys come before them."""
    total, rest = divmod(producer.out_features, width)  # in heads of any kind
    rows = torch.arange(producer.out_features)
    if rest:
        return None
    if ".v_proj." in f".{producer.name}.":
        return rows.view(-1, 1, width)
    if BY_HEAD in producer.name and total == 3 * heads:
        return rows.view(heads, 3, width)[:, 2:]
    values, rest = divmod(total - heads, 2)
    return None if rest or values < 1 else rows[-values * width :].view(-1, 1, width)


def bias_of(skeleton: Skeleton, weight: Weight) -> str | None:
    """The parameter that is added to what ``weight`` makes."""
    name = weight.parameter.removesuffix("weight") + "bias"
    return name if name in skeleton.sources else None
