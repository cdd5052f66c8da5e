"""Packed or dense: what is timed once is remembered, followed and told."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch

import llmsparse
from llmsparse import choice, dispatch
from llmsparse.choice import Timing, time_forms
from llmsparse.errors import UserError
from llmsparse.kernels.cpu import library
from llmsparse.sparse_linear import SparseLinear
from tests.packed_tiny import packed

needs_kernels = pytest.mark.skipif(
    all(library.available().values()), reason="the native kernels were not built"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(dispatch.PRODUCTS, "measured")
    return tmp_path / "cache" / "llmsparse" / "products.json"


def layers(model) -> list[SparseLinear]:  # noqa: ANN001
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@needs_kernels
def test_each_kind_of_layer_is_timed_once_and_remembered(cache: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    folder = packed(tmp_path, "llama", "int8")
    llmsparse.load(folder)
    known = json.loads(cache.read_text())
    assert known and all(len(times) == 2 and min(times) > 0 for times in known.values())
    monkeypatch.setattr(choice, "_measure", lambda members: pytest.fail("timed again"))
    llmsparse.load(folder)


@needs_kernels
@pytest.mark.parametrize(("timing", "dense"), [(Timing(1.0, 2.0), False), (Timing(2.0, 1.0), True)])
def test_the_faster_way_is_used_and_the_log_says_so(
    timing, dense, cache, tmp_path, monkeypatch, caplog
) -> None:  # noqa: ANN001
    monkeypatch.setattr(choice, "_measure", lambda members: timing)
    with caplog.at_level(logging.INFO, "llmsparse"):
        model = llmsparse.load(packed(tmp_path, "llama", "bf16"), dtype=torch.float32)
    in_blocks = [layer for layer in layers(model) if layer is not model.get_output_embeddings()]
    assert {layer.stays_dense for layer in in_blocks} == {dense}
    assert all(("dense" if dense else "packed") + " is used" in r.getMessage() for r in caplog.records)
    assert {r.levelno for r in caplog.records} == {logging.WARNING if dense else logging.INFO}
    ids = torch.tensor([[1, 2, 3]])
    ordinary = llmsparse.load(packed(tmp_path / "other", "llama", "bf16"), dtype=torch.float32).dequantize()
    torch.testing.assert_close(model(ids).logits, ordinary(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["packed", "dense"])
def test_the_variable_decides_without_timing(way: str, cache: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv(dispatch.PRODUCTS, way)
    model = llmsparse.load(packed(tmp_path, "llama", "int8"))
    assert {layer.stays_dense for layer in layers(model)} == {way == "dense"} and not cache.exists()


def test_an_unknown_way_is_refused(cache: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv(dispatch.PRODUCTS, "sometimes")
    with pytest.raises(UserError, match="measured, packed, dense"):
        llmsparse.load(packed(tmp_path, "llama", "int8"))


@needs_kernels
@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"a": 1}', b'{"a": [null, null]}', b"\xff\xfe"])
def test_a_damaged_memory_is_measured_again(damage: bytes, cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damage)
    llmsparse.load(packed(tmp_path, "llama", "int8"))
    assert json.loads(cache.read_text())


def test_times_are_the_smallest_of_each_form() -> None:
    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return x

    found = time_forms([slow], [lambda x: x], torch.zeros(1))
    assert found.packed >= 0.002 > found.dense and found.dense_wins
