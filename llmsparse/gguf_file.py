"""A GGUF file written tensor by tensor, and read back as the checkpoint's weights."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmsparse import bits, gguf_blocks, gguf_rounding
from llmsparse.errors import UserError
from llmsparse.gguf_layout import Family, Place, places, rope_factors, settings
from llmsparse.gguf_rounding import Rounding
from llmsparse.gguf_tokenizer import Vocabulary
from llmsparse.heap import return_freed_memory
from llmsparse.packing import Candidate, Numbers
from llmsparse.values import Values

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", 8: "Q8_0", 4: "Q4_0"}  # values, or bits of codes


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: from where, as what."""

    place: Place
    shape: tuple[int, ...]
    type: str  # ggml's name
    codes: Values | None = None  # the kind of its codes
    rounded: str | None = None  # the type that ggml was to round it to

    @property
    def bytes(self) -> int:
        block, size = gguf_blocks.SIZES[self.type]
        return int(np.prod(self.shape)) // block * size

    @property
    def left(self) -> bool:
        """Whether it was to be rounded, but stays floats."""
        return (self.codes is not None or self.rounded is not None) and self.type in ("F32", "F16", "BF16")


def plan(numbers: Numbers, rounding: Rounding, config: Any, family: Family) -> list[Entry]:
    """What each tensor will be, before any is read; of vectors (norms, biases) F32, as llama.cpp wants them."""
    checkpoint = numbers.checkpoint
    found = []
    for place in places(checkpoint.names(), config, family):
        shape = checkpoint.shape(place.source)
        vector = len(shape) == 1
        found.append(Entry(place, shape, "F32") if vector else _matrix(place, shape, numbers, rounding))
    return found


def _matrix(place: Place, shape: tuple[int, ...], numbers: Numbers, rounding: Rounding) -> Entry:
    """Codes, or what ggml rounds to, where blocks divide its rows; else floats."""
    floats, inputs = _floats(numbers), shape[1]
    if rounded := rounding.of(place, inputs):
        packs = inputs % gguf_blocks.SIZES[rounded][0] == 0
        return Entry(place, shape, rounded if packs else floats, rounded=rounded)
    kind = numbers.coded(_candidate(place))
    packs = kind is not None and gguf_blocks.fits(kind, inputs)
    return Entry(place, shape, TYPES[kind.bits] if kind and packs else floats, kind)


def _floats(numbers: Numbers) -> str:
    """The type of what has no codes."""
    kind = numbers.values
    return TYPES[kind.name] if kind is not None and kind.float_dtype is not None else "F16"


def _candidate(place: Place) -> Candidate:
    return Candidate(place.source.removesuffix(".weight"), place.source, table=place.table, head=place.head)


def panels(entry: Entry, numbers: Numbers) -> Iterator[np.ndarray]:
    """The tensor's content in the file, piece by piece: a table is larger than all that a panel takes."""
    place = entry.place
    if entry.codes is None:
        tensor = place.to_file(numbers.checkpoint.tensor(place.source))
        if entry.type == entry.rounded:
            return gguf_rounding.encode(entry.type, tensor, place.source)
        return _as_floats(tensor, entry)
    drawn = numbers.of(_candidate(place))
    assert drawn is not None and drawn[2] is not None
    kind, codes, scales = drawn[0], drawn[1], drawn[2]
    if not entry.left:
        return gguf_blocks.encode(kind, place.to_file(codes), place.to_file(scales))
    return _as_floats(place.to_file(kind.weight(codes, scales)), entry)


def _as_floats(tensor: Tensor, entry: Entry) -> Iterator[np.ndarray]:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.type]
    for first, last in bits.panels(tensor.shape[0], tensor[0].numel()):
        panel = tensor[first:last]
        if entry.place.shift:
            panel = panel.float() + entry.place.shift
        made = panel.to(dtype).contiguous()
        if not bool(made.isfinite().all()):
            whole = bool(panel.isfinite().all())
            why = "is beyond fp16's range" if whole else "holds values that are not finite"
            remedy = "use --values bf16" if whole else "repair the model"
            raise UserError(f"{entry.place.source} {why}; {remedy}")
        yield made.view(torch.int16).numpy() if dtype == torch.bfloat16 else made.numpy()


class Content(NamedTuple):
    """What GGUFWriter takes for an array: its size, and a way to write it."""

    nbytes: int
    panels: Iterator[np.ndarray]

    def tofile(self, stream: Any) -> None:
        for panel in self.panels:
            panel.tofile(stream)


def write(file: Path, entries: list[Entry], numbers: Numbers, header: "Header", progress: Any) -> None:
    """Names, shapes and types first, then one tensor after the other."""
    import gguf

    writer = gguf.GGUFWriter(file, header.family.name)
    try:
        header.add_to(writer, entries)
        for entry in entries:
            raw = gguf.GGMLQuantizationType[entry.type]
            writer.add_tensor_info(entry.place.name, entry.shape, np.dtype(np.float32), entry.bytes, raw)
        factors = rope_factors(header.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return_freed_memory()  # of the tokenizer, which may have taken as much as a table
        for entry in entries:
            content: Any = Content(entry.bytes, panels(entry, numbers))
            writer.write_tensor_data(content)
            numbers.checkpoint.close()
            return_freed_memory()
            progress.advance("writing", entry.place.name)
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()


@dataclass(frozen=True)
class Header:
    """What the file says before its tensors."""

    name: str
    family: Family
    config: Any
    vocabulary: Vocabulary

    def add_to(self, writer: Any, entries: list[Entry]) -> None:
        import gguf

        writer.add_type("model")
        writer.add_name(self.name)
        writer.add_file_type(gguf.LlamaFileType[_most(entries)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in settings(self.config, self.family).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{self.family.name}.{key}", value)
        self._add_tokenizer(writer)

    def _add_tokenizer(self, writer: Any) -> None:
        words = self.vocabulary
        writer.add_tokenizer_model(words.model)
        writer.add_tokenizer_pre(words.pre)
        writer.add_token_list(words.tokens)
        if words.scores:
            writer.add_token_scores(words.scores)
        writer.add_token_types(words.kinds)
        if words.merges:
            writer.add_token_merges(words.merges)
        for key, token in words.special.items():
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
        for key, flag in words.flags.items():
            writer.add_bool(f"tokenizer.ggml.{key}", flag)
        if words.chat_template is not None:
            writer.add_chat_template(words.chat_template)


def _most(entries: list[Entry]) -> str:
    """llama.cpp's name for the type of most bytes of the blocks' matrices."""
    sizes: dict[str, int] = {}
    for entry in entries:
        if len(entry.shape) == 2 and not (entry.place.table or entry.place.head):
            sizes[entry.type] = sizes.get(entry.type, 0) + entry.bytes
    most = max(sizes, key=lambda name: sizes[name])
    return {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}.get(most, f"MOSTLY_{most}")


def file_name(folder: Path, entries: list[Entry]) -> str:
    """As llama.cpp's files are called: the model's name, then the type."""
    hub = re.fullmatch(r"models--(?:.*--)?(.+)", folder.parent.parent.name)
    name = hub[1] if hub and folder.parent.name == "snapshots" else folder.name
    return f"{name}-{_most(entries).split('_', 1)[1]}.gguf"


def weights(file: Path, names: list[str], config: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``names`` as transformers has it, float32, from the file alone.

    Raises:
        UserError: the file lacks one.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for place in places(names, config, family):
        tensor = found.get(place.name)
        if tensor is None:
            raise UserError(f"{file} lacks {place.name}; export again")
        values = torch.from_numpy(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        yield place.source, place.from_file(values) - place.shift
