"""Every layout x every kind of values: round trips, an independent reader, exact bytes, and what is refused."""

import numpy as np
import pytest
import torch

from llmsparse import plugins
from llmsparse.errors import UserError
from llmsparse.packed import Packed, smallest
from llmsparse.pattern import NM
from llmsparse.values import Values
from tests.formats.layout import KINDS, SHAPES, numbers, pack, read

CASES = [
    (layout, kind)
    for layout in plugins.names("formats")
    for kind in KINDS
    if not (layout == "dense" and Values.parse(kind).float_dtype)
]


def drawn(layout: str, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """Numbers that the layout can hold."""
    found = numbers(kind, shape)
    if layout == "nm":
        found = found * NM(1, 4).select(torch.rand(shape, generator=torch.Generator().manual_seed(2)))
        found[0, 0] = found[0, 0] if found.any() else 1
    return found


def shapes(layout: str) -> list[tuple[int, int]]:
    return [s for s in SHAPES if layout != "nm" or s[1] % 4 == 0]


@pytest.mark.parametrize("layout, kind", CASES)
def test_packed_numbers_come_back_bit_for_bit_whole_and_in_parts(layout: str, kind: str) -> None:
    for shape in shapes(layout):
        found = drawn(layout, kind, shape)
        packed, tensors = pack(layout, kind, found)
        packed.check("w", tensors)
        assert torch.equal(packed.numbers(tensors, 0, shape[0]), found)
        assert torch.equal(packed.numbers(tensors, shape[0] // 2, shape[0]), found[shape[0] // 2 :])


@pytest.mark.parametrize("layout, kind", CASES)
def test_a_reader_written_from_the_document_alone_finds_the_same_weights(layout: str, kind: str) -> None:
    for shape in shapes(layout):
        packed, tensors = pack(layout, kind, drawn(layout, kind, shape))
        weight = packed.weight(tensors, 0, shape[0], torch.float32).numpy()
        assert np.array_equal(read(packed.entry(), tensors).view(np.int32), weight.view(np.int32))


@pytest.mark.parametrize("layout, kind", CASES)
def test_tensors_are_those_that_the_entry_announces(layout: str, kind: str) -> None:
    for shape in shapes(layout):
        packed, tensors = pack(layout, kind, drawn(layout, kind, shape))
        assert packed.tensors() == {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
        assert packed.bytes == sum(t.nbytes for t in tensors.values())
        assert Packed.parse("w", packed.entry()) == packed


def test_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {case: pack(*case, drawn(*case, (64, 128))) for case in CASES}
    monkeypatch.setattr("llmsparse.bits.PANEL", 3 * 128)
    for case, (packed, tensors) in whole.items():
        again, parts = pack(*case, drawn(*case, (64, 128)))
        assert again == packed and all(torch.equal(parts[k], tensors[k]) for k in tensors)
        packed.check("w", tensors)


@pytest.mark.parametrize(
    "pattern, kind, layout",
    [("1:4", "bf16", "nm"), ("2:4", "bf16", "bitmask"), ("1:8", "int8", "nm"), ("2:4", "int8", "bitmask")],
)
def test_the_smallest_layout_is_chosen(pattern: str, kind: str, layout: str) -> None:
    n, m = map(int, pattern.split(":"))
    mask = NM(n, m).select(torch.rand(64, 256, generator=torch.Generator().manual_seed(0)))
    found = smallest(torch.where(mask, numbers(kind, (64, 256), 2).clamp(min=1), 0), Values.parse(kind))
    assert found is not None and found.layout == layout


def broken(layout: str, kind: str, change) -> str:
    packed, tensors = pack(layout, kind, drawn(layout, kind, (8, 12)))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    packed = change(packed, tensors) or packed
    with pytest.raises(UserError) as error:
        packed.check("model.w", tensors)
    return str(error.value)


def put(name: str, index, value):
    def change(packed: Packed, tensors: dict) -> None:
        tensors[name][index] = value

    return change


def drop(name: str):
    def change(packed: Packed, tensors: dict) -> None:
        del tensors[name]

    return change


def test_every_fault_is_named_with_its_tensor() -> None:
    assert "model.w.mask has bits set beyond" in broken("bitmask", "bf16", put("mask", (0, 1), 0x80))
    assert "model.w.mask has" in broken("bitmask", "bf16", put("mask", (1, 0), 0xFF))
    assert "code -128" in broken("bitmask", "int8", put("values", 0, -128))
    assert "code -128" in broken("dense", "int8", put("codes", (0, 0), -128))
    assert "code -128" in broken("nm", "int8", put("values", 0, -128))
    assert "not finite" in broken("bitmask", "int8", put("scales", (0, 0), float("inf")))
    assert "model.w.values is" in broken("bitmask", "bf16", lambda p, t: t.update(values=t["values"][1:]))
    assert "model.w.mask is missing" in broken("bitmask", "bf16", drop("mask"))
    assert "int8" in broken("bitmask", "bf16", lambda p, t: t.update(mask=t["mask"].to(torch.int8)))


def test_half_bytes_that_should_be_0_are_refused() -> None:
    ones = torch.ones(4, 7, dtype=torch.int8)
    for layout, name in (("bitmask", "values"), ("dense", "codes")):
        packed, tensors = pack(layout, "int4:32", ones)
        tensors[name].view(-1)[3] |= 0x10
        with pytest.raises(UserError, match=f"w.{name} has a row whose last half byte is not 0"):
            packed.check("w", tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "csr"}, {"values": "int5"}, {"values": 4}, {"shape": [8]}, {"shape": [8, -12]},
        {"shape": [8.0, 12]}, {"shape": [True, 12]}, {"shape": [1 << 40, 12]}, {"nnz": -1}, {"nnz": None},
        {"nnz": 97}, {"size": 3}, {"tied": "lm_head"}, {"layout": "nm"}, {"layout": "nm", "n": 3, "m": 5},
        {"layout": "nm", "n": 1, "m": 0}, {"layout": "dense"},
    ],
)  # fmt: skip
def test_an_impossible_entry_of_config_json_is_refused_by_name(change: dict) -> None:
    packed, _ = pack("bitmask", "bf16", drawn("bitmask", "bf16", (8, 12)))
    with pytest.raises(UserError, match="config.json: .*model.w"):
        Packed.parse("model.w", {**packed.entry(), **change})
