"""Inputs in the order in which mma.sp's lanes take them, so that one 128-bit load brings a lane all of a step's."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels.launch import Launch

TILE = 1024


def reference(words: Tensor, tiles: int, steps: int) -> Tensor:
    """What ``in_order_of_lanes`` computes."""
    padded = torch.zeros(8 * tiles, 16 * steps, dtype=torch.int32, device=words.device)
    padded[: len(words), : words.shape[1]] = words
    return padded.view(tiles, 8, steps, 4, 4).permute(0, 2, 1, 4, 3).flatten()


@triton.jit
def kernel(words, out, steps, width, tokens, TILE: tl.constexpr):
    """out[tile, step, lane, w] = words[8 tile + lane // 4, 16 step + lane % 4 + 4 w], zero where there is none."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    word, lane, step = place % 4, place // 4 % 32, place // 128 % steps
    token, column = place // (128 * steps) * 8 + lane // 4, step * 16 + lane % 4 + word * 4
    inside = (token < tokens) & (column < width)
    tl.store(out + place, tl.load(words + token * width + column, mask=inside, other=0))


def in_order_of_lanes(words: Tensor, tiles: int, steps: int) -> Tensor:
    """words int32 (tokens, in / 2), two inputs each -> int32 (tiles, steps, 32, 4), flat, filled up."""
    programs = triton.cdiv(tiles * steps * 128, TILE)
    out = torch.empty(programs * TILE, dtype=torch.int32, device=words.device)
    kernel[(programs,)](
        words, out, steps, words.shape[1], len(words), TILE=TILE, num_warps=4, enable_fp_fusion=True
    )
    return out


def launches() -> list[Launch]:
    signature = {"words": "*i32", "out": "*i32", **dict.fromkeys(("steps", "width", "tokens"), "i32")}
    return [Launch("pairs", kernel, signature, {"TILE": TILE}, 4, aligned=("words", "out", "width"))]
