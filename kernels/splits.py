"""Programs that share a row's inputs: how many, and the second pass that adds their sums in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels.launch import Launch, written

PROGRAMS = 528  # four of 128 threads on each of an H100's 132 multiprocessors
ROWS = 256


def shares(blocks: int, turns: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(splits, turns of each) for ``blocks`` of rows whose loops take ``turns``.

    The number of tokens is not asked for, so that a token's result does not depend on its company.
    """
    each = -(-turns // min(turns, max(1, programs // max(1, blocks))))
    return -(-turns // each), each


def reference(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums.double().sum(0).to(dtype)


@triton.jit(do_not_specialize=["size", "splits"])  # a size of 1 would be a constant, which has no .to
def add_kernel(sums, y, size, splits, ROWS: tl.constexpr):
    """y = sums[0] + sums[1] + ..."""
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(sums + places + split * size.to(tl.int64), mask=places < size, other=0.0)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=places < size)


def dtype_of(x: Tensor, splits: int) -> torch.dtype:
    """What a program stores: the product where it has a row to itself, else its share in full."""
    return written(x.dtype) if splits == 1 else torch.float32


def add(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, tokens, out) -> (tokens, out)."""
    if len(sums) == 1:
        return sums[0].to(dtype)
    y = torch.empty(sums.shape[1:], dtype=written(dtype), device=sums.device)
    add_kernel[(-(-y.numel() // ROWS),)](sums, y, y.numel(), len(sums), ROWS=ROWS, enable_fp_fusion=True)
    return y.to(dtype)


def launches() -> list[Launch]:
    signature = {"sums": "*fp32", "y": "*bf16", "size": "i32", "splits": "i32"}
    return [Launch("bf16", add_kernel, signature, {"ROWS": ROWS}, 4, aligned=("sums", "y"))]
