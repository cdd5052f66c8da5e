"""Kernels tried on a device before they are trusted there: right ones pass, wrong ones are told."""

import importlib
from types import ModuleType

import pytest
import torch

from llmsparse.kernels import trial, widen

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = (trial.Call(2, 5, 64, 1),)


def modules(name: str) -> tuple[ModuleType, ModuleType]:
    return tuple(importlib.import_module(f"llmsparse.kernels.{each}") for each in (name, f"{name}_unpack"))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["nm_mma", "nm_gemv", "n16_gemv", "bitmask_gemv"])
def test_a_wrong_product_and_a_wrong_unpacking_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, unpacking = modules(name)
    kind = ("int8", torch.bfloat16)
    assert trial.wrong(kernel, unpacking, DEVICE, kind, SMALL) is None
    linear = kernel.linear
    monkeypatch.setattr(kernel, "linear", lambda *given, **options: linear(*given, **options) * 1.05)
    assert "product of 2 tokens is wrong by 0.05" in str(trial.wrong(kernel, unpacking, DEVICE, kind, SMALL))
    monkeypatch.setattr(kernel, "linear", linear)
    monkeypatch.setattr(unpacking, "unpack", lambda *given: given[-1].fill_(float("nan")))
    assert "unpacks is wrong by nan" in str(trial.wrong(kernel, unpacking, DEVICE, kind, SMALL))


@pytest.mark.parametrize("values", ["bf16", "fp16", "int8", "int4:32"])
def test_the_random_weight_is_two_of_four_in_every_kind_of_value(values: str) -> None:
    numbers, scales, dense = trial.weight(values, (6, 96), DEVICE)
    assert int((numbers.view(6, -1, 4) != 0).sum(2).max()) == 2
    assert (scales is None) == (values in widen.FLOATS)
    assert bool(((numbers != 0) == (dense != 0)).all())
