"""n values of every m consecutive inputs and their places: 1:4 and sparser exact patterns."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.values import Values

if TYPE_CHECKING:
    from llmsparse.packed import Packed

FIELDS = ("n", "m", "nnz", "size")
GROUPS = (4, 8, 16, 32, 64, 128, 256)


def wrong(packed: "Packed") -> str | None:
    """What no n:m weight can have."""
    out, columns = packed.shape
    if packed.m not in GROUPS or columns % packed.m or not 0 < packed.n <= packed.m:
        return f"has {packed.n}:{packed.m}; m must be a power of two from 4 to 256 that divides {columns}"
    wanted = (out * _row(packed), _size(packed))
    if (packed.nnz, packed.size) != wanted:
        return f"has nnz {packed.nnz} and size {packed.size}; {packed.n}:{packed.m} gives {wanted}"
    return None


def tensors(packed: "Packed") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    width = -(-_row(packed) * _place_bits(packed.m) // 8)
    return {
        "positions": (torch.uint8, (packed.shape[0], width)),
        "values": (packed.kind.dtype, (packed.size,)),
    }


def measure(numbers: Tensor, values: Values) -> Iterator[dict[str, Any]]:
    """The fields for every m that divides the inputs, where places take less than a bit a weight."""
    out, columns = numbers.shape
    kept = {m: 0 for m in GROUPS if columns % m == 0}
    for first, last in bits.panels(out, columns):
        nonzero = numbers[first:last] != 0
        for m in kept:
            most = int(nonzero.view(last - first, columns // m, m).sum(2).max())
            kept[m] = max(kept[m], most)
    for m, n in kept.items():
        if (found := fields((out, columns), n, m, values)) is not None:
            yield found


def fields(shape: tuple[int, int], n: int, m: int, values: Values) -> dict[str, Any] | None:
    """The fields of n:m, where places take less than a bit a weight."""
    out, columns = shape
    if m not in GROUPS or columns % m or n <= 0 or n * _place_bits(m) >= m:
        return None
    row = columns // m * n
    return {"n": n, "m": m, "nnz": out * row, "size": out * _width(row, values.bits)}


def pack(packed: "Packed", numbers: Tensor) -> dict[str, Tensor]:
    places, values, row = [], [], _row(packed)
    for first, last in bits.panels(*packed.shape):
        groups = numbers[first:last].reshape(last - first, -1, packed.m)
        chosen = (groups == 0).to(torch.uint8).sort(dim=2, stable=True).indices  # the kept ones first
        chosen = chosen[:, :, : packed.n].sort(dim=2).values
        stored = groups.gather(2, chosen).reshape(last - first, row)
        shifts = torch.arange(_place_bits(packed.m))
        place_bits = (chosen.reshape(last - first, row, 1) >> shifts) & 1
        places.append(bits.pack_bits(place_bits.reshape(last - first, -1)))
        values.append(
            bits.pack_nibbles(stored.flatten(), _counts(packed, last - first))
            if packed.kind.bits == 4
            else stored.flatten()
        )
    return {"positions": torch.cat(places), "values": torch.cat(values)}


def starts(packed: "Packed", tensors: Mapping[str, Tensor]) -> None:
    """Every row takes the same: nothing to sum up."""


def unpack(
    packed: "Packed", tensors: Mapping[str, Tensor], first: int, last: int, starts: Tensor | None
) -> Tensor:
    width = _width(_row(packed), packed.kind.bits)
    stored = tensors["values"][first * width : last * width]
    if packed.kind.bits == 4:
        stored = bits.unpack_nibbles(stored, _counts(packed, last - first).to(stored.device))
    places = _places(packed, tensors["positions"][first:last])
    groups = torch.zeros(*places.shape[:2], packed.m, dtype=stored.dtype, device=stored.device)
    groups.scatter_(2, places, stored.view(places.shape))
    return groups.view(last - first, packed.shape[1])


def kept(packed: "Packed", tensors: Mapping[str, Tensor], first: int, last: int) -> Tensor:
    """Which weights are stored, bool (rows, in), zeros among the values included."""
    places = _places(packed, tensors["positions"][first:last])
    groups = torch.zeros(*places.shape[:2], packed.m, dtype=torch.bool, device=places.device)
    return groups.scatter_(2, places, True).view(last - first, packed.shape[1])


def check(packed: "Packed", tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The tensor that breaks the format, and how."""
    positions, values = tensors["positions"], tensors["values"]
    if bits.bits_beyond(positions, _row(packed) * _place_bits(packed.m)):
        return "positions", "has bits set beyond its last place"
    for first, last in bits.panels(*packed.shape):
        places = _places(packed, positions[first:last])
        if bool((places[:, :, 1:] <= places[:, :, :-1]).any()):
            return "positions", f"has a group of {packed.m} whose places do not rise"
    if packed.kind.bits == 4 and bits.half_bytes_set(values, _counts(packed, packed.shape[0])):
        return "values", "has a row whose last half byte is not 0"
    if packed.kind.name == "int8" and bool((values == -128).any()):
        return "values", "holds the code -128"
    return None


def _places(packed: "Packed", positions: Tensor) -> Tensor:
    """int64 (rows, groups, n): each stored value's place in its group."""
    width = _place_bits(packed.m)
    each = bits.unpack_bits(positions, _row(packed) * width).view(len(positions), -1, packed.n, width)
    return (each.long() << torch.arange(width, device=positions.device)).sum(3)


def _place_bits(m: int) -> int:
    return m.bit_length() - 1


def _row(packed: "Packed") -> int:
    """Stored values a row."""
    return packed.shape[1] // packed.m * packed.n


def _width(row: int, bits: int) -> int:
    """Elements of the tensor of values that a row takes."""
    return (row + 1) // 2 if bits == 4 else row


def _size(packed: "Packed") -> int:
    return packed.shape[0] * _width(_row(packed), packed.kind.bits)


def _counts(packed: "Packed", rows: int) -> Tensor:
    return torch.full((rows,), _row(packed), dtype=torch.int64)
