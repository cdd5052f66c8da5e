"""The bytes of GGUF's quantised tensors, made of codes and scales as they are: Q8_0 and Q4_0."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmsparse import bits
from llmsparse.errors import UserError
from llmsparse.values import Values

BLOCK = 32  # inputs that share a scale, in both types
BYTES = {8: 34, 4: 18}  # of a block, by the bits of a code: the scale in fp16, then the codes
SIZES = {  # ggml's type -> numbers and bytes of a block
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (BLOCK, BYTES[8]),
    "Q4_0": (BLOCK, BYTES[4]),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}


def fits(kind: Values, inputs: int) -> bool:
    """Whether rows of ``inputs`` codes can be cut into blocks.

    Raises:
        UserError: no row can, since the groups of ``kind`` end inside blocks.
    """
    if kind.group is not None and kind.group % BLOCK:
        raise UserError(
            f"{kind.name} has a scale for every {kind.group} inputs, and GGUF one for every {BLOCK}; "
            f"use int4:{BLOCK} or a multiple of it"
        )
    return inputs % BLOCK == 0


def encode(kind: Values, codes: Tensor, scales: Tensor) -> Iterator[np.ndarray]:
    """uint8 (blocks, bytes) of ``codes`` (out, in) and ``scales`` (out, groups), panel by panel; no number is rounded."""
    rows, inputs = codes.shape
    spread = _spread(kind, scales, inputs)
    for first, last in bits.panels(rows, inputs):
        blocks = np.empty(((last - first) * inputs // BLOCK, BYTES[kind.bits]), dtype=np.uint8)
        blocks[:, :2] = spread[first:last].reshape(-1, 1).numpy().view(np.uint8)
        blocks[:, 2:] = _codes(kind, codes[first:last].reshape(-1, BLOCK)).numpy()
        yield blocks


def _spread(kind: Values, scales: Tensor, inputs: int) -> Tensor:
    """fp16 (out, blocks): a wider group's scale once for each of its blocks."""
    half = scales.half()
    if not torch.equal(half.float(), scales.float()):
        raise UserError("a scale is no fp16 number, which GGUF stores; prune or quantize again")
    repeats = (kind.group or inputs) // BLOCK
    return half.repeat_interleave(repeats, 1)[:, : inputs // BLOCK].contiguous()


def _codes(kind: Values, blocks: Tensor) -> Tensor:
    """uint8 (blocks, 32 or 16); four bits: the code + 8, the second half of a block in the upper nibbles."""
    if kind.bits == 8:
        return blocks.contiguous().view(torch.uint8)
    shifted = (blocks + 8).view(torch.uint8)
    return shifted[:, : BLOCK // 2] | (shifted[:, BLOCK // 2 :] << 4)
