"""Allocators on tiny models, from the text to the zeros that are written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmsparse.allocate import target_of
from llmsparse.allocation import Choice
from llmsparse.allocators.error import importance, steps
from llmsparse.allocators.owl import count, spread
from llmsparse.cli import app
from llmsparse.dense_model import DenseModel
from llmsparse.errors import UserError
from llmsparse.pattern import NM, Unstructured, parse
from llmsparse.plan import plan, prepare
from llmsparse.recipe import Recipe
from llmsparse.report import relative_error
from llmsparse.statistics import Gram, SquaredNorm
from tests.allocators.tiny_runs import DIVIDING, run, settings
from tests.pruned import SMALL, hashes, read_report, tensors
from tests.tiny import save_tiny


def zeros(folder, report):
    """Zeros of the pruned weights as they lie on disk, and how many weights those are."""
    written = tensors(folder)
    found = [written[w["name"].partition("[")[0]] for w in report["weights"]]
    return sum(int((t == 0).sum()) for t in found), sum(t.numel() for t in found)


# What is written


@pytest.mark.parametrize("allocator", DIVIDING)
@pytest.mark.parametrize(("pattern", "share"), [("60%", 0.6), ("2:4", 0.5)])
def test_the_zeros_on_disk_are_exactly_as_many_as_were_asked_for(
    allocator, pattern, share, llama, tmp_path, text
):
    report, weights = run(llama, tmp_path / "out", text, pattern=pattern, **settings(allocator))
    found, size = zeros(tmp_path / "out", report)
    assert found == round(share * size)
    told = read_report(tmp_path / "out")["allocation"]
    assert (told["allocator"], told["budget"], told["asked"], told["got"]) == (
        allocator,
        "parameters",
        found,
        found,
    )
    assert told["seconds"] > 0 and not report["warnings"]
    patterns = {w["pattern"] for w in weights.values()}
    if (allocator, pattern) == ("owl", "2:4"):  # its blocks differ by less than half a step
        assert patterns == {"2:4"}
    elif (allocator, pattern) != (
        "search",
        "2:4",
    ):  # which finds nothing nearer than uniform in three generations
        assert len(patterns) > 2
    assert {m for _, colon, m in (p.partition(":") for p in patterns)} <= {"", "4"}


@pytest.mark.parametrize("solver", ["wanda", "magnitude", "refit:ria"])
def test_solvers_that_count_rows_or_need_no_data_prune_the_same_total(solver, llama, tmp_path, text):
    report, weights = run(llama, tmp_path / "out", text, pattern="62.5%", solver=solver, allocate="error")
    found, size = zeros(tmp_path / "out", report)
    assert found == report["allocation"]["got"] == round(0.625 * size)
    assert len({w["pattern"] for w in weights.values()}) > 2
    assert report["calibration"]["samples"] == SMALL["samples"]


def test_a_total_that_whole_rows_cannot_meet_is_told(llama, tmp_path, text):
    report, _ = run(llama, tmp_path / "out", text, pattern="61.7%", scope="row", allocate="error")
    told = report["allocation"]
    assert told["got"] == zeros(tmp_path / "out", report)[0]
    assert 0 < told["got"] - told["asked"] < 16  # below the fewest rows of any weight
    assert "weights were to be pruned" in report["warnings"][0]


@pytest.mark.parametrize("allocator", DIVIDING)
def test_experts_of_a_mixture_share_the_budget(allocator, tmp_path, text):
    source = save_tiny("mixtral", tmp_path / "source")
    report, weights = run(source, tmp_path / "out", text, include="lm_head", **settings(allocator))
    found, size = zeros(tmp_path / "out", report)
    assert found == round(0.5 * size) == report["allocation"]["got"]
    assert len({w["pattern"] for name, w in weights.items() if "experts" in name}) > 1


def test_rules_keep_their_own_budgets_and_as_is_is_left_alone(llama, tmp_path, text):
    rules = ("50%", "self_attn=4:8", "v_proj=as-is", r"layers\.2=30%")
    report, weights = run(
        llama, tmp_path / "out", text, pattern=rules, skip=r"layers\.1.*o_proj", allocate="error", set="allocate.bound=0.3"
    )  # fmt: skip
    written = tensors(tmp_path / "out")
    assert not any("layers.1.self_attn.o_proj" in name for name in weights)
    kinds = {"layers.2": 0.3, "v_proj": 0.0, "self_attn": 0.5, "mlp": 0.5}
    groups: dict[str, list] = {kind: [] for kind in kinds}
    for name in weights:
        groups[next(kind for kind in kinds if kind in name)].append(name)
    for kind, names in groups.items():
        dense = sum(written[name].numel() for name in names)
        assert sum(int((written[name] == 0).sum()) for name in names) == round(kinds[kind] * dense)
        assert (len({weights[name]["pattern"] for name in names}) == 1) == (kind == "v_proj")
    assert {weights[name]["pattern"].partition(":")[2] for name in groups["self_attn"]} == {"8"}
    asked = sum(
        round(share * sum(written[n].numel() for n in groups[kind])) for kind, share in kinds.items() if share
    )
    assert report["allocation"]["asked"] == report["allocation"]["got"] == asked


def test_uniform_takes_no_pass_and_writes_what_no_allocator_writes(llama, tmp_path, text, monkeypatch):
    options = {"pattern": ("60%", "mlp=2:4"), "values": "int8"}
    run(llama, tmp_path / "plain", text, **options)
    monkeypatch.setattr(DenseModel, "observe", None)
    report, weights = run(llama, tmp_path / "named", text, allocate="uniform", **options)
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "named")
    assert {w["pattern"] for w in weights.values()} == {"60%", "2:4"}
    assert "allocation" not in report and "allocate" not in report["seconds"]


# Budgets


@pytest.mark.parametrize(
    ("budget", "pattern", "values", "allocator"),
    [
        ("bytes", "60%", None, "search"),
        ("bytes", "2:4", "int4:32", "error"),
        ("time", "60%", None, "error"),
        ("time", "2:4", None, "search"),
    ],
)
def test_bytes_and_time_stay_within_a_step_of_the_budget(
    budget, pattern, values, allocator, llama, tmp_path, text, monkeypatch
):
    seconds = {"64x32 bf16": [1.0, 2.0, 3.0, 4.5, 8.0], "32x64 bf16": [0.5, 1.0, 2.5, 3.0, 9.0]}
    times = {**seconds, **dict.fromkeys(("32x32 bf16", "16x32 bf16"), [0.5, 0.8, 1.1, 1.4, 1.7])}
    monkeypatch.setattr("llmsparse.allocate.measured", lambda weights, kinds: times)
    options = {"pattern": pattern, "values": values, "budget": budget, **settings(allocator)}
    report, weights = run(llama, tmp_path / "out", text, **options)
    told = report["allocation"]
    job = prepare(llama, Recipe.of(None, {**SMALL, "calibration": text, **options}))
    target = target_of(job, times)
    asked = target.asked(parse(pattern))
    got = sum(target.cost(name, parse(w["pattern"])) for name, w in weights.items())
    assert told["asked"] == pytest.approx(asked) and told["got"] == pytest.approx(got, rel=1e-6)
    assert told["got"] <= told["asked"]
    if (allocator, pattern) != ("search", "2:4"):  # as above
        assert len({w["pattern"] for w in weights.values()}) > 1
    for name, levels in target.levels(0.1).items():
        costs = [target.cost(name, levels.at(Choice(int(parts)))) for parts in levels.parts]
        mine = target.cost(name, parse(weights[name]["pattern"]))
        denser = [cost for cost in costs if cost > mine + 1e-9]
        assert not denser or min(denser) - mine > told["asked"] - told["got"] - 1e-9


def test_a_packed_product_is_timed_at_every_density(llama, tmp_path, text):
    from llmsparse.kernels.cpu import library

    if library.used() is None:
        with pytest.raises(UserError, match="no native kernel runs here"):
            run(llama, tmp_path / "out", text, allocate="error", budget="time")
        return
    report, _ = run(llama, tmp_path / "out", text, allocate="error", budget="time")
    assert 0 < report["allocation"]["got"] <= report["allocation"]["asked"] < 1


# Owl


def test_outliers_are_counted_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(6, 10, generator=generator) ** 3, torch.rand(10, generator=generator) * 9
    scores = [[abs(float(weight[i, j])) * float(squares[j]) ** 0.5 for j in range(10)] for i in range(6)]
    mean = sum(map(sum, scores)) / 60
    for outlier in (1.0, 2.0, 3.0):
        expected = sum(score > outlier * mean for row in scores for score in row)
        assert count(weight, SquaredNorm(squares * 7, 7), outlier) == expected > 0
    assert count(weight, None, 2.0) == int((weight.abs() > 2 * weight.abs().mean()).sum())


def test_ratios_are_stretched_and_their_weighted_mean_is_taken_off():
    found = spread({0: 0.1, 1: 0.3, 2: 0.2}, {0: 10, 1: 10, 2: 20}, 0.08)
    assert found == pytest.approx({0: -0.08, 1: 0.08, 2: 0.0})
    assert spread({0: 0.1, None: 0.1}, {0: 1, None: 2}, 0.08) == {0: 0.0, None: 0.0}


def test_a_block_with_more_outliers_is_pruned_less(llama, tmp_path, text):
    source, file = save_tiny("llama", tmp_path / "source"), tmp_path / "source" / "model.safetensors"
    held = load_file(file)
    for name, tensor in held.items():
        share = {"layers.0.": 0.02, "layers.1.": 0.06}.get(name[6:15], 0.0)
        if tensor.dim() == 2 and share:
            generator = torch.Generator().manual_seed(len(name))
            tensor[torch.rand(tensor.shape, generator=generator) < share] *= 8
    save_file(held, file, metadata={"format": "pt"})
    _, weights = run(source, tmp_path / "out", text, pattern="60%", allocate="owl")
    means = []
    for block in range(3):
        mine = [w for name, w in weights.items() if f"layers.{block}." in name]
        sizes = [w["shape"][0] * w["shape"][1] for w in mine]
        means.append(sum(w["sparsity"] * s for w, s in zip(mine, sizes, strict=True)) / sum(sizes))
    assert means[1] < means[0] < means[2]
    assert max(means) - min(means) == pytest.approx(0.16, abs=0.01)  # 2 x spread


# Error


@pytest.mark.parametrize("pattern", ["row", "layer", "1:4"])
def test_on_independent_inputs_the_curve_is_the_error_that_masks_leave(pattern):
    generator = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(6, 12, generator=generator), torch.rand(12, generator=generator) + 0.1
    statistics = SquaredNorm(squares * 5, 5)
    scores = weight.square() * importance(statistics, 12, 0.01)
    chosen = NM(1, 4) if ":" in pattern else Unstructured(0.5, pattern)
    found = steps(scores, chosen, pattern == "row").cumsum() / float(scores.double().sum())
    for parts in range(1, 4 if ":" in pattern else 12):
        asked = NM(4 - parts, 4) if ":" in pattern else Unstructured(parts / 12, pattern)
        pruned = weight.masked_fill(~asked.select(scores), 0.0)
        assert found[parts - 1] == pytest.approx(relative_error(weight, pruned, statistics), rel=1e-5)
    assert found[-1] == pytest.approx(1.0)


def test_a_block_counts_as_much_as_it_adds_to_the_hidden_states_of_the_model_in_transformers(llama, text):
    job = prepare(llama, Recipe.of(None, {"calibration": text, **SMALL}))
    windows = job.calibrate().windows
    found = DenseModel(job, windows).observe({}, len(windows), lambda *seen: None)
    model = AutoModelForCausalLM.from_pretrained(llama)
    states = []
    for block in model.model.layers:
        block.register_forward_hook(lambda block, given, output: states.append((given[0][0], output[0])))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for index in range(3):
        each = [
            float((after - before).norm() ** 2 / after.norm() ** 2)
            for first, last in states[index::3]
            for before, after in zip(first, last.reshape(first.shape), strict=True)
        ]
        assert found[index] == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found[None] == 1.0


def test_a_block_that_adds_little_is_pruned_more(tmp_path, text):
    source, file = save_tiny("llama", tmp_path / "source"), tmp_path / "source" / "model.safetensors"
    held = load_file(file)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        held[f"model.layers.1.{name}.weight"] *= 0.05  # no weight's relative error changes
    save_file(held, file, metadata={"format": "pt"})
    report, weights = run(source, tmp_path / "out", text, pattern="60%", allocate="error")
    means = [
        sum(w["sparsity"] for name, w in weights.items() if f"layers.{block}." in name) / 7
        for block in range(3)
    ]
    assert means[1] == pytest.approx(0.7, abs=0.02) and max(means[0], means[2]) < 0.6  # the bound is 0.1


def test_the_importance_of_an_input_is_what_later_ones_cannot_make_up_for():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    inputs[:, 4] = 0.0
    gram = Gram.zeros(6)
    gram.update(inputs)
    damped = (inputs.double().T @ inputs.double()) / 40
    damped.diagonal()[4] = 1.0
    damped += 0.01 * torch.eye(6) * float(gram.matrix.diagonal().mean())
    found = importance(gram, 6, 0.01)
    for j in range(6):  # the error of w_j = 1 alone, when all inputs after j may change: a Schur complement
        rest = damped[j + 1 :, j + 1 :]
        best = damped[j, j] - damped[j, j + 1 :] @ torch.linalg.solve(rest, damped[j + 1 :, j])
        assert float(found[j]) == pytest.approx(0.0 if j == 4 else float(best), rel=1e-4)
    assert torch.equal(importance(None, 3, 0.01), torch.ones(3))


# What a user may get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allocate", "best"], "allocator 'best' is unknown; known: error, owl, search, uniform"),
        (["--allocate", "error", "--set", "allocate.reach=1"], "error has no such option; it has bound, damping, windows"),
        (["--set", "allocate.bound=0.1"], "uniform has no such option; it has none"),
        (["--allocate", "error", "--set", "allocate.bound=0"], "allocate.bound=0: error needs a number above 0"),
        (["--allocate", "owl", "--set", "allocate.windows=a"], "allocate.windows=a: owl cannot use it"),
        (["--allocate", "search", "--set", "allocate.refit=-1"], "search needs a number of steps, or 0 for none"),
        (["--budget", "flops"], "--budget flops is unknown; use parameters, bytes, time"),
        (["--budget", "bytes"], "--budget bytes is what an allocator divides; give --allocate"),
        (["--allocate", "error", "--pattern", "as-is", "--values", "int8"], "no two weights share a pattern"),
        (["--allocate", "error", "--pattern", "1%"], "pattern 1% cannot be divided among its 21 weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_cannot_be_is_said_and_nothing_is_written(options, message, llama, tmp_path, text):
    given = [
        "prune",
        str(llama),
        str(tmp_path / "out"),
        "--calibration",
        text,
        "--samples",
        "6",
        "--sequence-length",
        "32",
    ]
    result = CliRunner().invoke(app, [*given, *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_allocator_of_ones_own_is_an_object(llama, tmp_path, text):
    class Half:
        windows = 0

        def __call__(self, dense, target, memory):
            first, second, *_ = target.weights
            return {**target.patterns, first: Unstructured(0.25), second: Unstructured(0.75)}

        def __str__(self):
            return "half"

    report, weights = run(llama, tmp_path / "out", text, solver="magnitude", allocate=Half())
    assert [w["pattern"] for w in weights.values()][:3] == ["25%", "75%", "50%"]
    assert report["options"]["allocate"] == "half" and report["calibration"] is None


def test_the_plan_says_that_patterns_will_be_divided(llama, text):
    given = {"solver": "sparsegpt", "samples": 1, "sequence_length": 8, "batch_size": 1}
    found = plan(llama, calibration=text, allocate="search", **given)
    assert "search will divide them" in found["warnings"][0]
    hidden = 8 * 32 * 4  # a window's states; the model in float32 twice is more than all else
    assert found["peak_host_bytes"] == 2 * 4 * found["coverage"]["all_parameters"] + hidden
    assert {w["pattern"] for w in found["weights"]} == {"50% (keeps 50 %)"}
