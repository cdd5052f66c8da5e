"""A checkpoint that is not written yet: the names, shapes and config of a smaller model, made of another one's headers."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmsparse.checkpoint import Checkpoint
from llmsparse.cuts import CHANNELS, Cut
from llmsparse.errors import UserError
from llmsparse.skeleton import Skeleton

WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")  # what configs call an MLP's channels
Headers = dict[str, dict[str, dict[str, Any]]]  # file -> tensor -> dtype, shape


class Outline(Checkpoint):
    """``source`` with other ``headers`` and with ``changes`` to its config.json."""

    def __init__(self, source: Checkpoint, headers: Headers, changes: dict[str, Any]) -> None:
        super().__init__(source.folder, {file: tensors for file, tensors in headers.items() if tensors})
        self.source = source
        self.raw: dict[str, Any] = {**raw_config(source), **changes}

    def config(self, trust_remote_code: bool = False) -> Any:
        """The transformers config that config.json will hold."""
        before = super().config(trust_remote_code)
        try:
            return type(before).from_dict(dict(self.raw))
        except Exception as error:  # each config class has checks of its own
            raise UserError(
                f"{before.model_type} allows no such config: {' '.join(str(error).split())}"
            ) from error

    def write_config(self, folder: Path) -> None:
        """Put config.json into ``folder``."""
        (folder / "config.json").write_text(
            json.dumps(self.raw, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )


def raw_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json holds, or will hold."""
    if isinstance(checkpoint, Outline):
        return checkpoint.raw
    return json.loads((checkpoint.folder / "config.json").read_text("utf-8"))


def origin(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that lies in a folder, of which outlines were made."""
    while isinstance(checkpoint, Outline):
        checkpoint = checkpoint.source
    return checkpoint


def narrower(source: Checkpoint, skeleton: Skeleton, cuts: Iterable[Cut]) -> Outline:
    """``source`` when every cut of ``cuts`` was made."""
    cuts = list(cuts)
    shapes = {name: shape for cut in cuts for name, shape in cut.shapes().items()}
    headers = {
        file: {
            name: {**entry, "shape": list(shapes.get(name, entry["shape"]))}
            for name, entry in tensors.items()
        }
        for file, tensors in source.headers.items()
    }
    changes: dict[str, Any] = {}
    for cut in {cut.kind: cut for cut in cuts}.values():
        changes |= _channels(skeleton, cut) if cut.kind == CHANNELS else _heads(skeleton, cut)
    return Outline(source, headers, changes)


def _channels(skeleton: Skeleton, cut: Cut) -> dict[str, Any]:
    config = skeleton.config
    name = next(
        (
            name
            for name in WIDTHS
            if getattr(config, name, None) in (cut.groups, None) and hasattr(config, name)
        ),
        None,
    )
    if name is None:
        raise UserError(
            f"{config.model_type} cannot be made narrower: its config has no width of {cut.groups} for the MLP; use depth, "
            "or prune its weights"
        )
    return {_key(config, name): cut.kept}


def _heads(skeleton: Skeleton, cut: Cut) -> dict[str, Any]:
    config = skeleton.config
    queries = config.num_attention_heads
    changes = {_key(config, "num_attention_heads"): queries // cut.groups * cut.kept}
    if hasattr(config, "num_key_value_heads"):
        changes[_key(config, "num_key_value_heads")] = cut.kept
    return {**changes, "head_dim": cut.consumer.in_features // queries}


def _key(config: Any, name: str) -> str:
    """What config.json calls the attribute ``name``."""
    return config.attribute_map.get(name, name)


def shallower(source: Checkpoint, skeleton: Skeleton, dropped: Iterable[int]) -> Outline:
    """``source`` without the blocks ``dropped``; the others get consecutive numbers.

    Raises:
        UserError: the names of its tensors do not tell the block.
    """
    gone, count = set(dropped), len(skeleton.blocks)
    kept = [index for index in range(count) if index not in gone]
    headers: Headers = {}
    for file, tensors in source.headers.items():
        names = {name: renumbered(skeleton, name, kept) for name in tensors}
        headers[file] = {names[name]: entry for name, entry in tensors.items() if names[name]}  # type: ignore[misc]
    config = skeleton.config
    changes: dict[str, Any] = {_key(config, "num_hidden_layers"): len(kept)}
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            changes[name] = [value[index] for index in kept]  # layer_types and the like
    return Outline(source, headers, changes)


def renumbered(skeleton: Skeleton, name: str, kept: list[int]) -> str | None:
    """A disk tensor's name where only the blocks ``kept`` are left; None for one of another block."""
    match = re.search(rf"(?:^|\.){re.escape(skeleton.block_path.rpartition('.')[2])}\.(\d+)\.", name)
    if match is None:
        return name
    index = int(match[1])
    return name[: match.start(1)] + str(kept.index(index)) + name[match.end(1) :] if index in kept else None


def why_not(outline: Outline, trust_remote_code: bool = False) -> str | None:
    """What keeps transformers' own class from loading ``outline``; None where every shape is the expected one."""
    try:
        skeleton = Skeleton(outline, trust_remote_code=trust_remote_code)
    except UserError as error:
        return str(error)
    for name, value in skeleton.model.state_dict().items():
        parts = skeleton.sources.get(name, [])
        if len(parts) == 1 and parts[0][1] is None and tuple(value.shape) != outline.shape(parts[0][0]):
            expected = " x ".join(map(str, value.shape))
            return f"{skeleton.config.model_type} would then have {name} as {expected}"
    return None
