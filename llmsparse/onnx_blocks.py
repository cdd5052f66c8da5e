"""Codes in the blocks of ONNX Runtime's MatMulNBits and GatherBlockQuantized, and back."""

import numpy as np
import torch
from torch import Tensor

from llmsparse.errors import UserError
from llmsparse.values import Values

WIDE = (32, 64)  # inputs a scale; wider ones are legal, but activations are rounded in blocks as wide
NARROW = 16  # slower


def block_of(kind: Values, inputs: int, name: str) -> int:
    """The block size that makes the weight smallest, among those that divide its groups.

    Raises:
        UserError: no block of the format divides the group.
    """
    fits = [block for block in WIDE if kind.group is None or kind.group % block == 0]
    if not fits and kind.group is not None and kind.group % NARROW == 0:
        fits = [NARROW]
    if not fits:
        raise UserError(
            f"{name}: {kind.name} has a scale for every {kind.group} inputs, and ONNX's MatMulNBits one for every 16, "
            "32 or 64 or more; use int4:32 or int4:64"
        )
    return min(fits, key=lambda block: row_bytes(kind, block, inputs))


def row_bytes(kind: Values, block: int, inputs: int) -> int:
    """Bytes of a row of ``inputs`` codes and their float32 scales."""
    return -(-inputs // block) * (block * kind.bits // 8 + 4)


def pack(kind: Values, codes: Tensor, block: int) -> np.ndarray:
    """Codes (out, in) as uint8 (out, blocks, bytes of a block): half the range is added, 4 bits lie low, then high.

    A row's tail that fills no block is filled up with zeros.
    """
    filled = torch.nn.functional.pad(codes.to(torch.int16), (0, -codes.shape[1] % block))
    shifted = (filled + (1 << (kind.bits - 1))).to(torch.uint8)
    if kind.bits == 4:
        shifted = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return shifted.view(len(codes), -1, block * kind.bits // 8).numpy()


def spread(kind: Values, scales: Tensor, block: int, inputs: int) -> np.ndarray:
    """Scales (out, groups) repeated for each block: float32 (out, blocks)."""
    blocks = -(-inputs // block)
    each = kind.group // block if kind.group else blocks
    return scales.float().repeat_interleave(each, 1)[:, :blocks].contiguous().numpy()


def weight(packed: np.ndarray, scales: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """The weight, float32 (out, in), of ``packed`` (out, blocks, bytes) and ``scales`` (out, blocks)."""
    rows, blocks, _ = packed.shape
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, blocks, -1)
    codes = packed.astype(np.float32) - (1 << (bits - 1))
    return (codes * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :inputs] + np.float32(0.0)
