"""2:4 weights times up to 32 tokens on sparse tensor cores, through the instruction mma.sp (PTX ISA, 9.7.14.6).

Weights lie in the order in which a warp's lanes hold them (m16n8k32), so one 128-bit load brings a lane its part of a
16 x 32 tile: 1.125 bytes a weight, no shared memory. Of a product's 8 columns each is a token. int8 codes, 0.625 bytes
a weight, come for two tiles at once, are widened in registers, and meet their row's scale at the end.
"""

import re
import sys
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsparse.kernels import bytes_to_halves, nm_mma_inputs, splits, trial, two_of_four
from llmsparse.kernels.bytes_to_halves import widen, widen_by_hand
from llmsparse.kernels.launch import Launch, interprets
from llmsparse.kernels.widen import FLOATS

MAX_TOKENS = 32
WARPS = 4
ROWS = 16 * WARPS  # of a program
PAIR = 64  # inputs of two steps, whose metadata share a word
UNROLL = 2  # pairs of steps in a turn of the loop: loads in flight
TURN = 4  # pairs of steps that a program takes at least
# of values: the inputs that they are multiplied by
INPUTS = {
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "int8": (torch.bfloat16, torch.float16),
}
CONSTRAINTS = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r"
# a lane holds a row of four words, in order, whether they come one, two or four at a time
LAYOUT = r"sizePerThread = \[1, [124]\], threadsPerWarp = \[32, 1\], warpsPerCTA = \[{warps}, 1\], order = .*"


def why_not(numbers: Tensor, values: str) -> str | None:
    """Why this kernel cannot hold a weight; None where it can."""
    if values not in INPUTS:
        return f"sparse tensor cores take bf16, fp16 and int8 here, not {values}"
    return two_of_four.why_not(numbers)


def pack(numbers: Tensor, values: str, scales: Tensor | None = None) -> tuple[Tensor, ...]:
    """Fragments int32, metadata int32 (blocks, steps / 2, warps, 32), and scales (rows,) float32 of codes.

    Fragments of floats are (blocks, steps, warps, 32, 4): a word holds the two numbers of one group; lane =
    4 * row + group, for 8 rows and 4 groups, and the four words are (row, group), (row + 8, group), (row, group + 4),
    (row + 8, group + 4). Those of codes are (blocks, steps / 2, warps, 32, 4): two such words in one, for two steps.
    """
    out, columns = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, -columns % PAIR, 0, -out % ROWS))
    stored, places = two_of_four.compress(padded)
    shape = (len(padded) // ROWS, WARPS, 2, 8, padded.shape[1] // 32)  # blocks, warps, row half, row, steps
    lanes = (shape[0], shape[4], WARPS, 32)
    groups = stored.view(*shape, 2, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7).reshape(*lanes, 4, 2)
    if values == "int8":
        pairs = groups.view(lanes[0], -1, 2, WARPS, 32, 8).permute(0, 1, 3, 4, 2, 5)
        fragments = (pairs.reshape(lanes[0], -1, WARPS, 32, 16).to(torch.int16) + 128).to(torch.uint8)
    else:
        fragments = groups.reshape(*lanes, 8)
    nibbles = (places[..., 0] | places[..., 1] << 2).view(len(padded), -1, 4)
    shifts = torch.arange(0, 16, 4, device=numbers.device)
    quarters = (nibbles << shifts).sum(2)  # (out, in / 16)
    halves = quarters.view(*shape[:4], -1, 2, 2).permute(0, 4, 1, 3, 5, 6, 2)
    metadata = (halves[..., 0] | halves[..., 1] << 16).to(torch.int32)
    tensors = fragments.contiguous().view(torch.int32), metadata.reshape(lanes[0], -1, WARPS, 32).contiguous()
    if scales is None:
        return tensors
    return *tensors, torch.nn.functional.pad(scales[:, 0].float(), (0, len(padded) - out))


def unpacked(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """The reverse of ``pack``, without scales: int16 or int8 (out, in)."""
    fragments, metadata = tensors[:2]
    blocks, pairs = metadata.shape[:2]
    rows, groups = blocks * ROWS, pairs * 16
    if len(tensors) == 3:
        codes = (fragments.view(torch.uint8).to(torch.int16) - 128).to(torch.int8)
        stored = codes.view(blocks, pairs, WARPS, 32, 2, 8).permute(0, 1, 4, 2, 3, 5)
    else:
        stored = fragments.view(torch.int16)
    stored = stored.reshape(blocks, pairs * 2, WARPS, 8, 4, 2, 2, 2).permute(0, 2, 6, 3, 1, 5, 4, 7)
    halves = torch.stack([metadata & 0xFFFF, metadata >> 16 & 0xFFFF], 4)
    quarters = halves.view(blocks, pairs, WARPS, 8, 2, 2, 2).permute(0, 2, 6, 3, 1, 4, 5)
    shifts = torch.arange(0, 16, 4, device=metadata.device)
    nibbles = (quarters.reshape(rows, -1, 1) >> shifts & 15).reshape(rows, groups).long()
    places = torch.stack([nibbles & 3, nibbles >> 2], 2)
    return two_of_four.spread(stored.reshape(rows, groups, 2), places)[: shape[0], : shape[1]]


def dense(tensors: Sequence[Tensor], shape: tuple[int, int], values: str) -> Tensor:
    """The weight (out, in): as stored, or code times scale in float32."""
    numbers = unpacked(tensors, shape).contiguous()
    if values in FLOATS:
        return numbers.view(FLOATS[values])
    return numbers.float() * tensors[2][: shape[0], None] + 0.0  # no zero is negative


def reference(tensors: Sequence[Tensor], shape: tuple[int, int], values: str, x: Tensor) -> Tensor:
    """x (tokens, in) times the transposed weight in float64: (tokens, out)."""
    return x.double() @ dense(tensors, shape, values).double().T


@triton.jit(do_not_specialize=["steps", "words", "tokens", "rows", "per"])
def kernel(
    fragments, metadata, scales, x, y, steps, words, tokens, rows, per,
    WARPS: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr,
    CONSTRAINTS: tl.constexpr, WIDEN: tl.constexpr, WIDE: tl.constexpr, UNROLL: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """y[part, m, n] = sum over the part's k of x[m, k] w[n, k], for WARPS * 16 rows n and TILES * 8 tokens m."""
    block, part = tl.program_id(0), tl.program_id(1)
    thread, word = tl.arange(0, WARPS * 32), tl.arange(0, 4)[None, :]
    lane = thread % 32
    zero = tl.zeros((WARPS * 32, 4), dtype=tl.int32)
    c0 = tl.zeros((WARPS * 32, 4), dtype=tl.float32)
    c1, c2, c3 = c0, c0, c0
    lines = steps // 2 if WIDEN is not None else steps
    a = fragments + (block.to(tl.int64) * lines * (WARPS * 32) + thread)[:, None] * 4 + word
    e = metadata + block.to(tl.int64) * (steps // 2) * (WARPS * 32) + thread
    b0 = x + _inputs(0, lane[:, None], word, steps, words, tokens, PACKED)
    b1 = x + _inputs(1, lane[:, None], word, steps, words, tokens, PACKED)
    b2 = x + _inputs(2, lane[:, None], word, steps, words, tokens, PACKED)
    b3 = x + _inputs(3, lane[:, None], word, steps, words, tokens, PACKED)
    step: tl.constexpr = 128 if PACKED else 16
    for k in tl.range(part * per, tl.minimum((part + 1) * per, steps), 2, loop_unroll_factor=UNROLL):
        if WIDEN is not None:
            both = tl.load(a + k // 2 * (WARPS * 128), eviction_policy="evict_first")
            even, odd = _widened(both, WIDEN, WIDE, BY_HAND)
        else:
            even = tl.load(a + k * (WARPS * 128), eviction_policy="evict_first")
            odd = tl.load(a + (k + 1) * (WARPS * 128), eviction_policy="evict_first")
        places = tl.load(e + (k // 2) * (WARPS * 32), eviction_policy="evict_first")[:, None] + zero
        c0 = _multiply(even, tl.load(b0 + k * step), c0, places, EVEN, CONSTRAINTS, BY_HAND)
        c0 = _multiply(odd, tl.load(b0 + (k + 1) * step), c0, places, ODD, CONSTRAINTS, BY_HAND)
        if TILES > 1:
            c1 = _multiply(even, tl.load(b1 + k * step), c1, places, EVEN, CONSTRAINTS, BY_HAND)
            c1 = _multiply(odd, tl.load(b1 + (k + 1) * step), c1, places, ODD, CONSTRAINTS, BY_HAND)
        if TILES > 2:
            c2 = _multiply(even, tl.load(b2 + k * step), c2, places, EVEN, CONSTRAINTS, BY_HAND)
            c2 = _multiply(odd, tl.load(b2 + (k + 1) * step), c2, places, ODD, CONSTRAINTS, BY_HAND)
            c3 = _multiply(even, tl.load(b3 + k * step), c3, places, EVEN, CONSTRAINTS, BY_HAND)
            c3 = _multiply(odd, tl.load(b3 + (k + 1) * step), c3, places, ODD, CONSTRAINTS, BY_HAND)
    row = block * (WARPS * 16) + (thread // 32 * 16 + lane // 4)[:, None] + word // 2 * 8
    token = (lane % 4 * 2)[:, None] + word % 2
    if WIDEN is not None:
        scale = tl.load(scales + row)
        c0, c1, c2, c3 = c0 * scale, c1 * scale, c2 * scale, c3 * scale
    y += part.to(tl.int64) * tokens * rows
    _store(y, c0, token, row, tokens, rows)
    if TILES > 1:
        _store(y, c1, token + 8, row, tokens, rows)
    if TILES > 2:
        _store(y, c2, token + 16, row, tokens, rows)
        _store(y, c3, token + 24, row, tokens, rows)


@triton.jit
def _inputs(tile, lane, word, steps, words, tokens, PACKED: tl.constexpr):
    """Where a lane's four words (two inputs each) of the first step of a tile of 8 tokens lie."""
    if PACKED:
        return tile * steps * 128 + lane * 4 + word
    else:  # tokens that do not exist are read as the last one, and not stored
        return tl.minimum(tile * 8 + lane // 4, tokens - 1) * words + lane % 4 + word * 4


@triton.jit
def _store(y, c, token, row, tokens, rows):
    inside = (token < tokens) & (row < rows)
    tl.store(y + token * rows + row, c.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _widened(both, WIDEN: tl.constexpr, WIDE: tl.constexpr, BY_HAND: tl.constexpr):
    """The words of two steps from their codes."""
    if BY_HAND is None:
        return widen(both, WIDEN, WIDE)
    else:
        return widen_by_hand(both, BY_HAND == "bf16")


@triton.jit
def _multiply(a, b, c, e, CODE: tl.constexpr, CONSTRAINTS: tl.constexpr, BY_HAND: tl.constexpr):
    """c + a b of one step on each warp: by the instruction CODE, or by hand, where CODE is the step's parity."""
    if BY_HAND is None:
        return tl.inline_asm_elementwise(
            CODE, CONSTRAINTS, [a, b, c, e], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        return c + _by_hand(a, b, e, CODE, BY_HAND == "bf16")


@triton.jit
def _by_hand(a, b, e, PARITY: tl.constexpr, BF16: tl.constexpr):
    """What mma.sp computes, by the maps of its fragments: lane and word -> row, column; metadata -> place."""
    size: tl.constexpr = a.numel
    place = tl.arange(0, size * 16)
    kept, element = place % 16, place // 16  # of the 16 kept of 32 inputs; of the result
    lane, word, warp = element // 4 % 32, element % 4, element // 128 * 32
    row, token, group = lane // 4 + word // 2 * 8, lane % 4 * 2 + word % 2, kept // 2
    a, b, e = tl.reshape(a, (size,)), tl.reshape(b, (size,)), tl.reshape(e, (size,))
    holder = warp + row % 8 * 4
    value = tl.gather(a, (holder + group % 4) * 4 + row // 8 + group // 4 * 2, 0)
    places = tl.gather(e, (holder + 2 * PARITY + group // 4) * 4, 0) >> (row // 8 * 16)
    k = group * 4 + (places >> (group % 4 * 4 + kept % 2 * 2) & 3)
    inputs = tl.gather(b, (warp + token * 4 + k % 8 // 2) * 4 + k // 8, 0)
    products = _half(value, kept % 2, BF16) * _half(inputs, k % 2, BF16)
    return tl.reshape(tl.sum(tl.reshape(products, (size, 16)), 1), (size // 4, 4))


@triton.jit
def _half(pair, which, BF16: tl.constexpr):
    """The lower or the upper number of a pair, in float32."""
    bits = pair >> (which * 16) & 0xFFFF
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


def linear(
    tensors: Sequence[Tensor], shape: tuple[int, int], values: str, x: Tensor, programs: int = splits.PROGRAMS
) -> Tensor:
    """x (1 to 32 tokens, in) of the weight's dtype, contiguous -> (tokens, out), by ``programs`` or few more."""
    (fragments, metadata), (rows, columns), tokens = tensors[:2], shape, len(x)
    blocks, pairs = metadata.shape[:2]
    tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    # a tile alone: reading what packing saves is cheaper than a launch
    packed = tiles > 1 or columns != pairs * PAIR
    words = x.view(torch.int32)
    inputs = nm_mma_inputs.in_order_of_lanes(words, tiles, pairs * 2) if packed else words
    parts, each = splits.shares(blocks, -(-pairs // TURN), programs)
    y = torch.empty(parts, tokens, rows, dtype=splits.dtype_of(x, parts), device=x.device)
    kernel[(blocks, parts)](
        fragments, metadata, tensors[-1], inputs, y, pairs * 2, columns // 2, tokens, rows, each * TURN * 2,
        **_constants(values, _name(x.dtype), tiles, packed), num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return splits.add(y, x.dtype)


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def _constants(
    values: str, inputs: str, tiles: int, packed: bool, interpreted: bool | None = None
) -> dict[str, object]:
    by_hand = interprets() if interpreted is None else interpreted
    even, odd = (0, 1) if by_hand else (_instruction(inputs, 0), _instruction(inputs, 1))
    return {
        "WARPS": WARPS, "TILES": tiles, "PACKED": packed, "EVEN": even, "ODD": odd, "CONSTRAINTS": CONSTRAINTS,
        "WIDEN": bytes_to_halves.instructions(inputs) if values == "int8" else None,
        "WIDE": bytes_to_halves.CONSTRAINTS, "UNROLL": UNROLL, "BY_HAND": inputs if by_hand else None,
    }  # fmt: skip


def _instruction(inputs: str, selector: int) -> str:
    """mma.sp of a step; ``selector``: which half of a quad's lanes has its metadata."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{inputs}.{inputs}.f32 {{$0,$1,$2,$3}}, "
        f"{{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, {selector};"
    ).replace("fp16", "f16")


def contract(assembly: Mapping[str, str], warps: int = WARPS) -> str | None:
    """Why what Triton compiled is not what the packing relies on: a lane holds a row of four words.

    Triton leaves open which lane holds which element, so it is read in what was compiled.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", assembly["ttgir"], re.M))
    used = re.findall(r"tt\.elementwise_inline_asm.*-> tensor<[^,>]*, (#\w+)>", assembly["ttgir"])
    agreed = re.compile(LAYOUT.format(warps=warps))
    if not used or not all(agreed.fullmatch(layouts.get(name, "")) for name in used):
        return f"Triton lays its operands out as {sorted({layouts.get(name, name) for name in used})}"
    if "mma.sp::ordered_metadata" not in assembly["ptx"]:
        return "Triton's PTX has no mma.sp"
    return None


def usable(device: torch.device, values: str, inputs: torch.dtype) -> str | None:
    """Why the kernel cannot run on ``device``: what is compiled there breaks the contract, or a tile is wrong."""
    if not interprets():
        if device.type != "cuda" or torch.version.hip:
            return "mma.sp is an instruction of NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "sparse tensor cores came with compute capability 8.0"
    wide = 2 * TURN * PAIR  # for one program or two
    shapes = [
        (8, wide - 4),
        *((tokens, wide) for tokens in (8, 16, 32)),
    ]  # inputs as they are, or put in order
    calls = [trial.Call(tokens, ROWS, columns, parts) for tokens, columns in shapes for parts in (1, 2)]
    if (reason := trial.wrong(sys.modules[__name__], None, device, (values, inputs), calls)) is not None:
        return reason
    return None if interprets() else _compiled_as_agreed(device)


def _compiled_as_agreed(device: torch.device) -> str | None:
    """The contract, read in every version of the kernel that was compiled for ``device``."""
    index = torch.cuda.current_device() if device.index is None else device.index
    cache = kernel.device_caches[index][0]
    if not cache:
        return "what Triton compiled cannot be read"
    return next((why for compiled in cache.values() if (why := contract(compiled.asm))), None)


def launches() -> list[Launch]:
    signature = {"fragments": "*i32", "metadata": "*i32", "scales": "*fp32", "x": "*i32", "y": "*fp32"}
    signature |= dict.fromkeys(("steps", "words", "tokens", "rows", "per"), "i32")
    aligned = ("fragments", "metadata", "scales", "x", "y")
    found = []
    for values, inputs in (("bf16", "bf16"), ("fp16", "fp16"), ("int8", "bf16"), ("int8", "fp16")):
        for tiles in (1, 2, 4):
            constants = _constants(values, inputs, tiles, tiles > 1, interpreted=False)
            name = f"{values} with {inputs} inputs, {8 * tiles} tokens"
            found.append(Launch(name, kernel, signature, constants, WARPS, UNROLL * ROWS * PAIR, aligned))
    return found
