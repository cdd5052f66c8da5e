"""bitmask: bits kept, bytes taken, and rows that must take what is announced."""

from math import prod

import pytest
import torch

from llmsparse.errors import UserError
from llmsparse.values import Values
from tests.formats.layout import numbers, pack


def test_a_negative_zero_and_a_nan_with_a_payload_are_kept_bit_for_bit() -> None:
    weight = torch.zeros(2, 16).bfloat16()
    weight[0, 3] = -0.0
    weight.view(torch.int16)[1, 5] = 0x7FA5  # a signalling NaN
    packed, tensors = pack("bitmask", "bf16", Values.parse("bf16").numbers(weight))
    assert packed.nnz == 2
    assert torch.equal(packed.weight(tensors, 0, 2).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize(
    "kind, density, bits",
    [("bf16", 0.5, 9.0), ("int8", 0.5, 5.0), ("int4:32", 0.5, 3.5), ("bf16", 0.25, 5.0), ("fp32", 0.5, 17.0)],
)
def test_a_bitmask_takes_the_bits_that_arithmetic_says(kind: str, density: float, bits: float) -> None:
    shape = (512, 1024)
    drawn = numbers(kind, shape, 2)
    while bool((drawn[[0, *range(2, 512)]] == 0).any()):
        drawn[drawn == 0] = 1
    order = torch.rand(shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    packed, _ = pack("bitmask", kind, drawn * (order < density * shape[1]))
    scales = 16 / shape[1] if kind == "int8" else 0  # int4:32's half bit is in the 3.5
    assert packed.bytes * 8 / prod(shape) == pytest.approx(bits + scales, rel=0.01)


def test_all_zeros_pack_to_their_mask() -> None:
    packed, tensors = pack("bitmask", "bf16", torch.zeros(4, 16, dtype=torch.int16))
    packed.check("w", tensors)
    assert (packed.nnz, packed.numbers(tensors, 0, 4).any()) == (0, False)


def test_rows_of_four_bit_codes_must_take_the_announced_bytes() -> None:
    found = torch.ones(2, 8, dtype=torch.int8)
    found[:, 2:] = 0
    packed, tensors = pack("bitmask", "int4:32", found)  # two codes a row: two bytes
    tensors["mask"][:, 0] = torch.tensor([0b1, 0b111])  # still four codes, but three bytes
    with pytest.raises(UserError, match="w.mask has rows that take 3 bytes, not 2"):
        packed.check("w", tensors)
