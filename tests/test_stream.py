"""The stream runs every family as the in-memory model does, one block at a time, and watches the right inputs."""

import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.processes import Processes
from llmsparse.settle import Settling
from llmsparse.skeleton import Skeleton
from llmsparse.statistics import Gram
from llmsparse.stream import BlockStream
from llmsparse.walk import Walk
from tests.tiny import FAMILIES, save_tiny

LENGTH = 24


def make_stream(folder, windows, **options):
    skeleton = Skeleton(Checkpoint.open(folder), torch.float32)
    return BlockStream(skeleton, windows, torch.float32, torch.device("cpu"), **options)


def windows_for(count=3):
    return torch.randint(3, 100, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def settle(block):
    """Weight name -> (Gram, tokens), with every weight left as it is."""
    found = {}
    kinds = dict.fromkeys((w.name for w in block.weights), Gram)
    block.settle(
        kinds, lambda name, statistics: found.__setitem__(name, (statistics.matrix, statistics.tokens))
    )
    return found


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
        settled = settle(block)
        assert {w.name for w in block.weights} == set(settled)
        for weight in block.weights:
            x = inputs[weight.parameter.removesuffix(".weight")]
            matrix, tokens = settled[weight.name]
            assert tokens == windows.numel()
            torch.testing.assert_close(matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_linears_that_read_the_same_input_share_statistics(tmp_path):
    stream = make_stream(save_tiny("llama", tmp_path / "m"), windows_for(2))
    block, leaders = next(iter(stream)), {}
    kinds = dict.fromkeys((w.name for w in block.weights), Gram)
    leaders = {k[15:]: v[15:] for k, v in block.settle(kinds, lambda name, statistics: None).leaders.items()}
    assert (
        leaders["self_attn.k_proj.weight"] == leaders["self_attn.v_proj.weight"] == "self_attn.q_proj.weight"
    )
    assert leaders["mlp.up_proj.weight"] == leaders["mlp.gate_proj.weight"] == "mlp.gate_proj.weight"
    assert len(set(leaders.values())) == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_is_a_weight_with_its_own_tokens(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    stream = make_stream(folder, windows_for())
    block, config = next(iter(stream)), stream.skeleton.config
    experts = [w for w in block.weights if w.expert is not None]
    names = set(Checkpoint.open(folder).names())
    assert len(experts) == 3 * (getattr(config, "num_local_experts", None) or config.num_experts)
    assert all(w.name in names for w in experts)
    assert not any("router" in w.name or w.name.endswith(".gate.weight") for w in stream.skeleton.weights)
    for weight in experts:
        assert torch.equal(block.views[weight.name], Checkpoint.open(folder).tensor(weight.name))
    settled = settle(block)
    tokens = {w.name: settled[w.name][1] for w in experts if w.name in settled}
    down = [t for n, t in tokens.items() if n.endswith(("w2.weight", "down_proj.weight"))]
    assert sum(down) == 3 * LENGTH * config.num_experts_per_tok
    assert len(set(tokens.values())) > 1


def halve(block):
    """A solver that changes every weight, so that each later statistic depends on it."""
    found = {}

    def solve(name, statistics):
        found[name] = (statistics.matrix, statistics.tokens)
        block.views[name].mul_(0.5)

    return found, solve


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon", "mixtral", "qwen3_moe"])
def test_each_weight_is_solved_on_what_the_pruned_ones_before_it_produce(family, tmp_path):
    """Against a plain loop: run the whole block anew before each weight, with the earlier ones already changed."""
    folder, windows = save_tiny(family, tmp_path / family), windows_for()
    stream = make_stream(folder, windows)
    block = next(iter(stream))
    found, solve = halve(block)
    block.settle(dict.fromkeys((w.name for w in block.weights), Gram), solve)
    plain = next(iter(make_stream(folder, windows)))
    for name in found:  # in the order in which they were solved
        alone = {}
        whole = Settling(plain.weights, plain.views, {name: Gram}, torch.device("cpu"), Processes.alone())
        for index in range(len(windows)):
            walk = Walk(
                lambda index=index: plain.forward(
                    plain.module, plain.stream.hidden.read(range(index, index + 1))
                ),
                whole.gate,
            )
            walk.advance()
            if walk.waiting:
                whole.arrive(walk, 1)
                walk.abandon()
        alone = whole.statistics[name]
        assert found[name][1] == alone.tokens
        torch.testing.assert_close(found[name][0], alone.matrix, rtol=1e-5, atol=1e-7)
        plain.views[name].mul_(0.5)
    plain.run()
    torch.testing.assert_close(
        stream.hidden.read(range(3)), plain.stream.hidden.read(range(3)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("size", "keep"), [(2, 99), (3, 99), (1, 0), (1, 1), (2, 1)])
def test_batch_size_and_kept_passes_never_change_a_result(family, size, keep, tmp_path):
    folder = save_tiny(family, tmp_path / "m")
    results = []
    for batch_size, kept in ((1, 99), (size, keep)):
        stream = make_stream(folder, windows_for(), batch_size=batch_size)
        stream.keep = kept
        block = next(iter(stream))
        found, solve = halve(block)
        block.settle(dict.fromkeys((w.name for w in block.weights), Gram), solve)
        results.append((found, stream.hidden.read(range(3))))
    (first, states), (second, others) = results
    torch.testing.assert_close(states, others, rtol=1e-5, atol=1e-6)
    assert first.keys() == second.keys()
    for name, (matrix, tokens) in first.items():
        assert tokens == second[name][1]
        torch.testing.assert_close(matrix, second[name][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("at", ["first", "later"])
def test_batch_is_halved_when_memory_runs_out(at, tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "m")
    stream, reference = make_stream(folder, windows_for(4), batch_size=4), make_stream(folder, windows_for(4))
    block, other = next(iter(stream)), next(iter(reference))
    target = block.module if at == "first" else block.module.mlp
    forward = target.forward

    def hungry(states, *args, **kwargs):
        if len(states) > 1:
            raise torch.OutOfMemoryError("pretended")
        return forward(states, *args, **kwargs)

    monkeypatch.setattr(target, "forward", hungry)
    found, solve = halve(block)
    expected, solve_other = halve(other)
    kinds = dict.fromkeys((w.name for w in block.weights), Gram)
    block.settle(kinds, solve)
    other.settle(kinds, solve_other)
    assert stream.batch_size == 1
    for name, (matrix, tokens) in found.items():
        assert tokens == expected[name][1]
        torch.testing.assert_close(matrix, expected[name][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        stream.hidden.read(range(4)), reference.hidden.read(range(4)), rtol=1e-5, atol=1e-6
    )


def test_an_error_inside_a_block_is_raised_where_it_can_be_read(tmp_path, monkeypatch):
    block = next(iter(make_stream(save_tiny("llama", tmp_path / "m"), windows_for(2))))
    monkeypatch.setattr(block.module.mlp, "forward", lambda x: (_ for _ in ()).throw(ArithmeticError("mine")))
    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="mine"):
        block.settle(dict.fromkeys((w.name for w in block.weights), Gram), lambda name, statistics: None)
    assert threading.active_count() == before


def test_an_error_of_a_solver_ends_every_pass(tmp_path):
    block = next(iter(make_stream(save_tiny("llama", tmp_path / "m"), windows_for(3))))
    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="mine"):
        block.settle({block.weights[3].name: Gram}, lambda *_: (_ for _ in ()).throw(ArithmeticError("mine")))
    assert threading.active_count() == before


def test_no_weight_of_a_finished_block_stays_in_memory(tmp_path):
    alive = []
    for block in make_stream(save_tiny("llama", tmp_path / "m"), windows_for(2)):
        assert all(reference() is None for reference in alive)
        alive = [weakref.ref(p) for p in block.module.parameters()]
        block.run()


def test_only_one_pass_stops_before_a_weight_whose_statistics_are_complete(tmp_path, monkeypatch):
    arrived = []
    arrive = Settling.arrive
    monkeypatch.setattr(
        Settling, "arrive", lambda self, walk, n: (arrived.append(walk.waiting), arrive(self, walk, n))
    )
    settle(next(iter(make_stream(save_tiny("llama", tmp_path / "m"), windows_for(3)))))
    stops = {name.split(".")[-2]: arrived.count(name) for name in dict.fromkeys(arrived)}
    assert stops == {
        "q_proj": 3, "k_proj": 1, "v_proj": 1, "o_proj": 3, "gate_proj": 3, "up_proj": 1, "down_proj": 3
    }  # fmt: skip


def test_a_block_that_changes_its_input_in_place_is_refused(tmp_path, monkeypatch):
    block = next(iter(make_stream(save_tiny("llama", tmp_path / "m"), windows_for(2))))
    forward = block.module.forward
    monkeypatch.setattr(
        block.module, "forward", lambda states, *rest, **named: forward(states.mul_(2), *rest, **named)
    )
    with pytest.raises(UserError, match="llama cannot be streamed: its blocks change their input in place"):
        block.run()


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
