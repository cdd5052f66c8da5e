"""The operators of packed weights: what torch asks of operators, and the warning of the slow way."""

import warnings

import pytest
import torch

from llmsparse import ops
from llmsparse.ops import SlowProduct, Stored
from llmsparse.packed import Packed
from tests.formats.layout import numbers, pack

CASES = [
    ("bitmask", "bf16"),
    ("bitmask", "int8"),
    ("bitmask", "int4:5"),
    ("dense", "int8"),
    ("dense", "int4:32"),
]


def stored(layout: str, kind: str) -> tuple[Packed, list[torch.Tensor]]:
    packed, tensors = pack(layout, kind, numbers(kind, (7, 33)))
    starts = packed.starts(tensors)
    return packed, [*(tensors[name] for name in packed.tensors()), *([] if starts is None else [starts])]


@pytest.mark.parametrize("layout, kind", CASES)
def test_torch_finds_nothing_wrong_with_the_product(layout: str, kind: str) -> None:
    packed, tensors = stored(layout, kind)
    for shape in ((33,), (2, 33), (2, 3, 33), (0, 33)):
        x = torch.randn(shape, requires_grad=True)
        torch.library.opcheck(torch.ops.llmsparse.packed_linear, (x, tensors, packed.key))
        dense = Stored(packed, tensors).dense(torch.float32)
        found = torch.ops.llmsparse.packed_linear(x, tensors, packed.key)
        exact = torch.nn.functional.linear(x, dense)
        allowed = 1e-6 if kind == "bf16" else 0.01  # native kernels round activations that meet integers
        assert (found - exact).norm() <= allowed * (x.norm() * dense.norm())


@pytest.mark.parametrize("layout, kind", [case for case in CASES if case[0] == "dense"])
def test_torch_finds_nothing_wrong_with_the_gather(layout: str, kind: str) -> None:
    packed, tensors = stored(layout, kind)
    ids = torch.tensor([[6, 0, 0], [3, 1, 6]])
    torch.library.opcheck(torch.ops.llmsparse.packed_gather, (ids, tensors, packed.key, torch.float32))
    found = torch.ops.llmsparse.packed_gather(ids, tensors, packed.key, torch.bfloat16)
    assert torch.equal(found, Stored(packed, tensors).dense(torch.bfloat16)[ids])


def test_panels_change_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, tensors = stored("bitmask", "int8")
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    whole = ops.linear(Stored(packed, tensors), x.detach())
    monkeypatch.setattr("llmsparse.bits.PANEL", 70)
    torch.testing.assert_close(ops.linear(Stored(packed, tensors), x.detach()), whole)
    assert torch.autograd.gradcheck(lambda x: torch.ops.llmsparse.packed_linear(x, tensors, packed.key), (x,))


def test_a_native_kernel_is_taken_where_it_takes_x_and_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, tensors = stored("bitmask", "bf16")
    monkeypatch.setattr(ops.native, "why_not", lambda x: None if len(x) == 1 else "more than a token")
    monkeypatch.setattr(ops.native, "product", lambda stored: lambda x: x.new_zeros(1))
    weight = Stored(packed, tensors)
    assert ops.linear(weight, torch.ones(1, 33)).shape == (1,)
    assert ops.linear(weight, torch.ones(2, 33)).shape == (2, 7)


def test_the_slow_way_is_told_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, tensors = stored("bitmask", "bf16")
    monkeypatch.setattr(ops.native, "why_not", lambda x: "a reason of this test")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ops.linear(Stored(packed, tensors), torch.ones(2, 33))
    assert [(w.category, "a reason of this test" in str(w.message)) for w in caught] == [(SlowProduct, True)]
