"""What ``width:25%`` will do to a checkpoint: which cuts its class allows, known from headers alone."""

from dataclasses import dataclass, replace
from typing import Any

from llmsparse.checkpoint import Checkpoint
from llmsparse.cuts import Cut, attentions, mlps
from llmsparse.errors import UserError
from llmsparse.outline import Outline, narrower, shallower, why_not
from llmsparse.shrinking import Shrink, Width
from llmsparse.skeleton import Skeleton


@dataclass(frozen=True)
class Narrowing:
    """``outline`` of the narrower checkpoint, and the ``cuts`` that make it; ``facts`` for the report."""

    outline: Outline
    cuts: tuple[Cut, ...]
    facts: dict[str, Any]

    def of(self, block: int) -> dict[str, Cut]:
        """The cuts of one block by the name of the weight that reads what is cut."""
        return {cut.consumer.name: cut for cut in self.cuts if cut.consumer.block == block}


def narrowing(source: Checkpoint, width: Width, trust_remote_code: bool = False) -> Narrowing:
    """The MLPs as ``width`` asks; of the heads at most as many as it asks, as far as the model's class allows fewer.

    Raises:
        UserError: the MLPs cannot be cut: a mixture of experts, an unknown layout, fewer channels than must stay.
    """
    skeleton = Skeleton(source, trust_remote_code=trust_remote_code)
    whole, heads = mlps(skeleton), attentions(skeleton)
    channels = [replace(cut, kept=width.channels(cut.groups)) for cut in whole]
    if reason := why_not(narrower(source, skeleton, channels), trust_remote_code):
        raise UserError(
            f"{skeleton.config.model_type} cannot be made narrower: {reason}; use depth, or prune its weights"
        )
    fewer, note = _fewer_heads(source, skeleton, width, heads, trust_remote_code)
    if width.compensation == "bias" and (bare := [cut for cut in (*channels, *fewer) if cut.bias is None]):
        raise UserError(
            f"width.compensation=bias needs biases, and {bare[0].consumer.name} has none in {skeleton.config.model_type}; "
            "leave it at refit"
        )
    outline = narrower(source, skeleton, [*channels, *fewer])
    facts = {
        "mlp_channels": [channels[0].groups, channels[0].kept],
        **_head_facts(skeleton, heads, fewer),
        "note": note,
    }
    return Narrowing(outline, (*channels, *fewer), facts)


def _fewer_heads(
    source: Checkpoint, skeleton: Skeleton, width: Width, heads: list[Cut], trust_remote_code: bool
) -> tuple[list[Cut], str | None]:
    """The cuts of the heads, none where all must stay, and why they are not what was asked for."""
    name = skeleton.config.model_type
    if not heads:
        return [], f"all heads stay: the layout of {name}'s queries, keys and values is not known"
    count = heads[0].groups
    wanted = width.heads(count)
    if wanted == count:
        return [], f"all heads stay: {count} key/value heads are too few for {width}"
    refused = None
    for kept in range(wanted, count):
        cuts = [replace(cut, kept=kept) for cut in heads]
        reason = why_not(narrower(source, skeleton, cuts), trust_remote_code)
        if reason is None:
            note = (
                f"{kept} instead of {wanted} of {count} key/value heads stay: {refused}" if refused else None
            )
            return cuts, note
        refused = refused or reason
    return [], f"all heads stay: {refused}"


def _head_facts(skeleton: Skeleton, heads: list[Cut], fewer: list[Cut]) -> dict[str, Any]:
    queries = skeleton.config.num_attention_heads
    if not heads:
        return {"attention_heads": [queries, queries]}
    groups = heads[0].groups
    kept = fewer[0].kept if fewer else groups
    return {"attention_heads": [queries, queries // groups * kept], "key_value_heads": [groups, kept]}


def outlined(source: Checkpoint, shrink: Shrink, trust_remote_code: bool = False) -> Outline:
    """What a checkpoint will look like when it was made smaller; of blocks as if the last ones were dropped.

    Raises:
        UserError: it cannot be done.
    """
    if isinstance(shrink, Width):
        return narrowing(source, shrink, trust_remote_code).outline
    skeleton = Skeleton(source, trust_remote_code=trust_remote_code)
    name, count = skeleton.config.model_type, len(skeleton.blocks)
    if shrink.blocks >= count:
        raise UserError(f"{shrink} would leave none of {count} blocks; drop fewer")
    outline = shallower(source, skeleton, range(count - shrink.blocks, count))
    if reason := why_not(outline, trust_remote_code):
        raise UserError(f"{name} cannot do with fewer blocks: {reason}")
    return outline
