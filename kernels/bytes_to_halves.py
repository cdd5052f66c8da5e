"""Codes of 8 bits widened to pairs of 16-bit floats in registers, exactly, for instructions that take such pairs."""

import triton
import triton.language as tl

CONSTRAINTS = ",".join(["=&r"] * 8 + ["r"] * 4)  # written before the last word is read


def instructions(values: str) -> str:
    """PTX for four words of four codes each, stored with 128 added: eight words of two ``values``.

    A byte in the low bits of the float 2^23 is 2^23 + byte; less 2^23 + 128 it is the code, whose upper half is a
    bfloat16. With fp16 the same is done at 2^10, two codes at a time.
    """
    lines = ["{", ".reg .b32 a, b;"]
    for word in range(4):
        for half in range(2):
            out, source = f"${2 * word + half}", f"${8 + word}"
            lines += (_bf16 if values == "bf16" else _fp16)(out, source, 2 * half)
    return "\n".join([*lines, "}"])


def _bf16(out: str, word: str, byte: int) -> list[str]:
    return [
        *(
            line
            for name, place in (("a", byte), ("b", byte + 1))
            for line in (
                f"prmt.b32 {name}, {word}, 0x4B000000, 0x754{place};",
                f"add.rn.f32 {name}, {name}, 0fCB000080;",
            )
        ),
        f"prmt.b32 {out}, a, b, 0x7632;",
    ]


def _fp16(out: str, word: str, byte: int) -> list[str]:
    return [
        f"prmt.b32 a, {word}, 0x64646464, 0x4{byte + 1}4{byte};",
        "mov.b32 b, 0xE480E480;",  # -1152, twice
        f"add.rn.f16x2 {out}, a, b;",
    ]


@triton.jit
def widen(both, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """The words of an even and an odd step, (lanes, 4) each, from those of both, (lanes, 4)."""
    return tl.inline_asm_elementwise(
        PTX, CONSTRAINTS, [both], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
    )


@triton.jit
def widen_by_hand(both, BF16: tl.constexpr):
    """The same where no instruction can run."""
    size: tl.constexpr = both.numel
    place, flat = tl.arange(0, size), tl.reshape(both, (size,))
    first, half = place // 4 * 4 + place % 4 // 2, place % 2 * 16
    even, odd = tl.gather(flat, first, 0) >> half, tl.gather(flat, first + 2, 0) >> half
    shape: tl.constexpr = (size // 4, 4)
    return tl.reshape(_pair(even, BF16), shape), tl.reshape(_pair(odd, BF16), shape)


@triton.jit
def _pair(codes, BF16: tl.constexpr):
    low, high = ((codes & 255) - 128).to(tl.float32), ((codes >> 8 & 255) - 128).to(tl.float32)
    if BF16:
        return low.to(tl.int32, bitcast=True) >> 16 & 0xFFFF | high.to(tl.int32, bitcast=True) & -65536
    else:
        bits = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF | bits
