"""Bits and nibbles in bytes: matrices of bits, rows of 4-bit numbers, and what they take."""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 1 << 18  # numbers worked on together: bounds what a conversion holds beside its input and its result


def panels(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The rows in ranges of about ``PANEL`` numbers."""
    step = max(1, PANEL // max(columns, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (rows, n), the first in the lowest bit: bytes (rows, ceil(n / 8))."""
    rows, count = bits.shape
    padded = torch.zeros(rows, -(-count // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[:, :count] = bits
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded.view(rows, padded.shape[1] // 8, 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of each row of bytes: bool (rows, count)."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> places) & 1
    return bits.view(len(packed), packed.shape[1] * 8)[:, :count].bool()


def bits_beyond(packed: Tensor, count: int) -> bool:
    """Whether a bit after the first ``count`` of any row is set."""
    return bool(count % 8 and (packed[:, -1] >> (count % 8)).any())


def set_bits(packed: Tensor) -> Tensor:
    """How many bits of each row of bytes are set: int64 (rows,)."""
    counts = torch.empty(len(packed), dtype=torch.int64, device=packed.device)
    for first, last in panels(*packed.shape):
        x = packed[first:last]
        x = x - ((x >> 1) & 0x55)
        x = (x & 0x33) + ((x >> 2) & 0x33)
        counts[first:last] = ((x + (x >> 4)) & 0x0F).sum(1, dtype=torch.int64)
    return counts


def starts(counts: Tensor) -> Tensor:
    """Where each row begins when row r takes ``counts[r]`` places; the last entry is the end of all."""
    ends = counts.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])  # (rows + 1,)


def pack_nibbles(numbers: Tensor, counts: Tensor) -> Tensor:
    """Numbers -8..7, ``counts[r]`` of them in row r, plus 8, two a byte; every row from a new byte."""
    nibbles = torch.zeros(int(((counts + 1) // 2).sum()) * 2, dtype=torch.uint8, device=numbers.device)
    nibbles[_filled(counts)] = (numbers + 8).to(torch.uint8)
    pairs = nibbles.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_nibbles(packed: Tensor, counts: Tensor) -> Tensor:
    """The reverse of ``pack_nibbles``: int8 (sum of counts,)."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=1)
    return pairs.view(-1)[_filled(counts)].to(torch.int8) - 8


def half_bytes_set(packed: Tensor, counts: Tensor) -> bool:
    """Whether the unused half of the last byte of any row is not 0."""
    odd = counts % 2 == 1
    last = ((counts + 1) // 2).cumsum(0)[odd] - 1
    return bool((packed[last] >> 4).any())


def _filled(counts: Tensor) -> Tensor:
    """For each nibble whether it holds a number: all but the last of a row of odd count."""
    ends = ((counts + 1) // 2).cumsum(0) * 2
    filled = torch.ones(int(ends[-1]) if len(ends) else 0, dtype=torch.bool, device=counts.device)
    filled[ends[counts % 2 == 1] - 1] = False
    return filled
