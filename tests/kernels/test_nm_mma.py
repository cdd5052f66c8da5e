"""2:4 on sparse tensor cores: the packing against an emulation of the instruction's maps, the product against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmsparse.kernels import nm_mma, nm_mma_inputs, nm_mma_unpack, splits
from llmsparse.kernels.widen import FLOATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 64), (65, 100), (1, 4), (70, 192)]
CALLS = [
    ((1, 4), 1, 1),
    ((65, 100), 7, 1),
    ((64, 64), 8, 1),
    ((70, 708), 9, 3),
    ((64, 128), 17, 1),
    ((65, 600), 32, 2),
]


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Two of four kept, with an empty row, groups of one and of none, and -0.0 among the kept."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    groups = weight.view(shape[0], -1, 4)
    groups.masked_fill_(groups.float().abs().argsort(2).argsort(2) < 2, 0.0)
    if shape[0] > 1:
        weight[1] = 0.0
        weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, 0.5])
    return weight.to(DEVICE)


def codes_of(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int8 codes of such a weight, the smallest and the largest among them, and scales."""
    numbers = (weight_of(shape, torch.float32) * 50).round().clamp(-127, 127).to(torch.int8)
    numbers[0, :4] = torch.tensor([-127, 0, 127, 0])
    scales = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    return numbers, scales


def inputs_of(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=random).to(dtype).to(DEVICE)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated in a wrapper is NaN until a kernel writes it."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> Tensor:
        found = empty(*size, **options)  # type: ignore[call-overload]
        return found.fill_(float("nan") if found.is_floating_point() else 0x7FC07FC0)

    monkeypatch.setattr(torch, "empty", poison)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max())


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize(("shape", "tokens", "programs"), CALLS)
def test_the_product_is_as_exact_as_torch(
    values: str, shape: tuple[int, int], tokens: int, programs: int, poisoned: None
) -> None:
    dtype = FLOATS[values]
    weight, x = weight_of(shape, dtype), inputs_of(tokens, shape[1], dtype)
    packed = nm_mma.pack(weight.view(torch.int16), values)
    wanted = x.double() @ weight.double().T
    found = nm_mma.linear(packed, shape, values, x, programs)
    assert found.dtype == dtype and found.shape == (tokens, shape[0])
    torchs = error((x.float() @ weight.float().T).to(dtype), wanted)
    assert error(found, wanted) <= 2 * torchs
    assert torch.equal(nm_mma.reference(packed, shape, values, x), wanted)


@pytest.mark.parametrize("dtype", nm_mma.INPUTS["int8"])
@pytest.mark.parametrize(("shape", "tokens", "programs"), CALLS)
def test_codes_are_widened_and_scaled(
    dtype: torch.dtype, shape: tuple[int, int], tokens: int, programs: int, poisoned: None
) -> None:
    (numbers, scales), x = codes_of(shape), inputs_of(tokens, shape[1], dtype)
    packed = nm_mma.pack(numbers, "int8", scales)
    wanted = x.double() @ (numbers.double() * scales.double()).T
    torchs = error((x.float() @ (numbers.float() * scales.float()).T).to(dtype), wanted)
    assert error(nm_mma.linear(packed, shape, "int8", x, programs), wanted) <= 2 * torchs
    assert torch.equal(nm_mma.reference(packed, shape, "int8", x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_codes_gives_code_times_scale(
    shape: tuple[int, int], dtype: torch.dtype, poisoned: None
) -> None:
    numbers, scales = codes_of(shape)
    packed = nm_mma.pack(numbers, "int8", scales)
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    nm_mma_unpack.unpack(packed, shape, "int8", out)
    wanted = numbers.float() * scales.float()
    assert torch.equal(nm_mma_unpack.reference(packed, shape, "int8"), wanted + 0.0)
    one_step = torch.finfo(dtype).eps if DEVICE == "cpu" else torch.finfo(dtype).eps / 2  # it truncates
    assert bool(((out.float() - wanted).abs() <= one_step * wanted.abs()).all())
    assert not bool(torch.signbit(out[numbers == 0]).any())


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_weight_back_bit_for_bit(shape: tuple[int, int], poisoned: None) -> None:
    numbers = weight_of(shape, torch.bfloat16).view(torch.int16)
    packed = nm_mma.pack(numbers, "bf16")
    out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    nm_mma_unpack.unpack(packed, shape, "bf16", out)
    assert torch.equal(out.view(torch.int16), numbers)
    assert torch.equal(nm_mma_unpack.reference(packed, shape, "bf16").view(torch.int16), numbers)


def test_the_packing_is_what_the_instruction_takes() -> None:
    """Each warp's fragments through the maps of PTX ISA 9.7.14.5: registers to elements, metadata to columns."""
    shape = (128, 128)
    weight = weight_of(shape, torch.bfloat16)
    fragments, metadata = (t.cpu() for t in nm_mma.pack(weight.view(torch.int16), "bf16"))
    found = torch.zeros(shape, dtype=torch.bfloat16)
    for row, column, value in emulated(fragments, metadata):
        found[row, column] = value
    assert torch.equal(found, weight.cpu())


def emulated(fragments: Tensor, metadata: Tensor):  # noqa: ANN201
    for block, step, warp in torch.cartesian_prod(*map(torch.arange, fragments.shape[:3])).tolist():
        for lane, register, half in torch.cartesian_prod(*map(torch.arange, (32, 4, 2))).tolist():
            group, thread = lane // 4, lane % 4
            row = group + (8 if register in (1, 3) else 0)
            kept = thread * 2 + half + (8 if register >= 2 else 0)  # its place among the 16 kept of a row
            word = int(fragments[block, step, warp, lane, register]) >> (16 * half) & 0xFFFF
            # the selector's pair of threads holds 16 bits for each of rows g and g + 8: eight 2-bit places
            holder = group * 4 + 2 * (step % 2) + kept // 8
            places = int(metadata[block, step // 2, warp, holder]) >> (16 * (row // 8)) & 0xFFFF
            place = places >> (2 * (kept % 8)) & 3
            value = torch.tensor(word, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
            if word:
                yield block * 64 + warp * 16 + row, step * 32 + kept // 2 * 4 + place, value


def test_places_rise_within_every_group() -> None:
    """``ordered_metadata`` promises it, and a group with fewer than two values has places too."""
    _, metadata = nm_mma.pack(torch.zeros(64, 64, dtype=torch.int16), "bf16")
    assert set(metadata.flatten().tolist()) == {0x44444444}  # places 0 and 1


def test_inputs_that_do_not_exist_reach_no_token() -> None:
    """Columns beyond the weight's are zero, whatever lies behind the inputs."""
    shape = (64, 68)
    weight = weight_of(shape, torch.bfloat16)
    packed = nm_mma.pack(weight.view(torch.int16), "bf16")
    memory = torch.full((5, 68), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    memory[:3] = inputs_of(3, 68, torch.bfloat16)
    found = nm_mma.linear(packed, shape, "bf16", memory[:3])
    assert torch.equal(found, nm_mma.linear(packed, shape, "bf16", memory[:3].clone()))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(("tokens", "columns", "tiles"), [(1, 64, 1), (9, 100, 2), (32, 1088, 4)])
def test_inputs_are_put_in_the_order_of_lanes(tokens: int, columns: int, tiles: int, poisoned: None) -> None:
    words, steps = inputs_of(tokens, columns, torch.bfloat16).view(torch.int32), -(-columns // 64) * 2
    wanted = nm_mma_inputs.reference(words, tiles, steps)
    found = nm_mma_inputs.in_order_of_lanes(words, tiles, steps)
    assert torch.equal(found[: len(wanted)], wanted)


def test_the_same_product_is_the_same_bit_for_bit() -> None:
    shape = (64, 1100)
    packed = nm_mma.pack(weight_of(shape, torch.bfloat16).view(torch.int16), "bf16")
    x = inputs_of(5, 1100, torch.bfloat16)
    first, second = (nm_mma.linear(packed, shape, "bf16", x, 4) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "values", "reason"),
    [
        (lambda w: w, "int4:32", "bf16, fp16 and int8"),
        (lambda w: w[:, :62], "bf16", "divisible by 4"),
        (lambda w: torch.ones_like(w), "bf16", "at most 2 of every 4"),
    ],
)
def test_other_weights_are_refused(change: Callable[[Tensor], Tensor], values: str, reason: str) -> None:
    numbers = change(weight_of((64, 64), torch.bfloat16).view(torch.int16))
    assert reason in str(nm_mma.why_not(numbers, values))
    assert nm_mma.why_not(weight_of((64, 64), torch.bfloat16).view(torch.int16), "bf16") is None


@pytest.mark.parametrize(
    ("values", "inputs"), [(values, dtype) for values, dtypes in nm_mma.INPUTS.items() for dtype in dtypes]
)
def test_a_tile_is_checked_before_the_kernel_is_used(
    values: str, inputs: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device(DEVICE)
    assert nm_mma.usable(device, values, inputs) is None
    pack = nm_mma.pack
    monkeypatch.setattr(nm_mma, "pack", lambda *given: (pack(*given)[0].flip(3), *pack(*given)[1:]))
    assert "wrong by" in str(nm_mma.usable(device, values, inputs))


def test_a_layout_that_the_packing_does_not_rely_on_is_told() -> None:
    blocked = "sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1], order = [1, 0]"
    layout = f"#blocked1 = #ttg.blocked<{{{blocked}}}>"
    line = "%3 = tt.elementwise_inline_asm ... : tensor<128x4xi32, #blocked1> -> tensor<128x4xf32, #blocked1> loc(1)"
    good = {"ttgir": f"{layout}\n  {line}", "ptx": "mma.sp::ordered_metadata.sync"}
    assert nm_mma.contract(good) is None
    assert "no mma.sp" in str(nm_mma.contract({**good, "ptx": "mma.sync"}))
    other = good["ttgir"].replace("[32, 1]", "[8, 4]")
    assert "[8, 4]" in str(nm_mma.contract({**good, "ttgir": other}))
    assert nm_mma.contract({"ttgir": "", "ptx": ""}) is not None


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 2, 300)])
def test_partial_sums_are_added(shape: tuple[int, int, int], poisoned: None) -> None:
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found, wanted = splits.add(parts, dtype), splits.reference(parts, dtype)
        assert torch.allclose(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
