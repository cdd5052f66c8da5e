"""dense: codes of weights without zeros."""

import torch

from llmsparse.packed import Packed, smallest
from llmsparse.values import Values


def test_codes_of_zero_with_a_negative_scale_are_positive_zeros() -> None:
    packed = Packed("dense", "int8", (1, 2))
    tensors = {"codes": torch.zeros(1, 2, dtype=torch.int8), "scales": torch.tensor([[-1.0]]).bfloat16()}
    assert not packed.weight(tensors, 0, 1).signbit().any()


def test_without_zeros_codes_are_dense_and_floats_stay_an_ordinary_tensor() -> None:
    full = torch.ones(64, 64, dtype=torch.int8)
    assert smallest(full, Values.parse("int8")).layout == "dense"  # type: ignore[union-attr]
    assert smallest(full.to(torch.int16), Values.parse("bf16")) is None
