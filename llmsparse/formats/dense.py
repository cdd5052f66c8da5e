"""Every code stored: for tables, and for weights without zeros to speak of."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.values import Values

if TYPE_CHECKING:
    from llmsparse.packed import Packed

FIELDS = ()


def wrong(packed: "Packed") -> str | None:
    """What this layout does not store: floats, which are ordinary tensors."""
    return None if packed.kind.float_dtype is None else f"has layout dense with values {packed.values}"


def tensors(packed: "Packed") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    out, columns = packed.shape
    return {"codes": (packed.kind.dtype, (out, (columns + 1) // 2 if packed.kind.bits == 4 else columns))}


def measure(numbers: Tensor, values: Values) -> Iterator[dict[str, Any]]:
    """No fields; nothing for floats."""
    if values.float_dtype is None:
        yield {}


def pack(packed: "Packed", numbers: Tensor) -> dict[str, Tensor]:
    if packed.kind.bits != 4:
        return {"codes": numbers.contiguous()}
    out, columns = packed.shape
    codes = [
        bits.pack_nibbles(numbers[first:last].flatten(), torch.full((last - first,), columns))
        for first, last in bits.panels(out, columns)
    ]
    return {"codes": torch.cat(codes).view(out, -1)}


def starts(packed: "Packed", tensors: Mapping[str, Tensor]) -> None:
    """Every row takes the same: nothing to sum up."""


def unpack(
    packed: "Packed", tensors: Mapping[str, Tensor], first: int, last: int, starts: Tensor | None
) -> Tensor:
    return rows(packed, tensors["codes"][first:last])


def rows(packed: "Packed", codes: Tensor) -> Tensor:
    """The numbers of whole rows of stored codes, in any order: (rows, in)."""
    if packed.kind.bits != 4:
        return codes
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).view(len(codes), codes.shape[1] * 2)
    return pairs[:, : packed.shape[1]].to(torch.int8) - 8


def check(packed: "Packed", tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The tensor that breaks the format, and how."""
    codes = tensors["codes"]
    if packed.kind.bits == 8 and bool((codes == -128).any()):
        return "codes", "holds the code -128"
    if packed.kind.bits == 4 and packed.shape[1] % 2 and bool((codes[:, -1] >> 4).any()):
        return "codes", "has a row whose last half byte is not 0"
    return None
