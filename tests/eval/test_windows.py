"""Texts cut into windows: which tokens are scored, and the words and bytes that they stand for."""

import pytest
import torch

from llmsparse.errors import UserError
from llmsparse.eval import windows as windows_module
from llmsparse.eval.windows import bos_rule, cut_windows
from tests.tiny import tokenizer as byte_tokenizer
from tests.tokenizers_tiny import BOS, word_tokenizer

TEXT = " ".join(f"w{i}" for i in range(23))


def test_bos_starts_every_window_iff_the_tokenizer_adds_it():
    with_bos = cut_windows(TEXT, word_tokenizer(bos=True), 5)
    assert with_bos.ids.shape == (5, 5) and with_bos.ids[:, 0].tolist() == [BOS] * 5
    plain = cut_windows(TEXT, word_tokenizer(), 5)
    expected = word_tokenizer()(TEXT)["input_ids"]
    assert plain.ids.flatten().tolist() == expected[:20]
    assert with_bos.ids[:, 1:].flatten().tolist() == expected[:20]
    assert with_bos.scored.all() and plain.scored.all()


def test_the_rule_is_said_in_words():
    assert bos_rule(word_tokenizer(bos=True)) == "<s> starts every window, as the tokenizer adds it"
    assert bos_rule(word_tokenizer()) == (
        "none: the tokenizer adds none, and the first token of a window is not predicted"
    )


def test_the_first_windows_are_taken():
    every = cut_windows(TEXT, word_tokenizer(), 5)
    assert cut_windows(TEXT, word_tokenizer(), 5, windows=2).ids.equal(every.ids[:2])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided_windows_score_each_token_once_and_in_order(bos, stride):
    tokenizer = word_tokenizer(bos=bos)
    found = cut_windows(TEXT, tokenizer, 6, stride=stride)
    scored = found.ids[:, 1:][found.scored].tolist()
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    covered = text if bos else text[1:]
    assert scored == covered[: len(scored)] and len(covered) - len(scored) < stride
    assert found.scored[1:].sum(1).unique().tolist() == [stride]


def test_a_prefix_of_two_tokens_is_not_predicted(monkeypatch):
    monkeypatch.setattr(windows_module, "window_prefix", lambda _: [BOS, 1])
    for stride in (None, 2):
        found = cut_windows(TEXT, word_tokenizer(), 6, stride=stride)
        assert found.ids[:, :2].tolist() == [[BOS, 1]] * len(found.ids)
        assert (
            found.ids[:, 1:][found.scored].tolist()
            == word_tokenizer()(TEXT)["input_ids"][: found.scored.sum()]
        )
        assert found.words.shape == found.scored.shape
        assert (found.words * found.scored).sum() == found.scored.sum()


def test_a_stride_of_a_whole_window_is_no_stride():
    for bos, stride in ((False, 5), (True, 4)):
        tokenizer = word_tokenizer(bos=bos)
        strided, plain = cut_windows(TEXT, tokenizer, 5, stride=stride), cut_windows(TEXT, tokenizer, 5)
        assert strided.ids.equal(plain.ids) and strided.scored.equal(plain.scored)


@pytest.mark.parametrize("bos", [False, True])
def test_bytes_and_words_are_those_of_the_predicted_tokens(bos):
    found = cut_windows(TEXT, word_tokenizer(bos=bos), 5)
    names = word_tokenizer().convert_ids_to_tokens(found.ids[:, 1:].flatten().tolist())
    assert found.bytes is not None and found.words is not None
    assert found.bytes.flatten().tolist() == [len(name) + 1 for name in names]  # each up to the next one
    assert found.words.flatten().tolist() == [1] * len(names)


def test_all_tokens_together_stand_for_the_whole_text():
    text = "à la carte, 10 €.\n\n  Näïve \U0001f600 words\ttoo" * 3
    tokenizer = byte_tokenizer()
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = cut_windows(text, tokenizer, count + 1)  # BOS and one window
    assert found.bytes.sum() == len(text.encode()) and found.words.sum() == len(text.split())


def test_a_tokenizer_without_offsets_gives_no_words_and_bytes():
    fast = word_tokenizer()

    def slow(text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return fast(text, **options)

    slow.is_fast = False
    found = cut_windows(TEXT, slow, 5)
    assert found.bytes is None and found.words is None
    assert found.ids.equal(cut_windows(TEXT, fast, 5).ids)


@pytest.mark.parametrize(
    ("context", "windows", "stride", "message"),
    [
        (
            64,
            None,
            None,
            "the text has 23 tokens, and 64 are needed for 1 window of 64 text tokens; use a sho",
        ),
        (
            8,
            3,
            None,
            "has 23 tokens, and 24 are needed for 3 windows of 8 text tokens; use at most --windows 2",
        ),
        (8, 9, 2, "has 23 tokens, and 24 are needed for 9 windows of 8 text tokens; use at most --windows 8"),
        (1, None, None, "--context 1 leaves nothing to predict; use at least 2"),
        (8, None, 9, "--stride 9 must be from 1 to the 8 text tokens of a window"),
        (8, None, 0, "--stride 0 must be from 1"),
    ],
)
def test_what_cannot_be_cut_says_found_and_needed(context, windows, stride, message):
    with pytest.raises(UserError, match=message):
        cut_windows(TEXT, word_tokenizer(), context, windows, stride)


def test_ids_are_int64():
    assert cut_windows(TEXT, word_tokenizer(), 5).ids.dtype == torch.int64
