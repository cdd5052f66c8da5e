"""A packed weight multiplied by the native kernels: up to eight tokens at once, more through unpacked panels."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.kernels.cpu import library

PANEL = 1 << 20  # weights unpacked at a time for many tokens: they stay in a core's cache
DTYPES = (torch.float32, torch.bfloat16)


def why_not(x: Tensor) -> str | None:
    """Why the native kernels do not multiply ``x``; None where they do."""
    if x.device.type != "cpu":
        return f"there is no kernel for {x.device.type} devices"
    if x.dtype not in (*DTYPES, torch.float16):
        return f"there is no kernel for {x.dtype}"
    return _none_runs()


@cache
def _none_runs() -> str | None:
    reasons = library.available()
    return "; ".join(f"{name}: {why}" for name, why in reasons.items()) if all(reasons.values()) else None


def matrix(stored: Any) -> library.Matrix:
    """The kernels' view of a ``Stored`` weight; its tensors are shared, an n:m one's positions become a mask."""
    packed, tensors = stored.packed, stored.tensors
    scales = tensors.get("scales")
    if packed.layout == "dense":
        return library.Matrix(packed.values, packed.shape, tensors["codes"].reshape(-1), None, scales)
    mask = tensors["mask"] if "mask" in tensors else _mask(stored)
    return library.Matrix(packed.values, packed.shape, tensors["values"], mask, scales)


def _mask(stored: Any) -> Tensor:
    """The bitmask of an n:m weight's places, zeros among its values included."""
    packed = stored.packed
    masks = [
        bits.pack_bits(packed.format.kept(packed, stored.tensors, first, last))
        for first, last in bits.panels(*packed.shape)
    ]
    return torch.cat(masks)


def gather(kernel: library.Matrix, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table by number: ids (...) -> (..., width)."""
    found = library.gather(kernel, ids.long(), dtype if dtype in DTYPES else torch.float32)
    return found.to(dtype)


def product(stored: Any) -> Callable[[Tensor], Tensor]:
    """x (..., in) -> (..., out) in x's dtype, on the CPU."""
    kernel = stored.kernel
    out, columns = packed_shape = stored.packed.shape

    def multiply(x: Tensor) -> Tensor:
        rows = x.reshape(-1, columns)
        if kernel.multiplies and 0 < len(rows) <= library.MAX_TOKENS:
            taken = rows if rows.dtype in DTYPES else rows.float()
            found = library.linear(kernel, taken).to(x.dtype)
        else:
            found = _by_panels(kernel, rows, packed_shape)
        return found.view(*x.shape[:-1], out)

    return multiply


def _by_panels(kernel: library.Matrix, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Panels of rows unpacked into cache, and torch's product with each."""
    dtype = rows.dtype if rows.dtype in DTYPES else torch.float32
    taken = rows.to(dtype)
    found = torch.empty(len(rows), shape[0], dtype=dtype, device=rows.device)
    step = max(PANEL // shape[1] // 16 * 16, 16)
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        found[:, first:last] = torch.nn.functional.linear(taken, library.unpack(kernel, first, last, dtype))
    return found.to(rows.dtype)
