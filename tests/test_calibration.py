"""Calibration text: packing, BOS, weights, determinism, every kind of source and every refusal."""

import hashlib
import json
import logging
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from llmsparse.calibration import (
    PIECE,
    calibrate,
    interleave,
    parse_sources,
    shares,
    window_prefix,
)
from llmsparse.documents import builtin_documents, documents
from llmsparse.errors import UserError
from tests.tokenizers_tiny import BOS, EOS, UNK, word_tokenizer

TEXTS = [f"w{i} w{i} w{i}" for i in range(40)]  # document i is three tokens of its own


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def test_documents_are_joined_by_eos_and_never_padded(texts):
    windows = calibrate(texts, word_tokenizer(), samples=5, sequence_length=8).windows
    stream = windows.flatten().tolist()
    assert windows.shape == (5, 8)
    assert all((token == EOS) == (place % 4 == 3) for place, token in enumerate(stream))
    assert all(len(set(stream[start : start + 3])) == 1 for start in range(0, 40, 4))
    assert UNK not in stream and BOS not in stream


def test_without_an_eos_documents_follow_one_another(texts):
    stream = calibrate(texts, word_tokenizer(eos=False), samples=5, sequence_length=9).windows.flatten()
    assert stream.min() > UNK


def test_bos_starts_every_window_only_if_the_tokenizer_adds_it(texts):
    with_bos = calibrate(texts, word_tokenizer(bos=True), samples=4, sequence_length=9)
    without = calibrate(texts, word_tokenizer(bos=False), samples=4, sequence_length=8)
    assert with_bos.windows[:, 0].tolist() == [BOS] * 4
    assert with_bos.windows[:, 1:].tolist() == without.windows.tolist()
    assert window_prefix(word_tokenizer(bos=True)) == [BOS]
    assert window_prefix(word_tokenizer()) == []


def test_a_text_file_is_one_document_read_from_its_start(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("\n\n".join(TEXTS))
    found = calibrate(str(file), word_tokenizer(), samples=3, sequence_length=6)
    expected = word_tokenizer()(" ".join(TEXTS))["input_ids"][:18]
    assert found.windows.flatten().tolist() == expected
    assert found.sources[0]["documents"] == 1


def test_hashes_are_of_the_token_ids_and_of_the_text_used(texts):
    found = calibrate(texts, word_tokenizer(), samples=2, sequence_length=8, seed=3)
    raw = b"".join(int(i).to_bytes(4, "little") for i in found.windows.flatten())
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    used = list(documents(texts, seed=3))[:5]  # of the fifth, the EOS before it
    text_hash = hashlib.sha256("\n\n".join(used).encode()).hexdigest()
    assert found.sources == [
        {"source": texts, "weight": 1.0, "documents": 5, "tokens": 16, "sha256": text_hash}
    ]


def test_two_runs_give_the_same_ids_and_another_seed_others(texts):
    one, two, other = (
        calibrate(texts, word_tokenizer(), samples=6, sequence_length=8, seed=seed) for seed in (0, 0, 1)
    )
    assert one.sha256 == two.sha256 and one.windows.equal(two.windows)
    assert one.sha256 != other.sha256


def test_reading_stops_when_there_are_tokens_enough(monkeypatch):
    read = 0

    def endless(*args, **kwargs):
        nonlocal read
        while True:
            read += 1
            yield "w1 " * 1000

    monkeypatch.setattr("llmsparse.calibration.documents", endless)
    assert calibrate("x.txt", word_tokenizer(), samples=3, sequence_length=100).windows.shape == (3, 100)
    assert read <= PIECE // 3000 + 1


def test_a_long_document_is_cut_at_line_ends_without_eos(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("w1 w2 w3\n" * (PIECE // 4))  # more than two pieces
    samples = PIECE // 4 * 3 // 100
    stream = calibrate(str(file), word_tokenizer(), samples=samples, sequence_length=100).windows.flatten()
    expected = word_tokenizer()("w1 w2 w3")["input_ids"]
    assert stream.view(-1)[: len(stream) // 3 * 3].view(-1, 3).unique(dim=0).tolist() == [expected]


def test_weights_share_the_windows_exactly_and_interleave(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"text": "w1 w1"}] * 100)
    b = jsonl(tmp_path / "b.jsonl", [{"text": "w2 w2"}] * 100)
    tokenizer = word_tokenizer(eos=False)
    found = calibrate(f"{a}=3,{b}=1", tokenizer, samples=8, sequence_length=4)
    one, two = tokenizer("w1 w2")["input_ids"]
    assert found.windows[:, 0].tolist() == [one, one, two, one, one, one, two, one]
    assert all(len(set(window)) == 1 for window in found.windows.tolist())
    assert [source["weight"] for source in found.sources] == [0.75, 0.25]
    equal = calibrate(f"{a},{b}", tokenizer, samples=8, sequence_length=4)
    assert (equal.windows[:, 0] == one).sum() == 4


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.5], [0.9, 0.06, 0.04], [0.29, 0.71]])
@pytest.mark.parametrize("samples", [1, 7, 100, 128])
def test_shares_are_whole_exact_in_total_and_within_one(weights, samples):
    counts = shares(weights, samples)
    assert sum(counts) == samples
    assert all(abs(n - weight * samples) < 1 for n, weight in zip(counts, weights, strict=True))


def test_interleaving_uses_every_window_once_in_its_order():
    order = interleave([3, 1, 2])
    assert sorted(order) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert [j for i, j in order if i == 0] == [0, 1, 2]


def test_an_existing_path_is_one_source_whatever_it_is_called(tmp_path):
    file = tmp_path / "a=1,b=2.txt"
    file.write_text("w1")
    assert parse_sources(str(file)) == {str(file): 1.0}


def test_conversations_go_through_the_chat_template_with_one_bos(tmp_path):
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    file = jsonl(tmp_path / "chat.jsonl", [{"messages": talk}] * 20)
    tokenizer = word_tokenizer(bos=True, chat=True)
    windows = calibrate(file, tokenizer, samples=3, sequence_length=6).windows
    assert tokenizer.convert_ids_to_tokens(windows[0].tolist()) == [
        "<s>",
        "user",
        "w1",
        "assistant",
        "w2",
        "</s>",
    ]
    assert (windows == BOS).sum() == 3


def test_jsonl_parquet_and_a_folder_of_both_hold_the_same_documents(tmp_path, texts):
    table = pyarrow.table({"id": list(range(40)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    in_parquet = str(tmp_path / "rows.parquet")
    assert list(documents(texts)) == list(documents(in_parquet)) == TEXTS
    assert sorted(documents(in_parquet, seed=0)) == sorted(TEXTS)
    assert list(documents(in_parquet, seed=0)) != TEXTS
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "notes.txt").write_text("w50")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert sorted(documents(str(tmp_path), seed=1)) == sorted([*TEXTS, *TEXTS, "w50"])


def test_messages_in_parquet(tmp_path):
    talk = [{"role": "user", "content": "w1"}]
    parquet.write_table(pyarrow.table({"messages": [talk, talk]}), tmp_path / "chat.parquet")
    assert list(documents(str(tmp_path / "chat.parquet"))) == [talk, talk]


def test_blank_lines_and_blank_documents_are_left_out(tmp_path):
    file = tmp_path / "gaps.jsonl"
    file.write_text('{"text": "w1"}\n\n{"text": "  "}\n   \n{"text": "w2"}')
    found = calibrate(str(file), word_tokenizer(), samples=1, sequence_length=3)
    assert sorted(found.windows[0].tolist()) == sorted([EOS, *word_tokenizer()("w1 w2")["input_ids"]])
    assert found.sources[0]["documents"] == 2


def test_builtin_is_pydoc_in_order_with_its_last_fifth_held_out():
    from pydoc_data.topics import topics

    kept, held_out = builtin_documents(), builtin_documents(held_out=True)
    assert [*kept, *held_out] == [topics[name] for name in sorted(topics)]
    assert len(held_out) == len(topics) // 5
    source = calibrate("builtin", word_tokenizer(), samples=2, sequence_length=16).sources[0]
    assert source["source"] == "builtin" and source["python"].count(".") == 2


def test_long_texts_do_not_warn_about_the_model_s_length(texts, caplog):
    with caplog.at_level(logging.WARNING):
        calibrate(texts, word_tokenizer(), samples=1, sequence_length=100)
    assert not caplog.records


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("some/rows", None, "train"),
        ("some/rows:en", "en", "train"),
        ("some/rows:en:test", "en", "test"),
        ("some/rows::test", None, "test"),
        ("some/rows:validation", None, "validation"),
    ],
)
def test_a_hub_dataset_is_streamed(monkeypatch, source, config, split):
    asked = {}

    def load_dataset(name, config=None, **options):
        asked.update(name=name, config=config, **options)
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = calibrate(source, word_tokenizer(), samples=2, sequence_length=8, token="t", cache_dir="c")
    assert found.sources[0]["documents"] == 5
    options = {"streaming": True, "token": "t", "cache_dir": "c"}
    assert asked == {"name": "some/rows", "config": config, "split": split, **options}
    assert list(documents(source)) == TEXTS


@pytest.mark.parametrize("when", ["asked", "read"])
@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_an_unreachable_hub_is_a_clear_error(monkeypatch, when, error):
    def load_dataset(*args, **options):
        if when == "asked":
            raise error("no route\nto host")
        return (_ for _ in [1] if _raise(error("no route\nto host")))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=rf"some/rows is no file .* hub dataset failed \({error.__name__}: no route\)"
    ):
        list(documents("some/rows"))


def _raise(error: Exception) -> None:
    raise error


def test_the_hub_when_offline_is_a_clear_error():
    with pytest.raises(UserError, match="nobody/nothing is no file or folder here, and reading it as a hub"):
        list(documents("nobody/nothing"))


def test_too_little_text_says_tokens_and_the_largest_samples(texts):
    message = "has 159 tokens, and 320 are needed .40 windows of 8 text tokens.; the largest --samples is 19"
    with pytest.raises(UserError, match=message):
        calibrate(texts, word_tokenizer(), samples=40, sequence_length=8)
    assert len(calibrate(texts, word_tokenizer(), samples=19, sequence_length=8).windows) == 19
    with pytest.raises(
        UserError, match="has 159 tokens, and 200 are needed .*; not one window can be filled"
    ):
        calibrate(texts, word_tokenizer(), samples=1, sequence_length=200)


def test_the_largest_samples_of_weighted_sources_fits_each_of_them(tmp_path, texts):
    short = tmp_path / "short.txt"
    short.write_text("w1 " * 24)  # three windows of 8
    both = f"{texts}=0.5,{short}=0.5"
    with pytest.raises(
        UserError, match=r"short.txt has 24 tokens.* the largest --samples is (6|7);"
    ) as error:
        calibrate(both, word_tokenizer(), samples=10, sequence_length=8)
    largest = int(str(error.value).split("--samples is ")[1].split(";")[0])
    assert len(calibrate(both, word_tokenizer(), samples=largest, sequence_length=8).windows) == largest
    with pytest.raises(UserError):
        calibrate(both, word_tokenizer(), samples=largest + 1, sequence_length=8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.txt", b" \n\n", "blank.txt holds no text"),
        ("blank.jsonl", b"\n\n", "blank.jsonl holds no text"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
        (
            "other.jsonl",
            b'{"body": "x", "id": 1}\n',
            "line 1 has no column text or messages; found: body, id",
        ),
        ("broken.jsonl", b'{"text": "w1"}\n{"text": \n', "broken.jsonl line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is a list, not an object"),
        ("number.jsonl", b'{"text": 3}\n', "line 1: text is a int, not a string"),
        ("talk.jsonl", b'{"messages": ["hello"]}\n', "line 1: messages is not a list of objects with role"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl holds half a surrogate pair"),
        ("broken.parquet", b"PAR1 nothing", "broken.parquet is not a readable parquet file"),
        ("notes.md", b"w1", "notes.md is of no known kind; sources are builtin, a .txt"),
    ],
)
def test_an_unusable_file_is_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        calibrate(str(tmp_path / name), word_tokenizer(), samples=1, sequence_length=4)


def test_a_parquet_without_text_names_its_columns(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet has no column text or messages; found: body, id"):
        list(documents(str(tmp_path / "rows.parquet")))


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no .txt, .jsonl, .parquet file"):
        list(documents(str(tmp_path)))


def test_conversations_without_a_template_are_refused(tmp_path):
    file = jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    with pytest.raises(
        UserError, match="holds conversations, and the model's tokenizer has no chat template"
    ):
        calibrate(file, word_tokenizer(), samples=1, sequence_length=4)


def test_a_conversation_that_the_template_refuses_is_a_clear_error(tmp_path):
    file = jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="the chat template refuses one: roles must alternate"):
        calibrate(file, tokenizer, samples=1, sequence_length=4)


def test_an_id_beyond_the_vocabulary_is_refused(texts):
    with pytest.raises(
        UserError, match=r"has token id \d+, but the model's vocabulary 10; its tokenizer belongs"
    ):
        calibrate(texts, word_tokenizer(), samples=9, sequence_length=8, vocab_size=10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no such thing", "'no such thing' is not a source of text; sources are builtin, a .txt"),
        ("nonsense", "nonsense is no file or folder here, and reading it as a hub dataset failed"),
        ("missing.jsonl", "missing.jsonl does not exist; sources are builtin"),
        ("./missing", "./missing does not exist"),
        ("a.txt=0.5,b.txt", "give every source a weight"),
        ("a.txt=0,b.txt=1", "the weight '0' is not a number above 0"),
        ("a.txt=x,b.txt=1", "the weight 'x' is not a number above 0"),
        ("a.txt=-1,b.txt=1", "the weight '-1' is not a number above 0"),
        ("a.txt=nan,b.txt=1", "the weight 'nan' is not a number above 0"),
        ("a.txt,a.txt", "names a.txt twice"),
        ("a.txt,,b.txt", "between commas"),
        ("builtin=0.99,b.txt=0.01", r"b.txt \(weight 0.01\) gets none of 4 windows; raise --samples"),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        calibrate(source, word_tokenizer(), samples=4, sequence_length=4)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (1, 1)])
def test_windows_that_hold_nothing_are_refused(samples, length):
    with pytest.raises(UserError, match="the least is 1 of 3"):
        calibrate("builtin", word_tokenizer(bos=True), samples=samples, sequence_length=length)


def test_the_data_folder_s_texts_calibrate_a_real_tokenizer(data_folder, smollm2):
    from transformers import AutoTokenizer

    source = f"{data_folder}/text/c4/calib.jsonl=0.5,{data_folder}/text/wikitext2/valid.txt=0.5"
    found = calibrate(
        source, AutoTokenizer.from_pretrained(smollm2), samples=16, sequence_length=256, vocab_size=49152
    )
    assert found.windows.shape == (16, 256)
    assert [part["tokens"] for part in found.sources] == [2048, 2048]
