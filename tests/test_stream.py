"""The stream runs every family as the in-memory model does, one block at a time, and watches the right inputs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.skeleton import Skeleton
from llmsparse.statistics import Gram
from llmsparse.stream import BlockStream
from tests.tiny import FAMILIES, save_tiny

LENGTH = 24


def make_stream(folder, windows, **options):
    skeleton = Skeleton(Checkpoint.open(folder), torch.float32)
    return BlockStream(skeleton, windows, torch.float32, torch.device("cpu"), **options)


def windows_for(count=3):
    return torch.randint(3, 100, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def in_memory_outputs(model, tokens):
    """Every block's output by forward hooks on the whole model."""
    skeleton_path = next(
        n for n, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )  # fmt: skip
    outputs = []
    for block in model.get_submodule(skeleton_path):
        block.register_forward_hook(
            lambda m, a, o: outputs.append(o if isinstance(o, torch.Tensor) else o[0])
        )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_streaming_equals_in_memory(family, batch_size, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = windows_for()
    expected = in_memory_outputs(model, windows)
    stream = make_stream(folder, windows, batch_size=batch_size)
    for block in stream:
        block.run()
        actual = stream.hidden.read(range(len(windows)))
        torch.testing.assert_close(actual, expected[block.index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_is_materialised_at_a_time(family, tmp_path):
    stream = make_stream(save_tiny(family, tmp_path / family), windows_for(2))
    for block in stream:
        real = {n for n, p in stream.skeleton.model.named_parameters() if not p.is_meta}
        assert real and all(n.startswith(block.name + ".") for n in real)
    assert all(p.is_meta for p in stream.skeleton.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "opt", "gpt2", "gpt_neox", "falcon"])
def test_observed_grams_equal_hooked_inputs(family, tmp_path):
    from transformers.pytorch_utils import Conv1D

    folder = save_tiny(family, tmp_path / family)
    windows = windows_for()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = make_stream(folder, windows, batch_size=2)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(
                lambda m, a, name=name: inputs.__setitem__(
                    name, a[0].detach().double().reshape(-1, a[0].shape[-1])
                )
            )
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for block in stream:
        observer = block.observe(dict.fromkeys((w.name for w in block.weights), Gram))
        assert {w.name for w in block.weights} == set(observer.shared)
        for weight in block.weights:
            x = inputs[weight.parameter.removesuffix(".weight")]
            gram = observer.statistics[observer.shared[weight.name]]
            assert gram.tokens == windows.numel()
            torch.testing.assert_close(gram.matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        block.run()


def test_linears_that_read_the_same_input_share_statistics(tmp_path):
    stream = make_stream(save_tiny("llama", tmp_path / "m"), windows_for(2))
    block = next(iter(stream))
    shared = block.observe(dict.fromkeys((w.name for w in block.weights), Gram)).shared
    leaders = {name.split("layers.0.")[1]: leader.split("layers.0.")[1] for name, leader in shared.items()}
    assert (
        leaders["self_attn.k_proj.weight"] == leaders["self_attn.v_proj.weight"] == "self_attn.q_proj.weight"
    )
    assert leaders["mlp.up_proj.weight"] == leaders["mlp.gate_proj.weight"] == "mlp.gate_proj.weight"
    assert len(set(leaders.values())) == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_is_a_weight_with_its_own_tokens(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    stream = make_stream(folder, windows_for())
    block = next(iter(stream))
    experts = [w for w in block.weights if w.is_expert]
    names = set(Checkpoint.open(folder).names())
    assert len(experts) == 3 * (
        getattr(stream.skeleton.config, "num_local_experts", None) or stream.skeleton.config.num_experts
    )
    assert all(w.name in names for w in experts)
    assert not any("router" in w.name or w.name.endswith(".gate.weight") for w in stream.skeleton.weights)
    for weight in experts:
        assert torch.equal(block.views[weight.name], Checkpoint.open(folder).tensor(weight.name))
    observer = block.observe(dict.fromkeys((w.name for w in block.weights), Gram))
    tokens = {
        w.name: observer.statistics[observer.shared[w.name]].tokens
        for w in experts
        if w.name in observer.shared
    }
    down = [t for n, t in tokens.items() if n.endswith(("w2.weight", "down_proj.weight"))]
    assert sum(down) == 3 * LENGTH * stream.skeleton.config.num_experts_per_tok
    assert len(set(tokens.values())) > 1


def test_batch_size_never_changes_a_statistic(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    results = []
    for size in (1, 2, 3):
        block = next(iter(make_stream(folder, windows_for(), batch_size=size)))
        observer = block.observe(dict.fromkeys((w.name for w in block.weights), Gram))
        results.append([s.matrix for s in observer.statistics.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_batch_is_halved_when_memory_runs_out(tmp_path, monkeypatch):
    stream = make_stream(save_tiny("llama", tmp_path / "m"), windows_for(4), batch_size=4)
    reference = make_stream(save_tiny("llama", tmp_path / "m2"), windows_for(4))
    block, other = next(iter(stream)), next(iter(reference))
    forward = block.module.forward

    def hungry(states, *args, **kwargs):
        if len(states) > 1:
            raise torch.OutOfMemoryError("pretended")
        return forward(states, *args, **kwargs)

    monkeypatch.setattr(block.module, "forward", hungry)
    kinds = dict.fromkeys((w.name for w in block.weights), Gram)
    first, second = block.observe(kinds), other.observe(kinds)
    assert stream.batch_size == 1
    for leader, gram in first.statistics.items():
        assert torch.equal(gram.matrix, second.statistics[leader].matrix)


@pytest.mark.parametrize("offload", ["cpu", "disk", "none"])
def test_offload_changes_nothing(offload, tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    plain, stream = make_stream(folder, windows_for()), make_stream(folder, windows_for(), offload=offload)
    for a, b in zip(plain, stream, strict=True):
        a.run()
        b.run()
    assert torch.equal(plain.hidden.read(range(3)), stream.hidden.read(range(3)))
    stream.hidden.close()


def test_a_model_without_a_block_list_is_refused(tmp_path):
    skeleton = Skeleton(Checkpoint.open(save_tiny("llama", tmp_path / "m")))
    skeleton.config.num_hidden_layers = 17
    with pytest.raises(UserError, match="cannot be streamed.*num_hidden_layers=17"):
        _ = skeleton.block_path
