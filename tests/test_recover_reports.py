"""What reports, cards and terminals tell of a recovery."""

import shlex

import pytest
import torch

from llmsparse.apart import held_apart, held_of
from llmsparse.calibration import calibrate
from llmsparse.card import card
from llmsparse.command import command_of, commands_of_recovery
from llmsparse.figures import count
from llmsparse.page import report as pages
from llmsparse.prune import prune
from llmsparse.quantize import quantize
from llmsparse.recover import recover
from tests.pruned import SMALL, read_report
from tests.tiny import save_tiny, tokenizer


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    place = tmp_path_factory.mktemp("recovered")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    options = {"calibration": str(place / "text.txt"), **SMALL}
    prune(save_tiny("llama", place / "dense"), place / "sparse", pattern="2:4", solver="wanda", **options)
    little = {"tokens": "2k", "sequence_length": 32, "lr": 1e-3, "device": "cpu", "dtype": "float32"}
    recover(
        place / "sparse",
        place / "out",
        data=str(place / "text.txt"),
        masks="splice",
        splice_every=2,
        **little,
    )
    return place


def test_a_page_shows_the_course_and_both_commands(recovered):
    pages([str(recovered / "out")], html=recovered / "page.html", markdown=recovered / "page.md")
    text, page = (recovered / "page.md").read_text(), (recovered / "page.html").read_text()
    found = read_report(recovered / "out")["recovery"]
    assert "## Recovery" in text and f"| {found['kl']['before']:.4g} | {found['kl']['after']:.4g} |" in text
    assert "because its weights were trained after they were pruned" in text
    assert "KL divergence on held-out text" in page and "nats a token" in page
    report = read_report(recovered / "out")
    pruning, (recovering,) = command_of(report), commands_of_recovery(report)
    assert pruning[:4] == ["llmsparse", "prune", str(recovered / "dense"), str(recovered / "sparse")]
    assert recovering[:4] == ["llmsparse", "recover", str(recovered / "sparse"), str(recovered / "out")]
    assert shlex.join(pruning) in text and shlex.join(recovering) in text
    assert "--masks splice" in shlex.join(recovering)


def test_a_card_tells_of_it_and_names_no_folder(recovered):
    text = card(recovered / "out")["card"]
    assert "then trained on 2.05k tokens of its dense parent's outputs" in text
    assert "llmsparse recover sparse out" in text and "windows held out" in text
    assert str(recovered) not in text


def test_every_run_on_the_way_is_told_with_what_it_began_with(recovered, tmp_path):
    text, coarse = str(recovered / "text.txt"), tmp_path / "coarse"
    quantize(recovered / "sparse", coarse, values="int8", calibration=text, **SMALL)
    little = {"tokens": "1k", "sequence_length": 32, "lr": 1e-3, "device": "cpu", "data": text}
    recover(coarse, tmp_path / "first", **little)
    recover(tmp_path / "first", tmp_path / "second", train="lora", **little)
    report = read_report(tmp_path / "second")
    assert report["model"] == str(recovered / "dense")
    assert command_of(report)[:4] == ["llmsparse", "prune", str(recovered / "sparse"), str(coarse)]
    first, second = commands_of_recovery(report)
    assert first[2:4] == [str(coarse), str(tmp_path / "first")] and "linears+norms" in first
    assert second[2:4] == [str(tmp_path / "first"), str(tmp_path / "second")] and "lora" in second
    pages([str(tmp_path / "second")], markdown=tmp_path / "page.md")
    page, shown = (tmp_path / "page.md").read_text(), card(tmp_path / "second")["card"]
    for words in (command_of(report), first, second):
        assert shlex.join(words) in page
    assert "second: recovery 1" in page and "second: recovery 2" in page
    assert "llmsparse recover coarse first" in shown and "llmsparse recover first second" in shown
    assert "The files of `sparse`, by sha256" in shown
    assert str(tmp_path) not in shown and str(recovered) not in shown


def test_a_model_without_a_report_gets_one(recovered, tmp_path):
    (recovered / "plain").mkdir(exist_ok=True)
    for file in (recovered / "sparse").iterdir():
        if file.name != "report.json":
            (recovered / "plain" / file.name).write_bytes(file.read_bytes())
    little = {"tokens": "1k", "sequence_length": 32, "lr": 1e-3, "device": "cpu"}
    text, dense = str(recovered / "text.txt"), str(recovered / "dense")
    recover(recovered / "plain", tmp_path / "out", teacher=dense, data=text, **little)
    pages([str(tmp_path / "out")], markdown=tmp_path / "page.md")
    shown = (tmp_path / "page.md").read_text()
    assert "llmsparse recover" in shown and "llmsparse prune" not in shown
    assert "llmsparse recover plain out" in card(tmp_path / "out")["card"]


@pytest.mark.parametrize("number", [2, 3, 17, 100, 1000])
def test_held_out_windows_lie_evenly_in_the_text_and_are_no_others(number):
    windows = torch.arange(number)[:, None]
    text = held_apart(windows, [0] * number)
    assert sorted(text.windows.flatten().tolist()) == list(range(number))
    held = text.windows[text.trained :].flatten()
    assert len(held) == text.held == held_of(round(number / (1 + 1 / 16))) and text.trained >= 1
    gaps = torch.tensor([-1, *held.tolist(), number]).diff()
    assert int(gaps.max() - gaps.min()) <= 2


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 1], [3, 1], [8, 4, 2, 1]], ids=str)
def test_each_of_several_sources_has_its_part_of_the_held_out_text(weights, tmp_path):
    for place, letter in enumerate("abcd"[: len(weights)]):
        (tmp_path / f"{place}.txt").write_text(letter * 40_000)
    source = ",".join(f"{tmp_path}/{place}.txt={weight}" for place, weight in enumerate(weights))
    text = calibrate(source, tokenizer(), samples=2080, sequence_length=8)
    parts = held_apart(text.windows, text.source_of)
    letters = parts.windows[:, -1]
    wanted = [32 * weight / sum(weights) for weight in weights]
    for found, of in ((letters[parts.trained :], 32), (letters, 2080)):
        counts = torch.unique(found, return_counts=True)[1]
        assert [int(n) * 32 / of for n in counts] == pytest.approx(wanted, abs=1.0)


def test_counts_are_short():
    assert [count(n) for n in (0, 512, 98_304, 1_048_576, 2 * 10**9)] == ["0", "512", "98.3k", "1.05M", "2B"]
