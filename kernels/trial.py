"""A kernel of packed weights tried on a small random weight before it is trusted on a device."""

from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llmsparse.kernels import widen

ALLOWED = 0.01  # share of the norm: 16-bit results are off by 0.004 at the most


class Call(NamedTuple):
    """A product to be tried."""

    tokens: int
    rows: int
    columns: int
    programs: int


CALLS = (Call(1, 70, 1024, 1), Call(8, 70, 1024, 1 << 20))


def wrong(
    kernel: ModuleType,
    unpacking: ModuleType | None,
    device: torch.device,
    kind: tuple[str, torch.dtype],
    calls: Iterable[Call] | None = None,
) -> str | None:
    """What of ``linear`` and ``unpack`` is wrong on ``device`` for values and inputs of ``kind``; None if nothing is."""
    values, inputs = kind
    for call in CALLS if calls is None else calls:
        numbers, scales, dense = weight(values, (call.rows, call.columns), device)
        packed = kernel.pack(numbers, values, scales)
        x = torch.randn(call.tokens, call.columns, generator=torch.Generator().manual_seed(1)).to(
            device, inputs
        )
        shape = (call.rows, call.columns)
        found = kernel.linear(packed, shape, values, x, programs=call.programs)
        if reason := _far(found, x.double() @ dense.T):
            return f"its product of {call.tokens} tokens is wrong by {reason}"
        if unpacking is not None:
            out = torch.empty(shape, dtype=widen.FLOATS.get(values, inputs), device=device)
            unpacking.unpack(packed, shape, values, out)
            if reason := _far(out, dense):
                return f"the weight that it unpacks is wrong by {reason}"
    return None


def weight(values: str, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Numbers, scales and the weight in float64 of a random 2:4 weight, which every pattern here allows."""
    random = torch.Generator().manual_seed(0)
    floats = torch.randn(shape, generator=random)
    lost = floats.view(shape[0], -1, 4).abs().argsort(2).argsort(2) < 2
    floats.masked_fill_(lost.view(shape), 0.0)
    if values in widen.FLOATS:
        stored = floats.to(widen.FLOATS[values])
        return stored.view(torch.int16).to(device), None, stored.double().to(device)
    most, group = (127, shape[1]) if values == "int8" else (7, min(widen.group_of(values), shape[1]))
    scales = torch.rand(shape[0], -(-shape[1] // group), generator=random).bfloat16()
    codes = (floats * most / 3).round().clamp(-most, most).to(torch.int8)
    dense = codes.double() * scales.double().repeat_interleave(group, 1)[:, : shape[1]]
    return codes.to(device), scales.to(device), dense.to(device)


def _far(found: Tensor, wanted: Tensor) -> str:
    """How far ``found`` is off, where that is too far; NaN is."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return "" if error < ALLOWED else f"{error:.2g} of its norm"
