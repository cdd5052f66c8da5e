"""The search of an allocation: generations, trials, and interruptions."""

import random
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse import plugins
from llmsparse.allocate import target_of
from llmsparse.allocation import Choice, Memory
from llmsparse.allocators import search
from llmsparse.allocators.search import Mutations, Search
from llmsparse.dense_model import DenseModel
from llmsparse.errors import UserError
from llmsparse.pattern import parse
from llmsparse.plan import prepare
from llmsparse.recipe import Recipe
from llmsparse.trial import Rebuilding, Source, Trial
from tests.allocators.tiny_runs import run, settings
from tests.pruned import SMALL, hashes, read_report


def small(llama, text, **options):
    recipe = Recipe.of(
        None, {"calibration": text, "pattern": "60%", "allocate": "search", **SMALL, **options}
    )
    job = prepare(llama, recipe)
    return DenseModel(job, job.calibrate().windows), target_of(job, {})


def test_a_trial_has_the_divergence_of_such_a_model_in_transformers(llama, text):
    dense, target = small(llama, text)
    levels, windows = target.levels(), dense.windows[-2:]
    choices = {name: Choice(12 + i % 7, i % 3) for i, name in enumerate(levels)}
    sources = {
        name: Source(torch.rand(each.weight.in_features) + 0.1, False) for name, each in levels.items()
    }
    with dense.whole() as model:
        trial = Trial(dense.job.skeleton, model, windows, Rebuilding(levels, sources, 0))
        assert trial.divergence() == 0.0
        trial.put(choices)
        found = trial.divergence()
        with trial.tried({**choices, next(iter(levels)): Choice(30)}):
            assert trial.divergence(found / 2) == float("inf") != found
        assert trial.divergence() == found
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    pruned = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, choice in choices.items():
        weight = pruned.get_parameter(name).data
        scores = weight.square() * sources[name].importance
        lost = scores.flatten().argsort()[: choice.parts * weight.shape[0] - choice.fewer]
        weight.view(-1)[lost] = 0.0
    with torch.no_grad():
        true, now = (m(windows).logits.double().log_softmax(-1) for m in (whole, pruned))
    assert found == pytest.approx(float((true.exp() * (true - now)).sum(-1).mean()), rel=1e-4)
    assert all(p.is_meta for p in dense.job.skeleton.model.parameters())


def test_generations_never_diverge_further_and_the_last_is_the_report(llama, tmp_path, text):
    report, _ = run(llama, tmp_path / "out", text, pattern="60%", **settings("search"))
    history = report["allocation"]["kl"]
    assert len(history) == 4 and history == sorted(history, reverse=True) and history[-1] < history[0]


@pytest.mark.parametrize("pattern", ["60%", "4:8"])
def test_the_first_parent_is_no_further_than_the_uniform_allocation(
    pattern, llama, tmp_path, text, monkeypatch
):
    tried = []
    monkeypatch.setattr(
        search, "fittest", lambda trial, parent, least, children: tried.append(children) or (children[0], 0.5)
    )
    report, _ = run(llama, tmp_path / "out", text, pattern=pattern, **settings("search"))
    assert report["allocation"]["kl"][0] == 0.5  # of the child, which then was the parent
    (uniform,) = tried[0]
    dense, target = small(llama, text, pattern=pattern)
    levels = target.levels()
    for name, choice in uniform.items():
        each = levels[name]
        asked = 0.6 if pattern == "60%" else 0.5
        assert choice.parts == pytest.approx(asked * each.of, abs=2)


@pytest.mark.parametrize("budget", ["parameters", "bytes"])
def test_every_child_costs_what_its_parent_does(budget, llama, text):
    dense, target = small(llama, text, budget=budget)
    levels = target.levels(0.1)
    error = plugins.load("allocators", "error").allocator()
    parent = error.choose(dense, target, levels)
    total = sum(target.cost(name, levels[name].at(choice)) for name, choice in parent.items())
    changed = 0
    for seed in range(30):
        child = Mutations(target, levels, 0.02).child(parent, random.Random(seed))
        changed += child != parent
        cost = sum(target.cost(name, levels[name].at(choice)) for name, choice in child.items())
        assert cost == total if budget == "parameters" else cost <= target.asked(parse("60%"))
        for name, choice in child.items():
            assert levels[name].low <= choice.parts <= levels[name].parts[-1]
    assert changed >= 25


def test_a_search_killed_in_any_generation_goes_on_to_the_same_bytes(llama, tmp_path, text, monkeypatch):
    options = {"pattern": "60%", **settings("search")}
    whole, _ = run(llama, tmp_path / "expected", text, **options)
    real, calls = search.fittest, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(search, "fittest", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", text, **options)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", text, resume=True, **options)
    report, _ = run(llama, tmp_path / "out", text, resume=True, **options)
    assert len(calls) == 6  # the first judgement and three generations, two of the four begun twice
    assert report["allocation"]["kl"] == whole["allocation"]["kl"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (tmp_path / "expected").iterdir()
    }


@pytest.mark.parametrize("allocator", ["error", "search"])
def test_a_run_killed_after_the_division_divides_nothing_again(allocator, llama, tmp_path, text, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    options = {"pattern": "60%", **settings(allocator)}
    run(llama, tmp_path / "expected", text, **options)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["llmsparse.prune"], "solve_block", killed)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", text, **options)
    monkeypatch.setattr(DenseModel, "observe", None)
    report, _ = run(llama, tmp_path / "out", text, resume=True, **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")
    assert report["allocation"]["got"] == read_report(tmp_path / "expected")["allocation"]["got"]
    with pytest.raises(UserError, match="not empty"):
        run(llama, tmp_path / "out", text, **options)


def test_a_seed_gives_the_same_search_and_another_one_another(llama, text):
    found = []
    for seed in (0, 0, 1):
        dense, target = small(llama, text, seed=seed)
        found.append(Search(2, 3, 1, refit=0, windows=2)(dense, target, Memory()))
    assert found[0] == found[1] != found[2]
