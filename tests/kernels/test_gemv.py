"""The contract of the kernels of packed weights, against a plain float64 product of the dense weight."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from .weights import DEVICE, DTYPES, Weight, kept_of_groups, make

VALUES = ["bf16", "fp16", "int8", "int4:8", "int4:24", "int4:32", "int4:128"]
SHAPES = {
    "nm_gemv": [(1, 4), (7, 100), (33, 516)],
    "n16_gemv": [(1, 16), (7, 112), (17, 272)],
    "bitmask_gemv": [(1, 1), (7, 99), (17, 260)],
}
CASES = [(kernel, shape) for kernel, shapes in SHAPES.items() for shape in shapes]
KERNELS = list(SHAPES)


def modules(kernel: str) -> tuple[Any, Any]:
    return tuple(
        importlib.import_module(f"llmsparse.kernels.{name}") for name in (kernel, f"{kernel}_unpack")
    )  # type: ignore[return-value]


def weight_for(kernel: str, shape: tuple[int, int], values: str, fill: float = 0.8) -> Weight:
    generator = torch.Generator().manual_seed(hash_of(kernel, shape, values))
    return make(pattern(kernel, shape, fill, generator), values, generator)


def hash_of(*parts: Any) -> int:
    return sum(ord(letter) * (number + 1) for number, letter in enumerate(repr(parts)))


def pattern(kernel: str, shape: tuple[int, int], fill: float, generator: torch.Generator) -> Tensor:
    if kernel == "nm_gemv":
        return kept_of_groups(*shape, 2, 4, fill, generator)
    if kernel == "n16_gemv":
        return kept_of_groups(*shape, 8, 16, fill, generator)
    return torch.rand(shape, generator=generator) < 0.6 * fill


def dtype_for(shape: tuple[int, int], values: str) -> torch.dtype:
    """Every dtype meets every kind of value in one of the shapes."""
    return [torch.bfloat16, torch.float16, torch.float32][(shape[0] // 5 + VALUES.index(values)) % 3]


def activations(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + columns)
    return torch.randn(tokens, columns, generator=generator).to(DEVICE, dtype)


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """One rounding to y's dtype, and float32 sums whatever their order: ours add at most a few hundred terms each."""
    exact = x.double() @ weight.T
    sums = 8 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.T.abs())
    rounding = torch.finfo(y.dtype).eps / 2 * (exact.abs() + sums) + torch.finfo(y.dtype).smallest_normal
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= rounding + sums).all())  # NaN is not


@pytest.fixture(autouse=True)
def stale_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN (of integers, their largest) until it is written."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        fresh = empty(*size, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_products_are_those_of_the_dense_weight(kernel: str, shape: tuple[int, int], values: str) -> None:
    gemv, _ = modules(kernel)
    weight = weight_for(kernel, shape, values)
    assert gemv.why_not(weight.numbers, values) is None
    tensors = gemv.pack(weight.numbers, values, weight.scales)
    x = activations(2, shape[1], dtype_for(shape, values)) / 8
    y = gemv.linear(tensors, shape, values, x)
    assert y.dtype == x.dtype
    assert_close(y, x, weight.dense)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_reference_is_the_dense_product(kernel: str, shape: tuple[int, int], values: str) -> None:
    gemv, _ = modules(kernel)
    weight = weight_for(kernel, shape, values)
    x = activations(3, shape[1], torch.float32)
    y = gemv.reference(gemv.pack(weight.numbers, values, weight.scales), shape, values, x)
    assert torch.allclose(y, x.double() @ weight.dense.T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_unpacked_is_the_dense_weight(kernel: str, shape: tuple[int, int], values: str) -> None:
    gemv, unpacking = modules(kernel)
    dtype = dtype_for(shape, values)
    weight = weight_for(kernel, shape, values)
    tensors = gemv.pack(weight.numbers, values, weight.scales)
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    unpacking.unpack(tensors, shape, values, out)
    expected = (weight.dense if values in DTYPES else weight.dense + 0.0).to(
        dtype
    )  # code 0 is +0.0 whatever its scale
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts float32 to bf16
        expected = (weight.dense.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)
        expected = expected if values in DTYPES else expected + 0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits), expected.view(bits))
    assert torch.equal(
        unpacking.reference(tensors, shape, values, torch.empty_like(out)), weight.dense.to(dtype)
    )


@pytest.mark.parametrize("values", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_unpacking_moves_every_bit_of_a_float(kernel: str, values: str) -> None:
    gemv, unpacking = modules(kernel)
    shape = SHAPES[kernel][1]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(
        -(2**15), 2**15, shape, generator=generator, dtype=torch.int16
    )  # NaNs of every kind
    numbers = torch.where(pattern(kernel, shape, 1.0, generator), numbers, 0).to(DEVICE)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[values]
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    unpacking.unpack(gemv.pack(numbers, values, None), shape, values, out)
    assert torch.equal(out.view(torch.int16), numbers)


@pytest.mark.parametrize("values", ["bf16", "int8", "int4:32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_does_not_depend_on_its_company_nor_a_call_on_the_last(kernel: str, values: str) -> None:
    gemv, _ = modules(kernel)
    shape = SHAPES[kernel][-1]
    weight = weight_for(kernel, shape, values)
    tensors = gemv.pack(weight.numbers, values, weight.scales)
    x = activations(3, shape[1], torch.bfloat16)
    y = gemv.linear(tensors, shape, values, x)
    assert torch.equal(y, gemv.linear(tensors, shape, values, x))
    assert torch.equal(y[1:2], gemv.linear(tensors, shape, values, x[1:2]))
    assert_close(y, x, weight.dense)


@pytest.mark.parametrize(
    ("kernel", "expected"), [("nm_gemv", 1.125), ("n16_gemv", 1.25), ("bitmask_gemv", 1.1875)]
)
def test_bytes_of_a_weight(kernel: str, expected: float) -> None:
    gemv, _ = modules(kernel)
    shape = (128, 1024)
    generator = torch.Generator().manual_seed(0)
    kept = kept_of_groups(*shape, *((2, 4) if kernel == "nm_gemv" else (8, 16)), 1.0, generator)
    for values, fewer in (("bf16", 0.0), ("int8", 0.5), ("int4:128", 0.75)):
        weight = make(kept, values, generator)
        size = (
            sum(tensor.nbytes for tensor in gemv.pack(weight.numbers, values, weight.scales))
            / weight.numbers.numel()
        )
        assert expected - fewer <= size <= expected - fewer + 0.03  # scales, and where rows begin


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("values", ["fp16", "int8", "int4:24"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_may_be_shared_by_any_number_of_programs(kernel: str, values: str, programs: int) -> None:
    gemv, _ = modules(kernel)
    shape = (5, 1536)
    weight = weight_for(kernel, shape, values)
    x = activations(1, shape[1], torch.float32)
    y = gemv.linear(gemv.pack(weight.numbers, values, weight.scales), shape, values, x, programs=programs)
    assert_close(y, x, weight.dense)


@pytest.mark.parametrize("values", ["bf16", "int8", "int4:8"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_rows_and_weights_without_a_value(kernel: str, values: str) -> None:
    gemv, unpacking = modules(kernel)
    shape = SHAPES[kernel][1]
    weight = weight_for(kernel, shape, values)
    for empty in (slice(2, 5), slice(None)):
        numbers, dense = weight.numbers.clone(), weight.dense.clone()
        numbers[empty], dense[empty] = 0, 0.0
        tensors = gemv.pack(numbers, values, weight.scales)
        x = activations(1, shape[1], torch.float32)
        assert_close(gemv.linear(tensors, shape, values, x), x, dense)
        out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        unpacking.unpack(tensors, shape, values, out)
        assert torch.equal(out[empty].view(torch.int16), torch.zeros_like(out[empty].view(torch.int16)))


@pytest.mark.parametrize("values", ["bf16", "int8", "int4:32"])
def test_a_bitmask_may_be_full_and_long(values: str) -> None:
    gemv, unpacking = modules("bitmask_gemv")
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4100)
    kept = torch.rand(shape, generator=generator) < 0.3
    kept[1] = True
    weight = make(kept, values, generator)
    tensors = gemv.pack(weight.numbers, values, weight.scales)
    x = activations(1, shape[1], torch.float32)
    assert_close(gemv.linear(tensors, shape, values, x), x, weight.dense)
    out = torch.empty(shape, dtype=torch.float32, device=DEVICE)
    assert torch.equal(unpacking.unpack(tensors, shape, values, out), weight.dense.float())


@pytest.mark.parametrize("kept", range(1, 9))
def test_n16_takes_one_to_eight_of_sixteen(kept: int) -> None:
    gemv, unpacking = modules("n16_gemv")
    generator = torch.Generator().manual_seed(kept)
    shape = (3, 1040)
    for values in ("bf16", "int8", "int4:8", "int4:48"):
        weight = make(kept_of_groups(*shape, kept, 16, 1.0, generator), values, generator)
        tensors = gemv.pack(weight.numbers, values, weight.scales)
        assert tensors[1].shape[2] == (kept + 1) // 2
        x = activations(1, shape[1], torch.float32)
        assert_close(gemv.linear(tensors, shape, values, x), x, weight.dense)
        out = torch.empty(shape, dtype=torch.float32, device=DEVICE)
        assert torch.equal(unpacking.unpack(tensors, shape, values, out), weight.dense.float())


def test_what_a_kernel_cannot_hold_is_said() -> None:
    nm, n16 = modules("nm_gemv")[0], modules("n16_gemv")[0]
    full = torch.ones(2, 16, dtype=torch.int16, device=DEVICE)
    assert nm.why_not(full, "bf16") == "holds at most 2 of every 4 inputs, not 4"
    assert n16.why_not(full, "bf16") == "holds at most 8 of every 16 inputs, not 16"
    assert nm.why_not(full[:, :6], "bf16") == "needs inputs divisible by 4, not 6"
    assert n16.why_not(full[:, :12], "bf16") == "needs inputs divisible by 16, not 12"
    long = torch.zeros(1, 65537, dtype=torch.int8, device=DEVICE)
    assert modules("bitmask_gemv")[0].why_not(long, "int8") == "holds at most 65536 inputs, not 65537"
    for kernel in KERNELS:
        gemv, _ = modules(kernel)
        zeros = torch.zeros(1, 16, dtype=torch.int8, device=DEVICE)
        assert gemv.why_not(zeros, "int8") is None
        assert "not fp32" in gemv.why_not(zeros, "fp32")
        assert "not int4:12" in gemv.why_not(zeros, "int4:12")
        assert "torch.int16" in gemv.why_not(zeros, "bf16")
