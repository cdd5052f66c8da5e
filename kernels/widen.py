"""Values as kernels store them: 16-bit floats, and codes that carry a constant, widened to float32 in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("bf16", "fp16", "int8", "int4")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def kind_of(values: str) -> str:
    return values.partition(":")[0]


def group_of(values: str) -> int:
    """Inputs that share a scale; 0 where a row does, or none is needed."""
    return int(values.partition(":")[2] or 0)


def why_not(numbers: Tensor, values: str) -> str | None:
    kind, group = kind_of(values), group_of(values)
    if kind not in KINDS or (kind == "int4") != (group > 0) or group % 8:
        return f"holds bf16, fp16, int8 or int4:G values with G a multiple of 8, not {values}"
    dtype = torch.int8 if kind.startswith("int") else torch.int16
    return None if numbers.dtype == dtype else f"takes {values} as {dtype}, not {numbers.dtype}"


def padded(scales: Tensor | None, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) bf16, zeros beyond ``scales``; one zero where there are none."""
    if scales is None:
        return torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    wider = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    wider[: len(scales), : scales.shape[1]] = scales
    return wider


def biased(codes: Tensor, values: str) -> Tensor:
    """int8 codes as the uint8 that ``code`` reads: 2^(bits - 1) is added."""
    return (codes.to(torch.int16) + (128 if values == "int8" else 8)).to(torch.uint8)


def share_of(values: str) -> int:
    """Pairs of values that share an int32."""
    return {"int8": 2, "int4": 4}.get(kind_of(values), 1)


def interleaved(kept: Tensor, values: str, lanes: int) -> Tensor:
    """Pairs (rows, pairs, 2) as int32 (rows, words): codes of ``share_of`` pairs that are ``lanes`` apart in each."""
    rows, share = len(kept), share_of(values)
    if share > 1:
        kept = biased(kept, values).view(rows, -1, share, lanes, 2).transpose(2, 3).contiguous()
        kept = kept if share == 2 else kept[..., 0] | kept[..., 1] << 4
    return kept.reshape(rows, -1).view(torch.int32)


def pairs_of(words: Tensor, values: str, lanes: int) -> Tensor:
    """The reverse of ``interleaved``: float64 (rows, pairs, 2), without scales."""
    rows, share = len(words), share_of(values)
    if share == 1:
        return words.view(FLOATS[values]).view(rows, -1, 2).double()
    stored = words.view(torch.uint8)
    stored = torch.stack([stored & 15, stored >> 4], 2) if share == 4 else stored
    kept = stored.view(rows, -1, lanes, share, 2).transpose(2, 3).reshape(rows, -1, 2).double()
    return kept - (128 if share == 2 else 8)


def scaled(weight: Tensor, scales: Tensor, values: str) -> Tensor:
    """weight (out, in) float64, of codes, times its scales (padded, bf16)."""
    scales = scales[: len(weight)].double()
    if kind_of(values) == "int8":
        return weight * scales
    if kind_of(values) == "int4":
        return weight * scales.repeat_interleave(group_of(values), 1)[:, : weight.shape[1]]
    return weight


@triton.jit
def pair(word, KIND: tl.constexpr):
    """Both 16-bit floats of an int32."""
    if KIND == "bf16":
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def code(word, FIRST: tl.constexpr, BITS: tl.constexpr):
    """The code of BITS bits from bit FIRST of an int32, none of which may be bit 15 or 31 and one beyond it.

    As the last bits of a float32 near 2^23 it needs no conversion: one logical operation, one fused multiply-add, exact.
    """
    first: tl.constexpr = FIRST % 16
    if FIRST >= 16:
        word = word >> 16
    field = (word & (((1 << BITS) - 1) << first)) | 0x4B000000
    zero: tl.constexpr = 2.0 ** (23 - first) + 2.0 ** (BITS - 1)
    return field.to(tl.float32, bitcast=True) * (2.0**-first) - zero


@triton.jit
def codes(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Two neighbouring codes: number 2 PLACE and the next of an int32."""
    return code(word, 2 * PLACE * BITS, BITS), code(word, (2 * PLACE + 1) * BITS, BITS)


@triton.jit
def weight(code, scale):
    """code x scale, and +0.0 for code 0 though the scale be negative."""
    return tl.where(code == 0, 0.0, code * scale)


@triton.jit
def single(bits, KIND: tl.constexpr):
    """One 16-bit float from its int16, or one code from the low bits of an int32."""
    if KIND == "bf16":
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "int8":
        return code(bits, 0, 8)
    elif KIND == "int4":
        return code(bits, 0, 4)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
