"""Blocks trained towards dense outputs, weights aimed at dense inputs, and weights of a block solved together."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.calibration import calibrate
from llmsparse.errors import UserError
from llmsparse.pattern import parse
from llmsparse.processes import Processes
from llmsparse.propagation import aimed
from llmsparse.prune import prune
from llmsparse.reconstruct import Reconstruction, reconstruct
from llmsparse.statistics import Gram
from tests.pruned import hashes, read_report, tensors
from tests.test_stream import in_memory_outputs, make_stream, windows_for
from tests.tiny import save_tiny, tokenizer

RUN = {"samples": 12, "sequence_length": 24, "seed": 3}


def other_text(text):
    """Windows of the text that are not those of a run."""
    return calibrate(str(text), tokenizer(), samples=16, sequence_length=24, seed=11).windows


def pruned_first_block(folder, windows, pattern="50%"):
    """The first block with the least weights zero, its masks, and what it puts out when dense."""
    block = next(iter(make_stream(folder, windows)))
    block.aim()
    masks = {name: parse(pattern).select(view.abs()) for name, view in block.views.items()}
    for name, view in block.views.items():
        view.masked_fill_(~masks[name], 0.0)
    return block, masks


def importance_of(block, power):
    """Channel by channel: the inverse of its mean part in a token's squared norm, to a power."""
    tokens = torch.cat([block.aims.read(range(i, i + 1))[0] for i in range(8)])
    parts = [float((tokens[:, c].square() / tokens.square().sum(-1)).mean()) for c in range(tokens.shape[1])]
    weights = [(part + 1e-3 / len(parts)) ** -power for part in parts]
    whole = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return torch.tensor(weights) / whole


def error_of(module, block, windows, importance):
    found = []
    with torch.no_grad():
        for i in windows:
            aim = block.aims.read(range(i, i + 1))
            output = block.forward(module, block.stream.hidden.read(range(i, i + 1)))
            found.append((((output - aim).square() * importance).sum(-1) / aim.square().sum(-1)).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(("norms", "channels"), [(False, 1.0), (True, 1.0), (False, 0.0), (False, 0.5)])
def test_reconstruction_equals_a_plain_training_loop(norms, channels, tmp_path):
    block, masks = pruned_first_block(save_tiny("llama", tmp_path / "m"), windows_for(8))
    before = copy.deepcopy(block.module.state_dict())
    module = copy.deepcopy(block.module)
    options = Reconstruction(2, 0.01, batch=2, held_out=0.25, norms=norms, channels=channels)
    outcome = reconstruct(block, masks, options, Processes.alone(), seed=5)
    weighing = importance_of(block, channels)
    assert all(torch.equal(v, before[k]) for k, v in block.module.state_dict().items()), (
        "the block was changed"
    )

    names = {f"{block.name}.{n}": (n, p) for n, p in module.named_parameters()}
    trained = {k: p for k, (n, p) in names.items() if p.dim() == 2 or norms}
    optimizers = {k: torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.95)) for k, p in trained.items()}
    scale = {k: float(p[p != 0].square().mean().sqrt()) for k, p in trained.items()}
    best, kept, step = (
        error_of(module, block, (6, 7), weighing),
        {k: p.detach().clone() for k, p in trained.items()},
        0,
    )
    for epoch in (1, 2):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(5 * 1009 * 1009 + epoch)).tolist()
        for pair in (order[0:2], order[2:4], order[4:6]):
            step += 1
            rate = 0.01 * min(1, step / 6 / 0.1) * (1 + math.cos(math.pi * min(step / 6, 1 - 1 / 12))) / 2
            for p in trained.values():
                p.requires_grad_(True)
                p.grad = None
            total = 0
            for i in pair:
                aim = block.aims.read(range(i, i + 1))
                output = block.forward(module, block.stream.hidden.read(range(i, i + 1)))
                wrong = ((output - aim).square() * weighing).sum(-1)
                total = total + (wrong / aim.square().sum(-1)).mean() / 2
            total.backward()
            for k, p in trained.items():
                optimizers[k].param_groups[0]["lr"] = rate * scale[k]
                optimizers[k].step()
                if k in masks:
                    p.data.mul_(masks[k])
        now = error_of(module, block, (6, 7), weighing)
        if now < best:
            best, kept = now, {k: p.detach().clone() for k, p in trained.items()}
    assert outcome.errors["after"] == pytest.approx(best, rel=1e-4)
    assert best < outcome.errors["before"], "training must help here"
    found = {**outcome.matrices, **outcome.vectors}
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_training_that_does_not_help_changes_nothing(tmp_path):
    block, masks = pruned_first_block(save_tiny("llama", tmp_path / "m"), windows_for(4))
    weights = {name: view.clone() for name, view in block.views.items()}
    outcome = reconstruct(block, masks, Reconstruction(1, rate=50.0), Processes.alone(), seed=0)
    assert outcome.errors["epoch"] == 0 and outcome.errors["after"] == outcome.errors["before"]
    for name, view in block.stream.skeleton.views(block.weights, outcome.matrices).items():
        assert torch.equal(view, weights[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_reconstructed_model_has_its_masks_and_is_nearer_to_the_dense_one(family, targets, tmp_path, text):
    source = save_tiny(family, tmp_path / "source")
    options = {"solver": "sparsegpt", "pattern": "2:4", "calibration": text, "targets": targets, **RUN}
    prune(source, tmp_path / "plain", **options)
    report = prune(source, tmp_path / "out", reconstruct=3, **options)
    found = tensors(tmp_path / "out")
    for record in report["weights"]:
        name, _, index = record["name"].partition("[")
        weight = found[name] if not index else found[name][int(index[:-1])]
        if family == "gpt2":
            weight = weight.T
        assert parse("2:4").allows(weight != 0) or (weight != 0).float().mean() < 0.5
        assert not (weight.eq(0) & weight.signbit()).any()
        assert record["block_error"]["after"] <= record["block_error"]["before"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / m).eval() for m in ("source", "plain", "out")]
    tokens = other_text(text)
    dense, plain, trained = (in_memory_outputs(model, tokens)[-1] for model in models)
    assert (trained - dense).norm() < (plain - dense).norm()


@pytest.mark.parametrize(
    "options", [{"reconstruct": 1}, {"targets": "dense"}, {"reconstruct": 1, "targets": "dense"}]
)
def test_an_interrupted_run_ends_in_the_same_bytes(options, tmp_path, text, monkeypatch):
    from llmsparse.work import Desk

    source = save_tiny("llama", tmp_path / "source", torch.bfloat16)
    given = {
        "calibration": text,
        **RUN,
        **options,
        "set": ("reconstruct.norms=true",) if "reconstruct" in options else (),
    }
    prune(source, tmp_path / "expected", **given)
    finish, calls = Desk.finish, []

    def stopped(self, block, names):
        calls.append(block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finish(self, block, names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Desk, "finish", stopped)
        prune(source, tmp_path / "out", **given)
    prune(source, tmp_path / "out", resume=True, **given)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


@pytest.mark.parametrize(("values", "solver"), [("int8", "wanda"), ("int4:32", "refit:sparsegpt")])
def test_trained_weights_are_rounded_with_their_masks(values, solver, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    report = prune(
        source, tmp_path / "out", pattern="2:4", values=values, calibration=text, reconstruct=2,
        solver=solver, include="lm_head", **RUN,
    )  # fmt: skip
    found = tensors(tmp_path / "out")
    for record in report["weights"]:
        weight, codes = found[record["name"]], found[f"{record['name']}.codes"].float()
        scales = found[f"{record['name']}.scales"].float()
        wide = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        torch.testing.assert_close(weight, codes * wide, rtol=1e-6, atol=0)
        assert (record["pattern"], record["values"]) == ("2:4", values) and record["sparsity"] == 0.5
        assert ((weight != 0).reshape(-1, 4).sum(1) <= 2).all()
        assert ("block_error" in record) == ("layers" in record["name"]) and codes.any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_cross_statistics_are_of_the_dense_models_inputs(family, tmp_path):
    """Against two whole models in memory, one with its first block's weights halved as they are settled."""
    folder, windows = save_tiny(family, tmp_path / family), windows_for()
    stream = make_stream(folder, windows)
    stream.follow_dense()
    found = {}
    for block in stream:

        def solve(name, statistics, block=block):
            found[name] = statistics
            block.views[name].mul_(0.5)

        kinds = {w.name: Gram for w in block.weights}
        block.settle(kinds, solve, cross=True)
    weights = {w.name: w for w in stream.skeleton.weights}
    dense, halved = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in {w.parameter for w in weights.values() if w.block is not None}:
            halved.get_parameter(parameter).mul_(0.5)
    rows = [_inputs(model, windows) for model in (dense, halved)]
    checked = 0
    for name, statistics in found.items():
        path = weights[name].parameter.removesuffix(".weight")
        if weights[name].expert is not None:
            assert statistics.cross is None
        elif path in rows[0]:
            checked += 1
            torch.testing.assert_close(
                statistics.cross, rows[0][path].T @ rows[1][path], rtol=1e-4, atol=1e-3
            )
    assert checked >= 4
    final = torch.cat([stream.dense.read(range(i, i + 1)) for i in range(len(windows))])
    torch.testing.assert_close(final, in_memory_outputs(dense, windows)[-1], rtol=1e-4, atol=1e-5)


def _inputs(model, tokens):
    """Path of each linear -> its inputs, (tokens, in)."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(
                lambda m, args, path=path: found.__setitem__(path, args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


def test_aimed_weight_is_the_ridge_solution():
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(200, 12, generator=random, dtype=torch.float64)
    inputs = dense + 0.3 * torch.randn(200, 12, generator=random, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=random, dtype=torch.float64)
    statistics = Gram.zeros(12, dtype=torch.float64)
    statistics.update(inputs, dense)
    found = aimed(weight, statistics, 0.1)
    strength = 0.1 * (inputs.square().sum(0) / 200).mean()
    tall = torch.cat((inputs / 200**0.5, strength.sqrt() * torch.eye(12, dtype=torch.float64)))
    wanted = torch.cat((dense / 200**0.5, strength.sqrt() * torch.eye(12, dtype=torch.float64))) @ weight.T
    torch.testing.assert_close(found, torch.linalg.lstsq(tall, wanted).solution.T, rtol=1e-8, atol=1e-10)
    halves = [Gram.zeros(12, dtype=torch.float64) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 90), slice(90, 200)), strict=True):
        half.update(inputs[rows], dense[rows])
    halves[0].merge(halves[1])
    torch.testing.assert_close(aimed(weight, halves[0], 0.1), found)
    unknown = Gram.zeros(12, dtype=torch.float64)
    unknown.update(inputs)
    assert aimed(weight, unknown, 0.1) is weight


def test_dense_targets_bring_the_output_nearer_to_the_dense_models(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    models = [AutoModelForCausalLM.from_pretrained(source).eval()]
    for targets in ("pruned", "dense"):
        prune(source, tmp_path / targets, calibration=text, targets=targets, samples=40, sequence_length=48)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / targets).eval())
    dense, pruned, aimed_at = (in_memory_outputs(model, other_text(text))[-1] for model in models)
    assert (aimed_at - dense).norm() < (pruned - dense).norm()


def test_weights_solved_together_see_the_dense_blocks_inputs(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    apart, order = (
        {
            r["name"]: r["error"]
            for r in prune(source, tmp_path / o, calibration=text, order=o, **RUN)["weights"]
        }
        for o in ("together", "sequential")
    )
    alone = {r["name"]: r["error"] for r in _each_alone(source, tmp_path, text)}
    first = [name for name in alone if ".layers.0." in name]
    assert len(first) == 7
    for name in first:
        assert apart[name] == pytest.approx(alone[name], rel=1e-4)
    assert apart[first[-1]] != pytest.approx(order[first[-1]], rel=1e-4)


def _each_alone(source, folder, text):
    """Each weight of the first block pruned while all others are dense."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        skip = rf"layers\.[1-9]|(?<!\.{name})\.weight"
        report = prune(source, folder / f"only-{name}", calibration=text, skip=(skip,), **RUN)
        yield from report["weights"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "magnitude", "reconstruct": 1}, "magnitude uses no calibration data"),
        ({"solver": "magnitude", "targets": "dense"}, "magnitude uses no calibration data"),
        ({"solver": "wanda", "targets": "dense"}, "wanda knows norms of its inputs alone, which --targets"),
        ({"targets": "sparse"}, "--targets sparse is unknown; use pruned, dense"),
        ({"order": "random"}, "--order random is unknown; use sequential, together"),
        ({"reconstruct": -1}, "--reconstruct -1 must be a number of epochs"),
        ({"set": "reconstruct.rate=1"}, "goes with --reconstruct EPOCHS"),
        (
            {"reconstruct": 1, "set": "reconstruct.rat=1"},
            "no such option; known: rate, batch, held_out, norms",
        ),
        ({"reconstruct": 1, "set": "reconstruct.rate=0"}, "rate must be positive"),
        ({"reconstruct": 1, "samples": 1}, "needs 2 windows a process"),
    ],
)
def test_bad_options_are_refused_in_words_and_leave_nothing(options, message, tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(UserError) as refused:
        prune(source, tmp_path / "out", calibration=text, **{**RUN, **options})
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_report_shows_what_reconstruction_did(tmp_path, text):
    source = save_tiny("llama", tmp_path / "source")
    prune(source, tmp_path / "out", calibration=text, reconstruct=1, set=("reconstruct.rate=0.01",), **RUN)
    report = read_report(tmp_path / "out")
    assert report["seconds"]["reconstruct"] > 0 and report["options"]["reconstruct"] == 1
    assert {r["block_error"]["epoch"] for r in report["weights"]} <= {0, 1}
