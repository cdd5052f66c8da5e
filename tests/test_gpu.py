"""Packed models on a GPU: here on the CPU in Triton's interpreter, which runs the kernels where they say `cuda`."""

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmsparse
from llmsparse import dispatch, gpu
from llmsparse.errors import UserError
from llmsparse.kernels import nm_cusparselt, nm_mma, trial
from llmsparse.sparse_linear import SparseLinear
from tests.packed_tiny import packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([[3, 9, 4, 7, 11]], device=DEVICE)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packed layers take the CPU for a GPU, unless there is one; kernels' own tests are short."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "here", lambda device: True)
        monkeypatch.setattr(nm_mma, "usable", lambda *given: None)
        monkeypatch.setattr(trial, "CALLS", (trial.Call(1, 5, 64, 1),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(folder: Path, **options: Any) -> Any:
    return llmsparse.load(folder, device_map=DEVICE, dtype=torch.bfloat16, **options)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of the model with its first block alone: the interpreter is slow."""
    model.model.layers = model.model.layers[:1]
    return model(ids).logits


def layers(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def reference(folder: Path) -> Tensor:
    """Logits of the dense model, in float32."""
    return logits(load(folder).dequantize().float())


@pytest.mark.parametrize(
    ("pattern", "values", "kernel", "storage"),
    [
        pytest.param(*case, storage, marks=[pytest.mark.long] if storage in slow else [])
        for *case, slow in (
            ("2:4", None, "nm_mma", ()),
            ("2:4", "int8", "nm_mma", ()),
            ("2:4", "int4:32", "nm_gemv", ("decode", "both")),  # a minute each in the interpreter
            ("8:16", None, "n16_gemv", ()),
            ("50%", "int8", "bitmask_gemv", ("both",)),
        )
        for storage in dispatch.STORAGES
    ],
)
def test_a_packed_model_computes_what_the_dense_one_does(
    pattern: str,
    values: str | None,
    kernel: str,
    storage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(dispatch.STORAGE, storage)
    folder = packed(tmp_path, "llama", values, pattern=pattern)
    model = load(folder)
    blocks = [layer for layer in layers(model) if layer is not model.get_output_embeddings()]
    assert {layer.layer.kernel for layer in blocks} == {None if storage == "prefill" else kernel}
    found, wanted = logits(model), reference(folder)
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    prompt = IDS.repeat(1, 12)
    for parts in (prompt[:, :1], prompt):  # a kernel's tokens, and more than it takes
        exact = logits(load(folder).dequantize(), parts)
        assert (logits(model, parts) - exact).norm() < 0.02 * exact.norm()


def test_packed_tensors_stay_on_the_cpu_and_are_saved_unchanged(tmp_path: Path) -> None:
    folder = packed(tmp_path, "llama", pattern="2:4")
    model = load(folder)
    assert all(buffer.device.type == "cpu" for layer in layers(model) for buffer in layer.buffers())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(model), logits(again))


def test_what_changes_nothing_lays_nothing_out_anew(tmp_path: Path) -> None:
    model = load(packed(tmp_path, "gpt2", pattern="2:4"))
    before = [layer.layer for layer in layers(model)]
    model.to(DEVICE)
    assert all(layer.layer is same for layer, same in zip(layers(model), before, strict=True))
    layer = layers(model)[0]
    assert layer.bias is not None
    x = torch.randn(2, layer.in_features, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(layer(x), pickle.loads(pickle.dumps(layer))(x))


def test_a_table_that_is_an_output_layer_too_is_multiplied_dense(tmp_path: Path) -> None:
    folder = packed(tmp_path, "qwen2", "int8", pattern="2:4")
    model = load(folder)
    table = model.get_input_embeddings()
    assert table._stored._dense is not None  # before any graph is captured
    found, wanted = logits(model), reference(folder)
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 40])
def test_inputs_may_begin_anywhere(tokens: int, tmp_path: Path) -> None:
    layer = layers(load(packed(tmp_path, "llama", pattern="2:4")))[0]
    memory = torch.randn(tokens * layer.in_features + 1, device=DEVICE).bfloat16()
    x = memory[1:].view(tokens, -1)  # at an odd address of two bytes
    assert torch.equal(layer(x), layer(x.clone()))


def test_layers_follow_new_weights_dtypes_and_copies(tmp_path: Path) -> None:
    folder, other = (
        packed(tmp_path, "llama", pattern="2:4"),
        packed(tmp_path / "b", "llama", pattern="2:4", seed=1),
    )
    model, wanted = load(folder), load(other)
    assert not torch.equal(logits(model), logits(wanted))
    model.load_state_dict(wanted.state_dict())
    assert torch.equal(logits(model), logits(wanted))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    single = layers(model)[0].float()
    assert single.layer.kernel == "nm_gemv"  # tensor cores take bf16 inputs of this weight alone
    x = torch.randn(3, single.in_features, device=DEVICE)
    torch.testing.assert_close(single(x), single.unpack(torch.float32)(x), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_inputs(tmp_path: Path) -> None:
    folder = packed(tmp_path, "llama", pattern="2:4")
    layer = layers(load(folder))[0]
    dense = layer.unpack(torch.float64).to(DEVICE)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    wanted = torch.ones(3, layer.out_features, dtype=torch.float64, device=DEVICE) @ dense.weight
    assert (x.grad.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_a_layer_compiles_without_a_graph_break(pattern: str, tmp_path: Path) -> None:
    layer = layers(load(packed(tmp_path, "llama", pattern=pattern)))[0]
    x = torch.randn(2, layer.in_features, dtype=torch.bfloat16, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_torch_finds_nothing_wrong_with_the_operator(tmp_path: Path) -> None:
    layer = layers(load(packed(tmp_path, "llama", pattern="2:4")))[0]
    x = torch.randn(2, layer.in_features, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.llmsparse.packed_linear, (x, layer.gpu_tensors, layer.gpu_key))


def test_other_inputs_than_the_layout_is_for_are_multiplied_too(tmp_path: Path) -> None:
    layer = layers(load(packed(tmp_path, "llama", pattern="2:4")))[0]
    dense = layer.unpack(torch.float32).to(DEVICE)
    x = torch.randn(3, layer.in_features, device=DEVICE)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer(x[:0]).shape == (0, layer.out_features)


# what is timed


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by way, or by kernel with one token; every other way takes a second."""
    monkeypatch.setenv(dispatch.PRODUCTS, "measured")
    times: dict[str, float] = {}

    def seconds(layers: list[gpu.Layer], way: str, tokens: int, algorithm: int = 0) -> float:
        name = (
            layers[0].kernel if way == "kernel" else layers[0].prefill if way == "prefill" else way
        ) or way
        return times.get(f"{name} {tokens}", times.get(name, 1.0))

    monkeypatch.setattr(dispatch, "_seconds", seconds)
    return times


def test_every_number_of_tokens_takes_its_fastest_way(
    timed: dict[str, float], tmp_path: Path, caplog
) -> None:  # noqa: ANN001
    timed |= {"nm_mma": 0.1, "unpack": 0.5, "nm_mma 64": 0.7}
    with caplog.at_level(logging.INFO, "llmsparse"):
        model = load(packed(tmp_path, "llama", pattern="2:4"))
    ways = layers(model)[0].layer.ways
    assert {tokens for tokens, (way, _) in ways.items() if way == "kernel"} == {1, 4, 8, 16, 32, 128}
    assert any("nm_mma 100000.0 µs" in record.getMessage() for record in caplog.records)


def test_a_layer_that_would_lose_stays_dense_and_the_log_says_so(timed, tmp_path: Path, caplog) -> None:  # noqa: ANN001
    timed |= {"dense": 0.01}
    with caplog.at_level(logging.WARNING, "llmsparse"):
        model = load(packed(tmp_path, "llama", pattern="2:4"))
    assert {layer.layer.prefill for layer in layers(model)} == {"dense"}
    assert any("stays dense" in record.getMessage() for record in caplog.records)


def test_the_kernel_that_is_fastest_with_one_token_is_taken(timed: dict[str, float], tmp_path: Path) -> None:
    timed |= {"nm_mma": 0.5, "nm_gemv": 0.3, "bitmask_gemv": 0.4}
    assert layers(load(packed(tmp_path, "llama", pattern="2:4")))[0].layer.kernel == "nm_gemv"


def test_what_was_timed_is_remembered(timed: dict[str, float], tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    timed |= {"nm_mma": 0.1}
    folder = packed(tmp_path, "llama", pattern="2:4")
    first = layers(load(folder))[0].layer
    monkeypatch.setattr(dispatch, "_seconds", lambda *given: pytest.fail("timed again"))
    assert layers(load(folder))[0].layer.ways == first.ways
    assert "nm_mma" in str(dispatch.remembered())


def test_what_is_remembered_and_cannot_be_used_is_found_anew(timed, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    timed |= {"nm_mma": 0.1, "nm_gemv": 0.2}
    folder = packed(tmp_path, "llama", pattern="2:4")
    assert layers(load(folder))[0].layer.kernel == "nm_mma"
    gpu.unusable.cache_clear()
    monkeypatch.setattr(nm_mma, "usable", lambda *given: "it is broken here")
    assert layers(load(folder))[0].layer.kernel == "nm_gemv"
    gpu.unusable.cache_clear()


def test_a_time_that_cannot_be_taken_stops_nothing_and_is_not_remembered(
    tmp_path: Path, monkeypatch, caplog
) -> None:  # noqa: ANN001
    def seconds(layers: list[gpu.Layer], way: str, tokens: int, algorithm: int = 0) -> float:
        if tokens > 8 or layers[0].kernel is None and len(found) == 0:
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    found: list[int] = []
    monkeypatch.setenv(dispatch.PRODUCTS, "measured")
    monkeypatch.setattr(dispatch, "_seconds", seconds)
    folder = packed(tmp_path, "llama", pattern="2:4")
    with caplog.at_level(logging.WARNING, "llmsparse"):
        assert layers(load(folder))[0].layer.kernel == "nm_mma"
        found.append(1)
        ways = layers(load(folder))[0].layer.ways
    assert ways[8][0] == "unpack" and ways[4096][0] == "unpack"
    assert dispatch.remembered() == {}
    assert any("is not timed: OutOfMemoryError" in record.getMessage() for record in caplog.records)


def test_long_inputs_decide_where_only_they_are_stored_for(timed, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv(dispatch.STORAGE, "prefill")
    monkeypatch.setattr(gpu, "unusable", lambda *given: None)
    monkeypatch.setattr(nm_cusparselt, "pack", lambda numbers, *given: (numbers,))
    monkeypatch.setattr(nm_cusparselt, "search", lambda *given: 7)
    folder = packed(tmp_path, "llama", pattern="2:4")
    timed |= {"nm_cusparselt": 0.1}
    assert {layer.layer.prefill for layer in layers(load(folder))} == {"nm_cusparselt"}
    assert layers(load(folder))[0].layer.ways[1] == ("prefill", 7)
    (tmp_path / "cache" / "llmsparse" / "gpu_products.json").unlink()
    timed |= {"nm_cusparselt": 2.0}
    assert {layer.layer.prefill for layer in layers(load(folder))} == {"dense"}


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"a": 1}', '{"a": {"kernel": "other", "prefill": null, "ways": {}, "why": ""}}']
)
def test_a_broken_memory_is_left_aside(broken: str, timed: dict[str, float], tmp_path: Path) -> None:
    file = tmp_path / "cache" / "llmsparse" / "gpu_products.json"
    file.parent.mkdir(parents=True)
    file.write_text(broken)
    assert dispatch.remembered() == {}
    timed |= {"nm_mma": 0.1}
    load(packed(tmp_path, "llama", pattern="2:4"))
    assert len(json.loads(file.read_text())) == len(dispatch.remembered()) > 0


def test_real_timings_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.PRODUCTS, "measured")
    for name, value in {"ROUNDS": 1, "CALLS": 1, "BUCKETS": (1, 4)}.items():
        monkeypatch.setattr(dispatch, name, value)
    monkeypatch.setattr(gpu, "BUCKETS", (1, 4))
    monkeypatch.setattr(gpu, "KERNELS", ("nm_gemv",))
    layer = layers(load(packed(tmp_path, "llama", pattern="2:4")))[0].layer
    told = dispatch.remembered()
    assert set(layer.ways) == {1, 4}
    assert len(told) > 0 and all("nm_gemv" in why and "µs" in why for why in told.values())


# what is asked for wrongly, or absent


def test_an_unknown_storage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.STORAGE, "fast")
    with pytest.raises(UserError, match="LLMSPARSE_STORAGE=fast is unknown; use decode, prefill, both"):
        load(packed(tmp_path, "llama", pattern="2:4"))


def test_without_triton_weights_stay_dense_and_the_log_says_why(tmp_path: Path, monkeypatch, caplog) -> None:  # noqa: ANN001
    monkeypatch.setattr(gpu, "why_no_kernels", lambda: "Triton cannot be imported (no module)")
    folder = packed(tmp_path, "llama", pattern="2:4")
    with caplog.at_level(logging.WARNING, "llmsparse"):
        model = load(folder)
    assert any("Triton cannot be imported" in record.getMessage() for record in caplog.records)
    wanted = reference(folder)
    assert (logits(model).float() - wanted).norm() < 0.02 * wanted.norm()


def test_a_kernel_that_cannot_be_run_gives_way_to_the_next(tmp_path: Path, monkeypatch, caplog) -> None:  # noqa: ANN001
    def seconds(layers: list[gpu.Layer], way: str, tokens: int, algorithm: int = 0) -> float:
        if layers[0].kernel == "nm_mma":
            raise RuntimeError("ptxas died\nwith details")
        return 2.0 if layers[0].kernel is None else 1.0

    gpu.unusable.cache_clear()
    folder = packed(tmp_path, "llama", pattern="2:4")
    monkeypatch.setenv(dispatch.PRODUCTS, "measured")
    monkeypatch.setattr(dispatch, "_seconds", seconds)
    with caplog.at_level(logging.WARNING, "llmsparse"):
        assert {layer.layer.kernel for layer in layers(load(folder))} == {"nm_gemv"}
    assert any("nm_mma is not used: RuntimeError: ptxas died" in r.getMessage() for r in caplog.records)

    def usable(*given: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(nm_mma, "usable", usable)
    gpu.unusable.cache_clear()
    monkeypatch.setenv(dispatch.PRODUCTS, "packed")
    assert {layer.layer.kernel for layer in layers(load(folder))} == {"nm_gemv"}
    gpu.unusable.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("pattern", "values"), [("2:4", None), ("2:4", "int8"), ("8:16", None), ("50%", "int4:32")]
)
def test_products_wait_for_nothing_and_are_captured(pattern: str, values: str | None, tmp_path: Path) -> None:
    layer = layers(load(packed(tmp_path, "llama", values, pattern=pattern)))[0]
    for tokens in (1, 40):
        x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=DEVICE)
        wanted = layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, wanted)


def test_a_kernel_that_fails_its_own_test_gives_way_to_the_next(tmp_path: Path, monkeypatch, caplog) -> None:  # noqa: ANN001
    gpu.unusable.cache_clear()
    monkeypatch.setattr(nm_mma, "usable", lambda *given: "its product of one tile is wrong")
    with caplog.at_level(logging.WARNING, "llmsparse"):
        model = load(packed(tmp_path, "llama", pattern="2:4"))
    gpu.unusable.cache_clear()
    assert {layer.layer.kernel for layer in layers(model)} == {"nm_gemv"}
    assert any("nm_mma is not used" in record.getMessage() for record in caplog.records)
