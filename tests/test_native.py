"""The native kernels under a packed weight: every layout, dtype and number of tokens, against the weight itself."""

import pytest
import torch

from llmsparse import native
from llmsparse.grid import Grid
from llmsparse.kernels.cpu import library
from llmsparse.ops import Stored, linear
from llmsparse.packed import smallest
from llmsparse.pattern import parse
from llmsparse.values import Values

pytestmark = pytest.mark.skipif(all(library.available().values()), reason="the native kernels were not built")
PATTERNS = {"bitmask": "50%", "nm": "1:8", "dense": None}
INTEGER = ("int8", "int4:32")


def stored(values: str, layout: str, out: int = 48, columns: int = 192) -> Stored:
    """A random weight packed so that ``layout`` is the smallest."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=random) / columns**0.5
    if pattern := PATTERNS[layout]:
        weight = weight.masked_fill(~parse(pattern).select(weight.abs()), 0.0)
    kind = Values.parse(values)
    numbers, scales = kind.numbers(weight) if kind.float_dtype else None, None
    if numbers is None:
        numbers, scales = Grid.parse(values).nearest(weight, weight != 0)
    packed = smallest(numbers, kind)
    assert packed is not None and packed.layout == layout
    tensors = packed.format.pack(packed, numbers)
    if scales is not None:
        tensors["scales"] = scales.to(torch.bfloat16)
    starts = packed.starts(tensors)
    return Stored(
        packed, [*(tensors[name] for name in packed.tensors()), *([] if starts is None else [starts])]
    )


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("values", "layout"),
    [(v, layout) for v in ("bf16", "fp16", "fp32", *INTEGER) for layout in ("bitmask", "nm")]
    + [(v, "dense") for v in INTEGER],
)
def test_the_product_is_that_of_the_weight(values: str, layout: str, dtype: torch.dtype, tokens: int) -> None:
    weight = stored(values, layout)
    x = torch.randn(2, tokens, 192, generator=torch.Generator().manual_seed(1))[0].to(dtype)
    exact = x.double() @ weight.dense(torch.float64).T
    assert native.why_not(x) is None
    found = linear(weight, x)
    assert found.dtype == dtype and found.shape == exact.shape
    plain = torch.nn.functional.linear(x, weight.dense(dtype)).double()
    bound = 2 * float((plain - exact).norm() / exact.norm()) + 1e-6
    if values in INTEGER and tokens <= library.MAX_TOKENS:
        bound += 0.004  # activations of 8 bits and a sign
    assert float((found.double() - exact).norm() / exact.norm()) <= bound


def test_leading_dimensions_are_kept() -> None:
    weight, x = stored("int8", "bitmask"), torch.randn(2, 3, 192)
    assert linear(weight, x).shape == (2, 3, 48)
    assert linear(weight, x[:0]).shape == (0, 3, 48)
    torch.testing.assert_close(linear(weight, x).reshape(6, 48), linear(weight, x.reshape(6, 192)))


def test_other_dtypes_and_devices_say_why_not() -> None:
    assert "float64" in str(native.why_not(torch.empty(1, dtype=torch.float64)))
    assert "meta" in str(native.why_not(torch.empty(1, device="meta")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_products_do_not_depend_on_torchs_default_dtype(dtype: torch.dtype) -> None:
    weight, x = stored("int8", "bitmask"), torch.ones(9, 192)
    expected = [linear(weight, x[:tokens]) for tokens in (1, 9)]
    torch.set_default_dtype(dtype)
    try:
        found = [linear(weight, x[:tokens]) for tokens in (1, 9)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_products_do_not_depend_on_torchs_default_device() -> None:
    weight, x = stored("int8", "bitmask"), torch.ones(9, 192)
    expected = [linear(weight, x[:tokens]) for tokens in (1, 9)]
    with torch.device("meta"):
        found = [linear(weight, x[:tokens]) for tokens in (1, 9)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
