"""One evaluation end to end, on tiny checkpoints saved by transformers, and what it refuses."""

import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llmsparse.errors import UserError
from llmsparse.eval.evaluate import evaluate
from tests.tokenizers_tiny import word_tokenizer

VOCAB = 67
TEXT = " ".join(f"w{random.Random(i).randrange(61)}" for i in range(100))


def checkpoint(folder: Path, seed: int = 0, vocab: int = VOCAB, words: int = 61, bos: bool = False) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_tokenizer(words, bos=bos).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


class Steps:
    """A progress object that counts."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.details: list[str] = []

    def start(self, phase: str, total: int) -> None:
        self.started.append((phase, total))

    def advance(self, phase: str, detail: str = "") -> None:
        self.details.append(detail)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluate_reports_the_plain_loop_s_perplexity(model, text, batch_size):
    steps = Steps()
    whole = evaluate(model, text, context=16, device="cpu", batch_size=batch_size, progress=steps)
    (found,) = whole["sources"]
    ids = torch.tensor(word_tokenizer()(TEXT)["input_ids"][:96]).view(6, 16)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["standard_error"] == pytest.approx(
        math.exp(losses.mean()) * losses.mean(1).std().item() / math.sqrt(6), rel=1e-4
    )
    assert (found["windows"], found["tokens"], whole["context"]) == (6, 90, 16)
    assert found["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert whole["dtype"] == "float32" and whole["device"] == "cpu" and "torch" in whole["versions"]
    assert whole["model_bytes"] == (model / "model.safetensors").stat().st_size
    assert "kl" not in found and "tasks" not in whole
    assert steps.started == [(text, 6)] and len(steps.details) == 6
    assert steps.details[-1] == f"perplexity {found['perplexity']:.2f}"


def test_a_tokenizer_that_adds_bos_has_every_window_start_with_it(tmp_path, text):
    found = evaluate(checkpoint(tmp_path / "bos", bos=True), text, context=11, device="cpu")
    assert found["sources"][0]["windows"] == 10 and found["sources"][0]["tokens"] == 100
    assert found["bos"].startswith("<s> starts every window")


def test_against_gives_fidelity_and_the_dense_figures(model, tmp_path, text):
    other = checkpoint(tmp_path / "other", seed=1)
    whole = evaluate(other, text, context=16, windows=3, against=model, device="cpu")
    (found,) = whole["sources"]
    assert found["kl"] > 0.1 and found["kl_standard_error"] > 0
    assert found["top1_agreement"] < found["top5_agreement"] < 0.5
    (dense,) = evaluate(model, text, context=16, windows=3, device="cpu")["sources"]
    assert found["dense_perplexity"] == pytest.approx(dense["perplexity"])
    assert whole["against"] == str(model) and whole["against_bytes"] == whole["model_bytes"]
    (itself,) = evaluate(model, text, context=16, windows=3, against=model, device="cpu")["sources"]
    assert itself["kl"] == 0 and itself["top1_agreement"] == itself["top5_agreement"] == 1.0
    assert [(line["from"], line["to"], line["kl"]) for line in itself["positions"]] == [(1, 15, 0)]


def test_one_window_has_no_standard_error(model, text):
    (found,) = evaluate(model, text, context=16, windows=1, device="cpu")["sources"]
    assert found["standard_error"] is None and found["word_standard_error"] is None


def test_several_texts_are_rows_of_one_run(model, text, tmp_path):
    rows = [{"text": "w1 w2 w3 w4 w5 w6"}, {"text": "w7 w8 w9 w10 w11 w12"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = f"{text},{tmp_path / 'rows.jsonl'}"
    found = evaluate(model, both, context=8, device="cpu")["sources"]
    alone = [evaluate(model, name, context=8, device="cpu")["sources"][0] for name in both.split(",")]
    assert found == alone and [row["windows"] for row in found] == [12, 1]
    assert [row["words"] for row in found] == [84, 7]


def test_with_a_stride_every_token_is_scored_with_more_before_it(model, text):
    (found,) = evaluate(model, text, context=16, stride=4, device="cpu")["sources"]
    ids = torch.tensor(word_tokenizer()(TEXT)["input_ids"])
    loaded, total = AutoModelForCausalLM.from_pretrained(model), 0.0
    for end in range(16, 101, 4):
        first = 1 if end == 16 else 12
        with torch.no_grad():
            logits = loaded(ids[None, end - 16 : end]).logits[0, first - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, ids[end - 16 + first : end], reduction="sum")
        total += losses.item()
    assert found["tokens"] == 99
    assert found["perplexity"] == pytest.approx(math.exp(total / 99), rel=1e-5)


def test_results_are_written_whole_beside_nothing_else(model, text, tmp_path):
    (tmp_path / "out").mkdir()
    found = evaluate(model, text, context=16, windows=1, device="cpu", out=tmp_path / "out" / "eval.json")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["eval.json"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == found


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("absent/eval.json", "absent, which is no folder; make it first"),
        ("", "is a folder; name a file in it"),
    ],
)
def test_a_place_that_holds_no_file_is_refused_before_anything_is_measured(
    model, text, tmp_path, out, message
):
    with pytest.raises(UserError, match=message):
        evaluate(model, text, context=16, out=tmp_path / out, progress=pytest.fail)


def test_halves_of_characters_in_json_do_not_end_the_run(model, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "w1 w2 \\ud83d w3 w4 w5 w6 w7 w8"}\n')
    (found,) = evaluate(model, str(tmp_path / "half.jsonl"), context=8, device="cpu")["sources"]
    assert found["tokens"] == 7


def test_a_perplexity_beyond_any_number_is_shown(model, text):
    from rich.console import Console

    from llmsparse.eval.show import show

    found = evaluate(model, text, context=16, windows=2, device="cpu")
    found["sources"][0] |= {"word_perplexity": math.inf, "word_standard_error": math.nan}
    console = Console(record=True, width=160)
    console.print(show(found))
    assert "not finite" in console.export_text()


def test_nan_outputs_name_the_first_layer_and_write_nothing(model, text, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="outputs of .* are NaN: the weights model.layers.1.mlp.up_proj.weight"
    ):
        evaluate(model, text, context=16, out=tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


def test_generation_continues_beginnings_of_the_first_text(model, text, tmp_path):
    other = checkpoint(tmp_path / "other", seed=1)
    found = evaluate(other, text, context=16, generate=3, against=model, device="cpu")["generation"]
    assert [sample["prompt"] for sample in found["samples"]][0] == " ".join(TEXT.split()[:15])
    assert len(found["samples"]) == 3 and 0 <= found["repetition"] <= 1 and "dense_terminated" in found
    assert all(sample["continuation"] != sample["dense_continuation"] for sample in found["samples"])


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"has no config.json"):
        evaluate(tmp_path, text)


def test_a_checkpoint_without_a_tokenizer_is_refused(model, text):
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer that transformers can load"):
        evaluate(model, text, context=16)


def test_an_incomplete_checkpoint_is_refused_and_not_filled_with_noise(model, text):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, such as model.layers.1.mlp.down_proj.weight"):
        evaluate(model, text, context=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 64}, "--context 64 is beyond .*model's 32 positions; use --context 32"),
        ({"context": 32, "windows": 4}, "the text has 100 tokens, and 128 are needed for 4 windows"),
        ({"context": 16, "windows": 0}, "--windows 0: it starts at 1"),
        ({"context": 16, "batch_size": 0}, "--batch-size 0: it starts at 1"),
        ({"context": 16, "generate": -1}, "--generate -1: name how many texts to continue"),
        ({"context": 16, "limit": 0}, "--limit 0: it starts at 1"),
        ({"context": 16, "dtype": "int3"}, "--dtype int3 is unknown"),
        ({"context": 16, "device": "toaster"}, "--device toaster"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, text, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, text, **options)


def test_no_text_is_refused(model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="empty.txt holds no text to evaluate on"):
        evaluate(model, str(tmp_path / "empty.txt"), context=16)
    with pytest.raises(UserError, match="--data ', ' names no text"):
        evaluate(model, ", ", context=16)


def test_a_text_shorter_than_a_window_is_refused(model, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(
        UserError, match="short.txt: the text has 3 tokens, and 16 are needed for 1 window of 16"
    ):
        evaluate(model, str(tmp_path / "short.txt"), context=16)


def test_another_vocabulary_is_refused(model, tmp_path, text):
    larger = checkpoint(tmp_path / "larger", vocab=80)
    with pytest.raises(UserError, match="has a vocabulary of 67 and --against .*larger one of 80"):
        evaluate(model, text, context=16, against=larger)
    other_words = checkpoint(tmp_path / "words", words=60)
    with pytest.raises(UserError, match="the tokenizers of .* and --against .*words differ"):
        evaluate(model, text, context=16, against=other_words)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path, text):
    small = checkpoint(tmp_path / "small", vocab=20)
    with pytest.raises(UserError, match="has a vocabulary of 20; its tokenizer belongs to another model"):
        evaluate(small, text, context=16)
