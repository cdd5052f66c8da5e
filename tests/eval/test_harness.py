"""Shared prefixes give lm-evaluation-harness's own answers, in every family, or are not used."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from llmsparse.errors import UserError
from tests.tiny import FAMILIES, VOCAB, save_tiny
from tests.tiny import tokenizer as tiny_tokenizer
from tests.tokenizers_tiny import word_tokenizer

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'llmsparse[eval]')"
)

from lm_eval.models.huggingface import HFLM

from llmsparse.eval import harness as module
from llmsparse.eval.harness import SharedPrefixLM
from llmsparse.eval.tasksource import find_tasks, load_tasks


def items(count: int = 8, seed: int = 0) -> list[SimpleNamespace]:
    """Requests of ``count`` items: a context with two to four continuations, one item of single tokens."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(least, most)))

    found = []
    for number in range(count):
        context = text(10, 30) + "."
        choices = ["x", "y", "z"] if number == 0 else [text(1, 12) for _ in range(draw.randint(2, 4))]
        found += [SimpleNamespace(args=(context, " " + choice)) for choice in choices]
    return found


def answers(model, tokenizer, requests, **options):
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    shared = SharedPrefixLM(model, tokenizer, batch_tokens=256, name="tiny", **options)
    with torch.no_grad():
        return plain.loglikelihood(requests, disable_tqdm=True), shared.loglikelihood(requests), shared


def assert_equal(plain, shared, bound: float = 1e-3) -> None:
    for one, two in zip(plain, shared, strict=True):
        assert two[0] == pytest.approx(one[0], abs=bound) and one[1] == two[1]


@pytest.fixture(params=list(FAMILIES))
def family(request, tmp_path):
    folder = save_tiny(request.param, tmp_path / request.param)
    return request.param, AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()


def test_every_family_answers_as_the_harness_does(family):
    name, model, tokenizer = family
    requests = items()
    plain, found, runner = answers(model, tokenizer, requests)
    assert_equal(plain, found)
    window = getattr(model.config, "sliding_window", None)
    assert runner.shares is (None if window == 8 else True), name  # longer than a window: each on its own


def test_paths_within_a_sliding_window_share_and_longer_ones_do_not(tmp_path):
    save_tiny("gemma3_text", tmp_path / "gemma")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma").eval()
    short = [SimpleNamespace(args=("abcd", " " + choice)) for choice in ("ab", "ba", "c")]
    plain, found, runner = answers(model, tiny_tokenizer(), [*short, *items(3)])
    assert runner.shares is True
    assert_equal(plain, found)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
        ),
    ],
    ids=["alibi", "recurrent"],
)
def test_models_that_cannot_keep_branches_apart_are_run_path_by_path(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain, found, runner = answers(model, tiny_tokenizer(), items())
    assert runner.shares is False
    assert_equal(plain, found)


def test_fewer_tokens_are_read_and_logits_are_taken_only_where_they_score(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    requests, read, scored = items(20), [], []
    model.model.register_forward_hook(
        lambda _, __, options, ___: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, __, out: scored.append(out.shape[:-1].numel()))
    runner = SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny")
    runner.loglikelihood(requests)
    tokens = [
        len(tiny_tokenizer()(context + choice)["input_ids"]) for context, choice in (r.args for r in requests)
    ]
    continuations = [len(choice) for _, choice in (r.args for r in requests)]
    assert sum(read) < 0.7 * sum(tokens)
    assert sum(scored) < 1.3 * sum(continuations)


def test_a_request_longer_than_the_model_loses_its_beginning_as_in_the_harness(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    requests = [SimpleNamespace(args=("abcdefgh" * 30, " " + choice)) for choice in ("ab", "ba")]
    plain, found, _ = answers(model, tiny_tokenizer(), requests)
    assert_equal(plain, found)


def test_a_context_without_tokens_begins_as_an_empty_one_does(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    plain = word_tokenizer()  # adds no BOS
    requests = [SimpleNamespace(args=(context, " w1 w2")) for context in ("", " ", "\n")]
    runner = SharedPrefixLM(model, plain, batch_tokens=256, name="tiny")
    first, *others = runner.loglikelihood(requests)
    assert others == [first, first]
    ids = torch.tensor([plain("<s> w1 w2")["input_ids"]])
    logs = model(ids).logits[0].log_softmax(-1)
    assert first[0] == pytest.approx((logs[0, ids[0, 1]] + logs[1, ids[0, 2]]).item(), abs=1e-4)


def test_long_contexts_share_too_when_their_choices_are_short(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    read = []
    model.model.register_forward_hook(
        lambda _, __, options, ___: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    requests = [SimpleNamespace(args=("abcdefgh" * 12, f" {letter}")) for letter in "abcd"]
    SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=16, name="tiny").loglikelihood(requests)
    assert sum(read) < 150


def test_layers_that_a_mask_does_not_reach_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTENTION", {"sliding_attention"})
    save_tiny("qwen3", tmp_path / "qwen3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3").eval()
    assert set(model.config.layer_types) == {"full_attention"}
    runner = SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny")
    runner.loglikelihood(items(3))
    assert runner.shares is False


def test_a_continuation_longer_than_the_model_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    runner = SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny")
    with pytest.raises(
        UserError, match="a continuation of 200 tokens cannot be scored by tiny, which has 128"
    ):
        runner.loglikelihood([SimpleNamespace(args=("a", "b" * 200))])


def test_rolling_requests_are_the_harness_s(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    requests = [SimpleNamespace(args=("abc de fgh " * 40,))]
    plain = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2)
    shared = SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny")
    with torch.no_grad():
        expected = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    assert shared.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-2)


def test_outputs_that_are_nan_name_the_layer(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    runner = SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny")
    with pytest.raises(
        UserError, match="outputs of tiny are NaN: the weights model.layers.1.mlp.up_proj.weight"
    ):
        runner.loglikelihood(items(2))


def test_the_bar_counts_requests(tmp_path):
    class Steps:
        total, done = 0, 0

        def start(self, phase, total):
            self.total = total

        def advance(self, phase, detail=""):
            self.done += 1

    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    steps, requests = Steps(), items(5)
    SharedPrefixLM(model, tiny_tokenizer(), batch_tokens=256, name="tiny", progress=steps).loglikelihood(
        requests
    )
    assert steps.total == steps.done == len(requests)


def test_a_probe_that_differs_turns_sharing_off(tmp_path, monkeypatch):
    def causal(branches, dtype):
        mask = torch.full((branches.shape[1],) * 2, torch.finfo(dtype).min, dtype=dtype).triu(1)
        return mask.expand(len(branches), 1, -1, -1)

    monkeypatch.setattr(module, "attention_mask", causal)
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "llama")).eval()
    plain, found, runner = answers(model, tiny_tokenizer(), items())
    assert runner.shares is False
    assert_equal(plain, found)


def test_smollm2_answers_real_items_as_the_harness_does(smollm2, data_folder):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tasks = load_tasks(
        find_tasks("hellaswag,winogrande,arc_easy,lambada_openai,copa", data_folder / "zeroshot")
    )
    requests = []
    for task in tasks["tasks"].values():
        task.build_all_requests(limit=4, rank=0, world_size=1)
        requests += task.instances
    plain, found, runner = answers(model, AutoTokenizer.from_pretrained(smollm2), requests)
    assert runner.shares is True
    assert_equal(plain, found)
