"""Fixtures that any test may ask for: real data, a real model, a quiet offline process."""

import os
import random
import string
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["LLMSPARSE_PRODUCTS"] = "packed"  # no test waits for a timing, or depends on one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and fork do not mix
# Before torch is imported: processes that share the cores do not wait for each other.
os.environ["OMP_NUM_THREADS"] = str(
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

import pytest
import torch

if not torch.cuda.is_available():  # before a kernel is imported: Triton decides then
    os.environ["TRITON_INTERPRET"] = "1"

from llmsparse.errors import UserError
from llmsparse.gguf_checkpoint import gemma as converted_gemma
from llmsparse.gguf_checkpoint import smollm2 as converted_smollm2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run a real model first: minutes each, which nothing else waits for at the end."""
    real = {item.path for item in items if "smollm2" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in real)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models, whose products are too small to share; every core that is free for a real one."""
    real = {"smollm2", "gemma"} & {*request.fixturenames}
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]) if real else 1)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Gradients are on in every test, whatever ran before it in this process."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that LLMSPARSE_DATA names (text/wikitext2/test.txt, text/c4/calib.jsonl...)."""
    folder = os.environ.get("LLMSPARSE_DATA")
    if not folder:
        pytest.skip("LLMSPARSE_DATA does not name a folder of local data")
    assert Path(folder, "text").is_dir(), f"LLMSPARSE_DATA={folder} has no folder text/"
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bf16 folder, converted once into the user's cache; read only."""
    try:
        return converted_smollm2()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M as a bf16 folder, converted once into the user's cache; read only; windows need BOS."""
    try:
        return converted_gemma()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file for calibrating tiny models."""
    file = tmp_path / "text.txt"
    letters = string.ascii_letters + string.digits + " .,;:"
    file.write_text("".join(random.Random(0).choices(letters, k=20000)))
    return str(file)
