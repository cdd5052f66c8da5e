"""Damaged packed folders: an error in words, or a load that an independent reader agrees with; never a crash."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.utils import logging

import llmsparse
from llmsparse import held
from llmsparse.errors import UserError
from llmsparse.ops import linear
from tests.formats.layout import read
from tests.packed_tiny import packed

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 7, 255, 1 << 31, 1 << 63, 1 << 200, 0.5, 1e308, "", "int8", "int4:1", "int4:0",
    "int4:9999999", "bf16", "fp32", "nm", "dense", "bitmask", "../..", [], [0, 0], [1, 1], [64, 32], [32, 64],
    [-1, -1], [1 << 62, 1 << 62], ["a"], {}, {"a": 1}, ["lm_head"], ["model.embed_tokens"],
)  # fmt: skip
KEYS = ("layout", "values", "shape", "nnz", "size", "n", "m", "pattern", "tied")


def damage(folder: Path, draw: random.Random) -> str:
    """Change the folder as hypothesis draws it; returns what was done."""
    kind = draw.choice(("truncate", "header", "data", "data", "config", "config", "config"))
    if kind == "config":
        return kind + _damage_config(folder / "config.json", draw)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    if kind == "truncate":
        cut = draw.randrange(len(data))
        file.write_bytes(data[:cut])
        return f"truncate to {cut}"
    low, high = (0, header) if kind == "header" else (header, len(data))
    places = [draw.randrange(low, high) for _ in range(draw.choice((1, 1, 1, 4)))]
    for place in places:
        data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{kind} at {places}"


def _damage_config(file: Path, draw: random.Random) -> str:
    config = json.loads(file.read_text())
    quantization = config["quantization_config"]
    path = draw.choice(sorted(quantization["weights"]))
    entry, key, value = quantization["weights"][path], draw.choice(KEYS), draw.choice(HOSTILE)
    what = draw.randrange(6)
    if what == 0:
        quantization[draw.choice(("version", "weights"))] = value
    elif what == 1:
        quantization["weights"][path] = value
    elif what == 2:
        quantization["weights"][draw.choice(("", "model", "lm_head", "model.norm", "no.such"))] = entry
    elif what == 3:
        entry.pop(key, None)
    else:
        entry[key] = value
    file.write_text(json.dumps(config))
    return f" {what} {path} {key} {value!r}"


def outcome(folder: Path) -> str:
    """``refused``, or ``loaded`` when every packed weight is what the independent reader finds in the files."""
    try:
        model = llmsparse.load(folder, dtype=torch.float32)
    except UserError as error:
        assert len(str(error)) > 20
        return "refused"
    files = load_file(folder / "model.safetensors")
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"]
    for path, entry in entries.items():
        module = model.get_submodule(path)
        parts = {name: files[f"{path}.{name}"] for name in module.packed.tensors()}
        found = held.stored(module).dense(torch.float32).numpy()
        with np.errstate(all="ignore"):
            wanted = read(entry, parts)
        same = (found.view(np.int32) == wanted.view(np.int32)) | (np.isnan(found) & np.isnan(wanted))
        assert same.all(), f"{path} is not what docs/format.md says"
        for tokens in (1, 9):  # the kernels run on whatever was let through
            product = linear(held.stored(module), torch.ones(tokens, wanted.shape[1])).numpy()
            with np.errstate(all="ignore"):
                exact = wanted.astype(np.float64).sum(1)
                size = np.abs(wanted.astype(np.float64)).sum(1)
            sane = size < 1e30
            assert (np.abs(product - exact)[:, sane] <= 0.02 * size[sane] + 1e-6).all(), path
    return "loaded"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One packed folder of each kind of values."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return [packed(tmp_path_factory.mktemp("packed"), values=values) for values in (None, "int8", "int4:32")]


def attack(sources: list[Path], place: Path, examples: int, least: int) -> None:
    """Damage ``examples`` copies; at least ``least`` must be refused, and as many still be read, or little was tried."""
    outcomes = {"refused": 0, "loaded": 0}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(source=st.sampled_from(sources), draw=st.randoms(use_true_random=False))
    def one(source: Path, draw: random.Random) -> None:
        folder = place / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        note(damage(folder, draw))
        outcomes[outcome(folder)] += 1

    one()
    assert min(outcomes.values()) >= least, outcomes


def test_two_hundred_damaged_folders_are_refused_or_read_right(sources: list[Path], tmp_path: Path) -> None:
    attack(sources, tmp_path, 200, 10)


@pytest.mark.long
def test_two_thousand_damaged_folders_are_refused_or_read_right(sources: list[Path], tmp_path: Path) -> None:
    attack(sources, tmp_path, 2000, 100)
