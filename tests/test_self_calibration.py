"""Calibration text that the model writes itself: drawn from its own distribution, the same for a seed."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsparse.calibration import calibrate, interleave
from llmsparse.checkpoint import Checkpoint
from llmsparse.errors import UserError
from llmsparse.plan import plan
from llmsparse.progress import Quiet
from llmsparse.prune import prune
from llmsparse.sampling import Sampler, Sampling
from llmsparse.writer import Writer
from tests.pruned import SMALL, hashes, read_report
from tests.tiny import BOS, EOS, SPECIAL, VOCAB, save_tiny, tokenizer
from tests.tokenizers_tiny import word_tokenizer

CPU = torch.device("cpu")


def sampler_of(folder, batch_size=8, **options):
    return Sampler(
        Checkpoint.open(folder), Sampling(**options), torch.float32, CPU, False, batch_size, Quiet()
    )


def windows_of(folder, words, samples=6, length=12, seed=0, source="self", **options):
    return calibrate(
        source, words, samples=samples, sequence_length=length, seed=seed, vocab_size=VOCAB,
        sampler=sampler_of(folder, **options),
    )  # fmt: skip


def logits_of(folder, ids):
    """Of the token after ``ids`` (windows, any), by the model in memory and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1].double()


def deviation(tokens, chances):
    """Chi-square over its degrees of freedom, of tokens against ``chances`` (vocabulary,), rare ones taken together."""
    counts = torch.bincount(tokens, minlength=len(chances)).double()
    expected = chances * len(tokens)
    common = expected >= 8
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None].clamp(min=1e-9)))
    return float(((seen - wanted).square() / wanted).sum()) / int(common.sum())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt2", "qwen3_moe"])
def test_windows_are_what_a_plain_loop_without_a_cache_draws(family, tmp_path):
    source = save_tiny(family, tmp_path / "source")
    found = windows_of(source, tokenizer(), samples=5, length=14, seed=3, batch_size=2, temperature=0.8)
    uniforms = torch.rand(5, 13, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.full((5, 1), BOS)
    for uniform in uniforms.T:
        summed = (logits_of(source, expected) / 0.8).softmax(-1).cumsum(-1)
        following = (summed <= uniform[:, None]).sum(-1)
        expected = torch.cat((expected, following[:, None]), 1)
    assert torch.equal(found.windows, expected)
    assert found.sha256 == hashlib.sha256(expected.numpy().astype("<i4").tobytes()).hexdigest()
    about = {"temperature": 0.8, "top_k": 0, "seed": 3}
    assert found.sources == [{"source": "self", "weight": 1.0, "tokens": 65, **about}]


def test_tokens_are_drawn_from_the_models_distribution_at_the_temperature(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    logits = logits_of(source, torch.tensor([[BOS]]))[0]
    tokens = windows_of(source, tokenizer(), 6000, 2, batch_size=6000, temperature=0.7).windows[:, 1]
    assert deviation(tokens, (logits / 0.7).softmax(-1)) < 1.5
    assert deviation(tokens, logits.softmax(-1)) > 5


def test_later_tokens_follow_from_those_before(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    windows = windows_of(source, tokenizer(), 6000, 3, batch_size=6000, temperature=0.5).windows
    first = int(windows[:, 1].mode().values)
    following = windows[windows[:, 1] == first, 2]
    assert len(following) > 500
    after = [
        logits_of(source, torch.tensor([[BOS, token]]))[0] / 0.5 for token in (first, (first + 1) % VOCAB)
    ]
    assert deviation(following, after[0].softmax(-1)) < 1.6 < 5 < deviation(following, after[1].softmax(-1))


def test_without_a_prefix_the_first_token_is_drawn_as_the_one_after_eos(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    tokens = windows_of(source, word_tokenizer(), 6000, 2, batch_size=6000).windows[:, 0]
    assert deviation(tokens, logits_of(source, torch.tensor([[EOS]]))[0].softmax(-1)) < 1.5


def test_without_prefix_and_eos_the_first_token_is_any_that_is_not_special(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    words = word_tokenizer(eos=False)
    tokens = windows_of(source, words, 6000, 2, batch_size=6000).windows[:, 0]
    plain = torch.tensor([float(i < len(words) and i not in words.all_special_ids) for i in range(VOCAB)])
    assert deviation(tokens, plain / plain.sum()) < 1.5
    assert set(tokens.tolist()) == set(plain.nonzero().flatten().tolist())


def test_an_eos_is_kept_and_text_goes_on_after_it(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    rows = windows_of(source, tokenizer(), 200, 30, batch_size=200).windows
    inside = (rows[:, :-1] == EOS).nonzero()
    assert len(inside) and rows.shape == (200, 30) and (rows[:, 0] == BOS).all()
    following = {int(rows[i, j + 1]) for i, j in inside}
    assert following - set(range(len(SPECIAL)))  # neither padding nor EOS again and again


def test_only_the_likeliest_tokens_come_with_top_k(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    best = logits_of(source, torch.tensor([[BOS]]))[0].topk(3).indices.tolist()
    tokens = windows_of(source, tokenizer(), 300, 2, batch_size=300, top_k=3).windows[:, 1]
    assert set(tokens.tolist()) == set(best)


def test_windows_depend_on_the_seed_and_not_on_how_many_are_written_at_once(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    first = windows_of(source, tokenizer())
    assert torch.equal(first.windows, windows_of(source, tokenizer(), batch_size=1).windows)
    assert not torch.equal(first.windows, windows_of(source, tokenizer(), seed=1).windows)
    torch.manual_seed(7)
    assert torch.equal(first.windows, windows_of(source, tokenizer()).windows)
    write, sizes = Sampler._follow, []

    def small(self, model, start, uniforms):
        sizes.append(len(start))
        if len(start) > 2:
            raise torch.OutOfMemoryError
        return write(self, model, start, uniforms)

    monkeypatch.setattr(Sampler, "_follow", small)
    assert torch.equal(first.windows, windows_of(source, tokenizer()).windows)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]


def test_memory_for_not_one_window_is_one_clear_error(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")

    def none(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Sampler, "_follow", none)
    with pytest.raises(UserError, match="while the model writes one window; use a shorter --sequence-length"):
        windows_of(source, tokenizer())


def test_mixtures_interleave_as_files_do(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "a" * 40}) + "\n" for _ in range(20)))
    mixed = windows_of(source, tokenizer(), 8, 10, source=f"{file}=1,self=3")
    alone = windows_of(source, tokenizer(), 6, 10)
    letter = tokenizer()("a", add_special_tokens=False)["input_ids"][0]
    order = [i for i, _ in interleave([2, 6])]
    written = [row for row, i in zip(mixed.windows, order, strict=True) if i == 1]
    assert torch.equal(torch.stack(written), alone.windows)
    read = torch.stack([row for row, i in zip(mixed.windows, order, strict=True) if i == 0])
    assert set(read[:, 1:].flatten().tolist()) <= {letter, EOS}
    assert [(s["source"], s["weight"], s["tokens"]) for s in mixed.sources] == [
        (str(file), 0.25, 18),
        ("self", 0.75, 54),
    ]


def test_a_file_that_is_too_short_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    source, file = save_tiny("llama", tmp_path / "source"), tmp_path / "short.txt"
    file.write_text("short")
    monkeypatch.setattr("llmsparse.sampling.load_model", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"short.txt has 5 tokens"):
        windows_of(source, tokenizer(), source=f"self=0.5,{file}=0.5")


def test_a_run_on_its_own_text_says_so_and_resumes_to_identical_bytes(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    given = {"calibration": "self", "set": ["self.temperature=0.9"], "pattern": "2:4", **SMALL}
    prune(source, tmp_path / "expected", **given)
    told = read_report(tmp_path / "expected")["calibration"]
    sampled = windows_of(source, tokenizer(), 6, 32, temperature=0.9)
    assert told["tokens_sha256"] == sampled.sha256 and told["sources"] == sampled.sources
    real, done = Writer.finish_block, []

    def cut(self, block, record):
        real(self, block, record)
        done.append(block)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish_block", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", **given)
    prune(source, tmp_path / "out", resume=True, **given)
    assert len(done) == 3  # of three blocks the last alone was solved again
    assert hashes(tmp_path / "out") == hashes(tmp_path / "expected")


def test_a_plan_loads_no_model_and_reads_the_other_sources(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr("llmsparse.sampling.load_model", lambda *a: pytest.fail("the model was loaded"))
    planned = plan(source, calibration="self")
    assert planned["calibration"] == "self, 64 x 128, sampled from the model"
    assert planned["tokens_sha256"] is None
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match=r"short.txt has 5 tokens"):
        plan(source, calibration=f"self=0.5,{tmp_path}/short.txt=0.5")


def test_self_is_the_model_even_where_a_file_has_that_name(tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "a.txt").write_text("a" * 400)
    assert [s["source"] for s in windows_of(source, tokenizer()).sources] == ["self"]
    assert windows_of(source, tokenizer(), source="./self").sources[0]["documents"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": ["self.temperature=0"]}, r"self.temperature=0: it must be above 0; 1 is the model's own"),
        ({"set": ["self.temperature=warm"]}, r"--set self...: .* not supported"),
        ({"set": ["self.top_k=-1"]}, r"self.top_k=-1: it must be a number of tokens, or 0 for any"),
        ({"set": ["self.top_p=0.9"]}, r"self.top_p: there is no such option; known: temperature, top_k"),
        ({"set": ["self.top_k=5"], "calibration": "builtin"}, r"self.top_k goes with --calibration self"),
        ({"calibration": "self=1,self=2"}, "names self twice"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(options, message, tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr("llmsparse.sampling.load_model", lambda *a: pytest.fail("the model was loaded"))
    for call in (lambda **o: plan(source, **o), lambda **o: prune(source, tmp_path / "out", **o)):
        with pytest.raises(UserError, match=message):
            call(**{"calibration": "self", **SMALL, **options})


def test_a_model_without_finite_logits_is_refused(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    sampler = sampler_of(source)
    with pytest.raises(UserError, match="cannot write text: its logits are not finite; use --dtype float32"):
        sampler.options.draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]))
