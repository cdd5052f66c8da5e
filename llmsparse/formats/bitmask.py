"""A bit for each weight, then the kept values: any sparsity from about 10 %."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.values import Values

if TYPE_CHECKING:
    from llmsparse.packed import Packed

FIELDS = ("nnz", "size")  # of config.json, beside layout, values and shape


def wrong(packed: "Packed") -> str | None:
    """What no bitmask can have."""
    out, columns = packed.shape
    if packed.nnz > out * columns:
        return f"has nnz {packed.nnz}, more than its {out} x {columns} weights"
    least, most = packed.nnz, packed.nnz
    if packed.kind.bits == 4:
        least, most = (packed.nnz + 1) // 2, (packed.nnz + min(out, packed.nnz)) // 2
    if not least <= packed.size <= most:
        return f"has size {packed.size}, which {packed.nnz} values cannot take"
    return None


def tensors(packed: "Packed") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    out, columns = packed.shape
    return {"mask": (torch.uint8, (out, -(-columns // 8))), "values": (packed.kind.dtype, (packed.size,))}


def measure(numbers: Tensor, values: Values) -> Iterator[dict[str, Any]]:
    """The fields that ``numbers`` (out, in) would have."""
    counts = _counts(numbers)
    size = ((counts + 1) // 2).sum() if values.bits == 4 else counts.sum()
    yield {"nnz": int(counts.sum()), "size": int(size)}


def pack(packed: "Packed", numbers: Tensor) -> dict[str, Tensor]:
    masks, values = [], []
    for first, last in bits.panels(*packed.shape):
        panel = numbers[first:last]
        kept = panel != 0
        masks.append(bits.pack_bits(kept))
        stored = panel.masked_select(kept)
        values.append(bits.pack_nibbles(stored, kept.sum(1)) if packed.kind.bits == 4 else stored)
    return {"mask": torch.cat(masks), "values": torch.cat(values)}


def starts(packed: "Packed", tensors: Mapping[str, Tensor]) -> Tensor:
    counts = bits.set_bits(tensors["mask"])
    return bits.starts((counts + 1) // 2 if packed.kind.bits == 4 else counts)


def unpack(
    packed: "Packed", tensors: Mapping[str, Tensor], first: int, last: int, starts: Tensor | None
) -> Tensor:
    assert starts is not None
    kept = bits.unpack_bits(tensors["mask"][first:last], packed.shape[1])
    stored = tensors["values"][int(starts[first]) : int(starts[last])]
    if packed.kind.bits == 4:
        stored = bits.unpack_nibbles(stored, kept.sum(1))
    return torch.zeros(kept.shape, dtype=stored.dtype, device=kept.device).masked_scatter_(kept, stored)


def check(packed: "Packed", tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The tensor that breaks the format, and how."""
    mask, values = tensors["mask"], tensors["values"]
    if bits.bits_beyond(mask, packed.shape[1]):
        return "mask", f"has bits set beyond its {packed.shape[1]} inputs"
    counts = bits.set_bits(mask)
    if int(counts.sum()) != packed.nnz:
        return "mask", f"has {int(counts.sum())} bits set, but config.json says nnz {packed.nnz}"
    if packed.kind.bits == 4:
        if int(((counts + 1) // 2).sum()) != packed.size:
            return "mask", f"has rows that take {int(((counts + 1) // 2).sum())} bytes, not {packed.size}"
        if bits.half_bytes_set(values, counts):
            return "values", "has a row whose last half byte is not 0"
    if packed.kind.name == "int8" and bool((values == -128).any()):
        return "values", "holds the code -128"
    return None


def _counts(numbers: Tensor) -> Tensor:
    counts = torch.empty(len(numbers), dtype=torch.int64)
    for first, last in bits.panels(*numbers.shape):
        counts[first:last] = (numbers[first:last] != 0).sum(1)
    return counts
