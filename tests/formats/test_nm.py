"""nm: places in a group."""

from dataclasses import replace

import pytest
import torch

from llmsparse.errors import UserError
from tests.formats.layout import pack


def test_places_must_rise_inside_a_group_and_end_where_the_row_ends() -> None:
    found = torch.zeros(2, 16, dtype=torch.int16)
    found[:, [1, 4]] = 1
    packed, tensors = pack("nm", "bf16", found)
    assert (packed.n, packed.m) == (2, 16)
    tensors["positions"][0] = torch.tensor([0x14])  # 4 before 1
    with pytest.raises(UserError, match="w.positions has a group of 16 whose places do not rise"):
        packed.check("w", tensors)
    three = replace(packed, shape=(2, 12), n=1, m=4, nnz=6, size=6)
    with pytest.raises(UserError, match="positions has bits set beyond its last place"):
        three.check(
            "w",
            {
                "positions": torch.full((2, 1), 0x40, dtype=torch.uint8),
                "values": torch.ones(6, dtype=torch.int16),
            },
        )
